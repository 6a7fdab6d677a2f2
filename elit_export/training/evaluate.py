"""Measures held-out velocity error per budget, on the same images, times and noise for every budget."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from elit_export.models.elit import Elit
from elit_export.spec import Budget
from elit_export.training.data import LabelledImages
from elit_export.training.trainer import flow_batch, generator_for, random_times, to_signal

BATCH = 250


@dataclass(frozen=True)
class BudgetError:
    """The mean squared velocity error at one budget.

    `standard_error` is that of the mean; `above_full` is the paired difference to the full budget
    and `above_full_error` its standard error, which is far smaller because the draws are shared.
    """

    budget: Budget
    mse: float
    standard_error: float
    above_full: float
    above_full_error: float


def held_out_errors(model: Elit, data: LabelledImages, *, seed: int) -> Iterator[BudgetError]:
    """Measure every budget, full budget first, then downwards; every image once, with its own label."""
    full: np.ndarray[tuple[int], np.dtype[np.float64]] | None = None
    for budget in reversed(model.spec.budgets):
        errors = _errors_per_image(model, data, budget, seed)
        full = errors if full is None else full
        above = errors - full
        yield BudgetError(budget, *_mean_and_error(errors), *_mean_and_error(above))


def _mean_and_error(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> tuple[float, float]:
    return float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5)


@torch.inference_mode()
def _errors_per_image(
    model: Elit, data: LabelledImages, budget: Budget, seed: int
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    generator = generator_for(seed)
    errors = []
    for start in range(0, len(data), BATCH):
        images = to_signal(data.images[start : start + BATCH])
        y = torch.from_numpy(data.labels[start : start + BATCH])
        t = random_times(len(y), generator)
        batch = flow_batch(images, t, y, torch.randn(images.shape, generator=generator))
        predicted = model(batch.x, batch.t, batch.y, torch.arange(budget.kept))
        errors.append((predicted - batch.velocity).square().mean(dim=(1, 2, 3)).double().numpy())
    return np.concatenate(errors)

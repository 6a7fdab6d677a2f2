"""Trains by rectified flow with tail drop: every step runs the core on a random number of latents.

All randomness of step i is a function of (seed, i), so a resumed run equals an uninterrupted one
bit for bit on the same machine and thread count.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from elit_export.bundle.atomic import atomic_write
from elit_export.errors import CheckpointError, InputError
from elit_export.models.elit import initialise
from elit_export.models.registry import new_model
from elit_export.spec import DataFacts, ModelSpec, listed
from elit_export.spec.limits import BATCH, BUDGETS, TRAINING_STEPS
from elit_export.training.data import LabelledImages
from elit_export.training.state import STATE_FORMAT, read_state

BETAS = (0.9, 0.999)
CLIP_NORM = 1.0
CONFIG_LIMITS = {"steps": TRAINING_STEPS, "batch_size": BATCH, "warmup_steps": TRAINING_STEPS, "min_kept": BUDGETS}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The settings of one run.

    K is drawn uniformly from the model's budgets of min_kept and more, once per step for the whole batch, except
    for a share `full_share` of the steps, which run the full budget.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int
    ema_decay: float
    label_dropout: float
    min_kept: int
    full_share: float
    seed: int

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "warmup_steps", "min_kept"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, must be at least 1")
        for name, limit in CONFIG_LIMITS.items():
            limit.check(getattr(self, name), name)
        if self.seed < 0:
            raise InputError(f"seed is {self.seed}, must not be negative")
        for name in ("ema_decay", "label_dropout", "full_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}, must lie in 0..1")
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"learning_rate is {self.learning_rate}, must be positive")


@dataclass(frozen=True)
class TrainRecord:
    """The record of one step; `loss` is the mean squared error of the velocity."""

    step: int
    loss: float
    kept: int
    learning_rate: float


@dataclass(frozen=True)
class FlowBatch:
    """Inputs x_t = (1 − t)·data + t·noise with their true velocity noise − data."""

    x: Tensor  # (B, C, H, W)
    t: Tensor  # (B,)
    y: Tensor  # (B,)
    velocity: Tensor  # (B, C, H, W)


def flow_batch(data: Tensor, t: Tensor, y: Tensor, noise: Tensor) -> FlowBatch:
    share = t[:, None, None, None]
    return FlowBatch((1 - share) * data + share * noise, t, y, noise - data)


def random_times(count: int, generator: torch.Generator) -> Tensor:
    """Draw t as the sigmoid of a standard normal, (count,)."""
    return torch.sigmoid(torch.randn(count, generator=generator))


def to_signal(images: np.ndarray[Any, Any]) -> Tensor:
    """Convert bytes to float32 in [−1, 1]."""
    return torch.from_numpy(images).float() / 127.5 - 1


def generator_for(*numbers: int) -> torch.Generator:
    """Make a generator that depends on these numbers alone."""
    seed = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed))


def epoch_batch(count: int, batch_size: int, seed: int, step: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Give a step's part of the epoch's permutation of `count` images; an incomplete last batch is left out."""
    epoch, place = divmod(step, count // batch_size)
    order = np.random.default_rng((seed, epoch)).permutation(count)
    return order[place * batch_size : (place + 1) * batch_size]


class Trainer:
    """A run in progress: model, its moving average, optimizer, and how many steps are done."""

    def __init__(self, spec: ModelSpec, facts: DataFacts, data: LabelledImages, config: TrainConfig) -> None:
        self._check(spec, data, config)
        self.config, self.data = config, data
        self.model = initialise(new_model(spec, facts), generator_for(config.seed))
        self.ema = copy.deepcopy(self.model).requires_grad_(requires_grad=False)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.learning_rate, betas=BETAS, weight_decay=0.0, fused=True
        )
        self.step = 0

    @staticmethod
    def _check(spec: ModelSpec, data: LabelledImages, config: TrainConfig) -> None:
        if data.images.shape[1:] != spec.sample_shape:
            raise InputError(f"images are {data.images.shape[1:]}, the model takes {spec.sample_shape}")
        if data.num_classes > spec.num_classes:
            raise InputError(f"the data has {data.num_classes} classes, the model {spec.num_classes}")
        if len(data) < config.batch_size:
            raise InputError(f"batch_size {config.batch_size} is more than the {len(data)} images there are")
        runs = {budget.kept for budget in spec.budgets}
        if config.min_kept not in runs | {1}:  # 1 stands for the smallest budget
            raise InputError(f"min_kept {config.min_kept}: this model runs {listed(spec.budgets)}")

    # ------------------------------------------------------------ running

    def run(self) -> Iterator[TrainRecord]:
        """Train to the last step, one record per step; stop or save between any two."""
        self.model.train()
        while self.step < self.config.steps:
            yield self._train_step()

    def _train_step(self) -> TrainRecord:
        generator = generator_for(self.config.seed, self.step)
        rate = self.learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        kept = self._draw_kept(generator)
        batch = self._draw_batch(generator)
        predicted = self.model(batch.x, batch.t, batch.y, torch.arange(kept))
        loss = (predicted - batch.velocity).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        self.optimizer.step()
        self._update_ema()
        self.step += 1
        return TrainRecord(self.step, loss.item(), kept, rate)

    def learning_rate(self) -> float:
        """Compute a linear warm-up, then a cosine to zero."""
        warmup, total = self.config.warmup_steps, self.config.steps
        if self.step < warmup:
            return self.config.learning_rate * (self.step + 1) / warmup
        done = (self.step - warmup) / max(1, total - warmup)
        return self.config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))

    def _draw_kept(self, generator: torch.Generator) -> int:
        choices = [budget.kept for budget in self.model.spec.budgets if budget.kept >= self.config.min_kept]
        is_full = torch.rand((), generator=generator).item() < self.config.full_share
        drawn = choices[int(torch.randint(len(choices), (), generator=generator))]
        return choices[-1] if is_full else drawn

    def _draw_batch(self, generator: torch.Generator) -> FlowBatch:
        indices = epoch_batch(len(self.data), self.config.batch_size, self.config.seed, self.step)
        data = to_signal(self.data.images[indices])
        y = torch.from_numpy(self.data.labels[indices])
        dropped = torch.rand(len(y), generator=generator) < self.config.label_dropout
        y = torch.where(dropped, self.model.spec.null_class, y)
        t = random_times(len(y), generator)
        return flow_batch(data, t, y, torch.randn(data.shape, generator=generator))

    @torch.no_grad()
    def _update_ema(self) -> None:
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)

    # ------------------------------------------------------------ state on disk

    def save(self, path: Path) -> None:
        """Write everything needed to continue, atomically."""
        state = {
            "format": STATE_FORMAT,
            "run": self._identity(),
            "step": self.step,
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        try:
            with atomic_write(path) as temporary:
                torch.save(state, temporary)
        except RuntimeError as error:  # how torch's writer reports a full disk
            raise CheckpointError(f"{path}: cannot be written, is the disk full? ({error})") from error

    def resume(self, path: Path) -> int:
        """Continue from a saved state; returns the steps that its run was planned for, which may differ from these.

        The learning rate depends on the steps of the whole run, so with others it continues along their cosine: up
        again where a run is extended that was near its end. Raises CheckpointError if the state is damaged or of
        another run, InputError if it is already past the last step; nothing is changed then.
        """
        state = read_state(path, self._identity(), self.model, self.config.steps)
        self.model.load_state_dict(state.model)
        self.ema.load_state_dict(state.ema)
        (group,) = self.optimizer.state_dict()["param_groups"]
        groups = [group | {"lr": state.learning_rate}]
        self.optimizer.load_state_dict({"state": state.moments, "param_groups": groups})
        self.step = state.step
        return state.planned_steps

    def _identity(self) -> dict[str, Any]:
        return {**asdict(self.config), **self.model.spec.to_dict(), "data": self.data.sha256}

"""A solver as numbers: a multistep method whose times and weights were fitted to a model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from elit_export.errors import InputError
from elit_export.spec.limits import BUDGETS
from elit_export.spec.precision import Precision

MIXED = ",mixed"
MIN_CALLS = 2
MAX_CALLS = 32  # a table has calls · (calls + 1) / 2 weights, all of which are fitted


@dataclass(frozen=True)
class SolverTable:
    """The method x_{i+1} = x_i + Σ_{j ≤ i} weights[i][j] · v_j, where v_j is the guided velocity at (x_j, times[j]).

    `times` are calls + 1 values from 1 (noise) to 0. `budgets` and `weak_budgets` are the latents kept in each call;
    without `budgets` any schedule may be used, without `weak_budgets` that of the guidance. Raises InputError.
    """

    times: tuple[float, ...]
    weights: tuple[tuple[float, ...], ...]
    budgets: tuple[int, ...] | None = None
    weak_budgets: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        calls = len(self.times) - 1
        if not MIN_CALLS <= calls <= MAX_CALLS:
            raise InputError(f"a solver table has {MIN_CALLS} to {MAX_CALLS} calls, not {calls}")
        if (self.times[0], self.times[-1]) != (1, 0) or not all(
            after < before for before, after in pairwise(self.times)
        ):
            raise InputError(f"the times of a solver table must fall from 1 to 0, not {self.times}")
        if [len(row) for row in self.weights] != list(range(1, calls + 1)):
            raise InputError("row i of a solver table's weights must have i + 1 numbers, one row for each call")
        if not all(math.isfinite(weight) for row in self.weights for weight in row):
            raise InputError("a solver table's weights must be finite")
        for name in ("budgets", "weak_budgets"):
            kept = getattr(self, name)
            if kept is not None and (len(kept) != calls or not all(1 <= each <= BUDGETS.maximum for each in kept)):
                raise InputError(f"{name} of a solver table must name the latents kept in each of its {calls} calls")

    @property
    def calls(self) -> int:
        return len(self.weights)

    @property
    def name(self) -> str:
        """How a sampling asks for it: solver:8, or solver:8,mixed if its calls have budgets of their own."""
        return f"solver:{self.calls}{MIXED if self.budgets else ''}"


@dataclass(frozen=True, kw_only=True)
class SolverError:
    """The error of a method's samples against the reference solution, in dB.

    It is that of the median image, of all together (pooled), and of the worst image. `calls` counts evaluations.
    """

    sampler: str
    steps: int
    calls: int
    median_db: float
    pooled_db: float
    worst_db: float


@dataclass(frozen=True, kw_only=True)
class SolverFacts:
    """A table and what it was calibrated for.

    It was fitted to `images` images of `seed` on the plans of a target in a precision. `error` is that of
    `held_out_images` others, on which nothing was fitted and nothing chosen; `compared` are samplers without
    calibration on the same ones: `ab3` with as many calls, and Euler's 50 steps.
    """

    checkpoint_sha256: str
    table: SolverTable
    guidance: str
    guidance_interval: tuple[float, float] | None
    schedule: str
    target: str
    precision: Precision
    images: int
    held_out_images: int
    seed: int
    error: SolverError
    compared: tuple[SolverError, ...]

    @property
    def name(self) -> str:
        """How a sampling asks for it."""
        return self.table.name

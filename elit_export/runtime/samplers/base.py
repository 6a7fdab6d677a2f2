"""What every sampler is: a generator of states along a time grid, over any velocity function.

Time runs from t=1 (noise) to t=0 (data); the state is float64, (B, C, H, W). A sampler yields the
state after each step and keeps no state between runs. Adding one: a file, and a row in the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from elit_export.arrays import Float64

Velocity = Callable[[Float64, float, int], Float64]  # (x, t, step) → dx/dt, guidance already combined
Noise = Callable[[], Float64]
Run = Callable[[Velocity, Float64, Float64, Noise], Iterator[Float64]]


def even_times(steps: int) -> Float64:
    """steps + 1 times from 1 to 0."""
    return np.arange(steps, -1, -1) / steps  # correctly rounded, unlike linspace: 0.3 is 0.3


def never(_step: int, _steps: int) -> bool:
    return False


@dataclass(frozen=True)
class Sampler:
    """A row of the table. Every step evaluates the velocity where it begins.

    `evaluates_end` says of a step, of so many, whether it does so too where it ends.
    """

    name: str
    run: Run
    evaluates_end: Callable[[int, int], bool] = never
    min_steps: int = 1
    uses_noise: bool = False
    times: Callable[[int], Float64] = even_times

    def calls(self, steps: int) -> int:
        """The velocity evaluations of a run of so many steps."""
        return steps + sum(self.evaluates_end(step, steps) for step in range(steps))

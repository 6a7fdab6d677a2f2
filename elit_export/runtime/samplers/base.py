"""The base of all samplers: a generator of states along a time grid, over any velocity function.

Time runs from t=1 (noise) to t=0 (data); the state is float64, (B, C, H, W). A sampler yields the
state after each step and keeps no state between runs. To add one, write a file and a row in the table.
A step may evaluate the velocity several times; stage 0 is the first of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from elit_export.arrays import Float64

Velocity = Callable[[Float64, float, int, int], Float64]  # (x, t, step, stage) → dx/dt, guidance already combined
Noise = Callable[[], Float64]
Run = Callable[[Velocity, Float64, Float64, Noise], Iterator[Float64]]


def even_times(steps: int) -> Float64:
    """Return steps + 1 evenly spaced times from 1 to 0."""
    return np.arange(steps, -1, -1) / steps  # correctly rounded, unlike linspace: 0.3 is 0.3


class Evaluation(NamedTuple):
    """One evaluation of the velocity, as a sampler asks for it."""

    t: float
    step: int
    stage: int


def at_start(_step: int, _steps: int) -> tuple[float, ...]:
    return (0.0,)


@dataclass(frozen=True)
class Sampler:
    """A method and its properties.

    `accuracy` is the p of an error that falls as hᵖ. `nodes(step, steps)` says where each stage of a step evaluates
    the velocity: 0 is where the step begins, 1 where it ends.
    """

    name: str
    run: Run
    accuracy: int
    nodes: Callable[[int, int], tuple[float, ...]] = at_start
    min_steps: int = 1
    uses_noise: bool = False
    times: Callable[[int], Float64] = even_times

    def order(self) -> int:
        """Return the order of accuracy."""
        return self.accuracy

    def calls(self, steps: int) -> int:
        """Return the number of velocity evaluations in a run of so many steps."""
        return sum(len(self.nodes(step, steps)) for step in range(steps))

    def steps_within(self, calls: int) -> int:
        """Return the maximum of steps that take at most so many velocity evaluations; 0 if there is none."""
        fitting = (steps for steps in range(calls, self.min_steps - 1, -1) if self.calls(steps) <= calls)
        return next(fitting, 0)

    def evaluations(self, times: Float64) -> Iterator[Evaluation]:
        """Yield all evaluations of a run along a time grid, in order."""
        for step, (t, t_next) in enumerate(pairwise(times)):
            for stage, node in enumerate(self.nodes(step, len(times) - 1)):
                yield Evaluation(float((1 - node) * t + node * t_next), step, stage)  # exact at both ends

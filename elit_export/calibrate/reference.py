"""Reference solutions of the model's ODE on the engines themselves: Adams–Bashforth of order 3 with many steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from elit_export.arrays import Float64
from elit_export.calibrate.flow import Flow, Part, Trajectories
from elit_export.callbacks import noop
from elit_export.errors import CalibrationError
from elit_export.runtime.pipeline import Pipeline
from elit_export.runtime.samplers.adams_bashforth import AB3
from elit_export.runtime.samplers.base import even_times
from elit_export.verify.metrics import difference

RESOLUTIONS = (40, 60, 90, 135, 200, 300)  # steps; the first two neighbours that agree are fine enough
AGREEMENT_DB = 55.0


def resolved_steps(
    pipeline: Pipeline, trajectories: Trajectories, on_steps: Callable[[int], None] = noop
) -> tuple[int, Float64]:
    """Return so many steps that fewer give the same samples to 55 dB, and the samples (images, C, H, W).

    `on_steps` is called before each resolution. Raises CalibrationError if none agree.
    """
    coarse = None
    for steps in RESOLUTIONS:
        on_steps(steps)
        fine = solution(pipeline, trajectories, steps)
        if coarse is not None and difference(coarse, fine).sqnr_db >= AGREEMENT_DB:
            return steps, fine
        coarse = fine
    raise CalibrationError(
        f"solutions of {RESOLUTIONS[-2]} and {RESOLUTIONS[-1]} steps differ by more than {AGREEMENT_DB:g} dB, so there "
        f"is no reference solution",
        "calibrate on a plan set of higher precision, e.g. --precision fp32",
    )


def solution(pipeline: Pipeline, trajectories: Trajectories, steps: int) -> Float64:
    """Return the samples of the reference solution (images, C, H, W)."""
    flow = Flow(pipeline, trajectories, steps)
    return np.concatenate([_solved(part, steps) for part in flow.parts])


def _solved(part: Part, steps: int) -> Float64:
    def velocity(x: Float64, t: float, step: int, _stage: int) -> Float64:
        return part.evaluate(x, float(t), step)

    *_, last = AB3.run(velocity, part.start, even_times(steps), lambda: part.start)
    return last


@dataclass(frozen=True, eq=False)
class Curve:
    """A solution on a grid: `times` (m + 1,), `states` (m + 1, B, C, H, W) and `velocities` (m, B, C, H, W)."""

    times: Float64
    states: Float64
    velocities: Float64

    def at(self, t: float) -> Float64:
        """Interpolate by a cubic through states and velocities; by a line in the last interval."""
        index = min(int(np.searchsorted(-self.times, -t, side="right")) - 1, len(self.times) - 2)
        start, end = self.times[index], self.times[index + 1]
        h, s = end - start, (t - start) / (end - start)
        first, last = self.states[index], self.states[index + 1]
        if index + 1 == len(self.velocities):
            return np.asarray(first + s * (last - first))
        slopes = h * self.velocities[index], h * self.velocities[index + 1]
        return np.asarray(
            (2 * s**3 - 3 * s**2 + 1) * first
            + (s**3 - 2 * s**2 + s) * slopes[0]
            + (3 * s**2 - 2 * s**3) * last
            + (s**3 - s**2) * slopes[1]
        )


def traced(flow: Flow, steps: int) -> Curve:
    """Solve the ODE for all images, and keep every state and velocity."""
    velocities: list[Float64] = []

    def velocity(x: Float64, t: float, step: int, stage: int) -> Float64:
        found = flow.evaluate(x, float(t), step)
        if stage == 0:
            velocities.append(found)
        return found

    times = even_times(steps)
    states = [flow.start, *AB3.run(velocity, flow.start, times, lambda: flow.start)]
    return Curve(times, np.stack(states), np.stack(velocities))

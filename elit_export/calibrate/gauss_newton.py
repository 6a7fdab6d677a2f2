"""Improves the times and weights of a method together, by Gauss–Newton on the error of its final samples.

Derivatives are finite differences: a perturbed weight of call i changes only the calls after it, so all derivatives of
a method of 8 calls cost as much as 14 samplings, on engines alone. Levenberg's damping keeps steps small where the
samples are not linear in them. A few images with large errors would decide alone, so image k counts as 1 / (e_k + m),
where m is FLOOR times the median error: this minimizes Σ log(e_k + m).
p is the number of parameters, n·(n + 1)/2 weights and n − 1 times.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from elit_export.arrays import Float32, Float64
from elit_export.calibrate.flow import Flow, Method, Part, Rolled, image_errors, roll
from elit_export.errors import EngineError

STEP = 1e-3  # of a finite difference, of a weight and of a time, both of which are parts of [0, 1]
MIN_DISTANCE = 1e-3  # of two times
FIRST_DAMPING = 1e-4
DAMPINGS = (0.1, 1.0, 10.0, 100.0)  # tried in turn, relative to the last one that was good
LARGEST_DAMPING = 1e4
FLOOR = 5.0  # of the weights of images, in median errors


def parameters(method: Method) -> Float64:
    """Return the weights, row by row, and the inner times (p,)."""
    return np.concatenate([method.weights[np.tril_indices(method.calls)], method.times[1:-1]])


def with_parameters(method: Method, values: Float64) -> Method:
    """Return the method of other parameters."""
    calls = method.calls
    weights = np.zeros_like(method.weights)
    count = calls * (calls + 1) // 2
    weights[np.tril_indices(calls)] = values[:count]
    return Method(np.concatenate([[1.0], values[count:], [0.0]]), weights)


def is_valid(method: Method) -> bool:
    return bool((np.diff(method.times) <= -MIN_DISTANCE).all())


def derivatives(part: Part, method: Method, rolled: Rolled) -> Iterator[Float32]:
    """Yield the derivative of the samples by each parameter (B, C·H·W), in the order of `parameters`."""
    for call in range(method.calls):
        for velocity in rolled.velocities[: call + 1]:
            moved = rolled.states[call + 1] + STEP * velocity
            ended = roll(part, method, call + 1, moved, rolled.velocities[: call + 1]).samples
            yield _slope(ended, rolled)
    for call in range(1, method.calls):
        times = method.times.copy()
        times[call] += STEP
        at_other_time = Method(times, method.weights)
        yield _slope(roll(part, at_other_time, call, rolled.states[call], rolled.velocities[:call]).samples, rolled)


def _slope(ended: Float64, rolled: Rolled) -> Float32:
    return ((ended - rolled.samples) / STEP).reshape(len(ended), -1).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Normal:
    """The normal equations: `matrix` (p, p) and `gradient` (p,), of images weighted."""

    matrix: Float64
    gradient: Float64

    def step(self, damping: float) -> Float64:
        """Solve them with damping that is relative to each parameter's own effect."""
        scale = np.sqrt(np.maximum(np.diag(self.matrix), np.finfo(float).tiny))
        matrix = self.matrix / np.outer(scale, scale) + damping * np.eye(len(scale))
        return np.asarray(-np.linalg.solve(matrix, self.gradient / scale) / scale, np.float64)


def normal_equations(flow: Flow, method: Method, expected: Float64, weights: Float64) -> Normal:
    """Sum the equations over the parts, one of which is in memory; `weights` (images,) are those of the images."""
    count = len(parameters(method))
    matrix, gradient, done = np.zeros((count, count)), np.zeros(count), 0
    for part in flow.parts:
        own = slice(done, done + len(part.start))
        rolled = roll(part, method)
        root = np.sqrt(weights[own])[:, None]
        error = (rolled.samples - expected[own]).reshape(len(part.start), -1) * root
        slopes = np.stack([(slope * root).ravel() for slope in derivatives(part, method, rolled)])
        matrix += slopes @ slopes.T
        gradient += slopes @ error.ravel()
        done = own.stop
    return Normal(matrix, gradient)


@dataclass(frozen=True, eq=False)
class Iterate:
    """A method, and the damping with which it was found."""

    method: Method
    damping: float = FIRST_DAMPING


def improved(flow: Flow, expected: Float64, now: Iterate) -> Iterate | None:
    """Do one iteration; None if no damping lowers the objective."""
    errors = image_errors(flow.samples(now.method), expected)
    floor = FLOOR * float(np.median(errors))
    normal = normal_equations(flow, now.method, expected, 1 / (errors + floor))
    best, lowest = None, objective(errors, floor)
    for factor in DAMPINGS:
        damping = factor * now.damping
        method = with_parameters(now.method, parameters(now.method) + normal.step(damping))
        if damping > LARGEST_DAMPING or not is_valid(method):
            continue
        found = objective(_errors(flow, method, expected), floor)
        if found < lowest:
            best, lowest = Iterate(method, damping), found
        elif best:
            break
    return best


def _errors(flow: Flow, method: Method, expected: Float64) -> Float64:
    """Return the errors of a method that was only tried; infinite if its samples leave what engines can compute."""
    try:
        return image_errors(flow.samples(method), expected)
    except EngineError:
        return np.full(len(expected), np.inf)


def objective(errors: Float64, floor: float) -> float:
    return float(np.log(errors + floor).mean()) if np.isfinite(errors).all() else np.inf

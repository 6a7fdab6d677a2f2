"""The start of a solver's calibration: weights by least squares, step by step, on the best of a family of time grids.

On a grid, the weights of step i are those that bring the method's own state nearest to the reference solution at the
next time, given its own velocities so far, with a small pull to Adams–Bashforth of order 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import product

import numpy as np

from elit_export.arrays import Float64
from elit_export.calibrate.flow import Flow, Method, weighted_sum
from elit_export.calibrate.reference import Curve
from elit_export.runtime.samplers.adams_bashforth import step_weights

USED = 4  # velocities that a step of the start uses; more gave nothing in this greedy form
RIDGE = 1e-6  # of the mean square of a velocity: keeps weights of nearly equal velocities small
# Times are (1 − u^a)^b for u = i/n: a > 1 gives small steps near noise, b > 1 near the image.
SHAPES = tuple(product((1.0, 1.3, 1.6, 2.0), (1.0, 1.3, 1.6)))
FEW_SHAPES = ((1.3, 1.3), (1.6, 1.3), (1.6, 1.6))  # where many methods are compared


def grids(calls: int, shapes: Iterable[tuple[float, float]] = SHAPES) -> Iterator[Float64]:
    """Yield the time grids that a start is selected from, each (calls + 1,)."""
    u = np.arange(calls + 1) / calls
    for near_noise, near_image in shapes:
        yield (1 - u**near_noise) ** near_image


def fitted(flow: Flow, curve: Curve, times: Float64) -> tuple[Method, Float64]:
    """Fit the weights on a grid; returns the method and its samples (images, C, H, W)."""
    weights = adams_bashforth(times)
    state, velocities = flow.start, list[Float64]()
    for call in range(len(times) - 1):
        velocities.append(flow.evaluate(state, float(times[call]), call))
        rest = curve.at(float(times[call + 1])) - state - weighted_sum(weights[call], velocities)
        first = max(0, call + 1 - USED)
        weights[call, first : call + 1] += _solved(velocities[first:], rest)
        state = state + weighted_sum(weights[call], velocities)
    return Method(times, weights), state


def adams_bashforth(times: Float64) -> Float64:
    """Return the weights of order 3 on a grid as a matrix (n, n)."""
    calls = len(times) - 1
    weights = np.zeros((calls, calls))
    for call, row in enumerate(step_weights(times, order=3)):
        weights[call, call - np.arange(len(row))] = row
    return weights


def _solved(velocities: Sequence[Float64], rest: Float64) -> Float64:
    basis = np.stack([velocity.ravel() for velocity in velocities])
    products = basis @ basis.T
    ridge = max(RIDGE * float(np.trace(products)), np.finfo(float).tiny) * np.eye(len(products))
    return np.asarray(np.linalg.solve(products + ridge, basis @ rest.ravel()), np.float64)

"""Functions of a calibrated fit: the changes to add up, and the range in which it is valid."""

from __future__ import annotations

import numpy as np

from elit_export.arrays import Bools, Float32
from elit_export.spec import Fit

IDENTITY = Fit((0.0, 1.0), low=0.0, high=float(np.finfo(np.float32).max))  # for rules that need no calibration


def increments(fit: Fit, distance: Float32) -> Float32:
    """Return the changes of the residual by `fit`; they are never negative, so that a sum does not fall.

    Everything is in float32, as in the graph `fused`.
    """
    value = np.zeros_like(distance)
    with np.errstate(invalid="ignore", over="ignore"):  # at distances out of its range
        for coefficient in reversed(np.asarray(fit.coefficients, np.float32)):
            value = value * distance + coefficient
    return np.maximum(value, np.float32(0))


def covers(fit: Fit, distance: Float32) -> Bools:
    """Return whether each distance is in the range of `fit`."""
    return (distance >= np.float32(fit.low)) & (distance <= np.float32(fit.high))

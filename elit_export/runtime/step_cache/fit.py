"""What a calibration says of distances: how much the residual changes where the signal changes."""

from __future__ import annotations

import numpy as np

from elit_export.arrays import Bools, Float32
from elit_export.spec import Fit

IDENTITY = Fit((0.0, 1.0), low=0.0, high=float(np.finfo(np.float32).max))  # of rules that need no calibration


def increments(fit: Fit, distance: Float32) -> Float32:
    """How much the residual changed by `fit`, never negative: what was added up is not taken back.

    All in float32, as the graph `fused` computes it.
    """
    value = np.zeros_like(distance)
    with np.errstate(invalid="ignore", over="ignore"):  # of distances that it does not cover
        for coefficient in reversed(np.asarray(fit.coefficients, np.float32)):
            value = value * distance + coefficient
    return np.maximum(value, np.float32(0))


def covers(fit: Fit, distance: Float32) -> Bools:
    """Whether each distance lies where `fit` holds."""
    return (distance >= np.float32(fit.low)) & (distance <= np.float32(fit.high))

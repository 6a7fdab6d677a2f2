"""What a calibration says of distances: how much the residual changes where the signal changes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from elit_export.arrays import Bools, Float32


@dataclass(frozen=True)
class Fit:
    """How much the residual changes where the signal changes by a distance: a polynomial, lowest power first.

    It holds for distances in [low, high]. All in float32, as the graph `fused` computes it.
    """

    coefficients: tuple[float, ...]
    low: float
    high: float

    def increments(self, distance: Float32) -> Float32:
        """Never negative: what was added up is not taken back."""
        value = np.zeros_like(distance)
        with np.errstate(invalid="ignore", over="ignore"):  # of distances that it does not cover
            for coefficient in reversed(np.asarray(self.coefficients, np.float32)):
                value = value * distance + coefficient
        return np.maximum(value, np.float32(0))

    def covers(self, distance: Float32) -> Bools:
        return (distance >= np.float32(self.low)) & (distance <= np.float32(self.high))


IDENTITY = Fit((0.0, 1.0), low=0.0, high=float(np.finfo(np.float32).max))  # of rules that need no calibration

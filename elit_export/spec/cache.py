"""Numbers by which the step cache decides, as a calibration stores them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fit:
    """How much the residual changes where the signal changes by a distance: a polynomial, lowest power first.

    It holds for distances in [low, high].
    """

    coefficients: tuple[float, ...]
    low: float
    high: float

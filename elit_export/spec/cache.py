"""The calibrated fit by which the step cache decides."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fit:
    """The change of the residual as a polynomial in the change of the signal, lowest power first.

    It is valid for distances in [low, high].
    """

    coefficients: tuple[float, ...]
    low: float
    high: float

"""How far one array is from another."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Difference:
    """`max_relative` is max|error| / max|expected|; `sqnr_db` is 10·log₁₀(Σ expected² / Σ error²)."""

    max_abs: float
    max_relative: float
    sqnr_db: float
    cosine: float


def difference(found: npt.ArrayLike, expected: npt.ArrayLike) -> Difference:
    """Compare in float64; another shape, or anything not finite, counts as infinitely wrong."""
    wanted = np.asarray(expected, np.float64)
    got = np.asarray(found, np.float64)
    if got.shape != wanted.shape or not (np.isfinite(got).all() and np.isfinite(wanted).all()):
        return Difference(math.inf, math.inf, -math.inf, math.nan)
    error = got - wanted
    if not error.any():
        return Difference(0.0, 0.0, math.inf, 1.0)
    noise = float(np.square(error).sum())
    signal = float(np.square(wanted).sum())
    max_abs = float(np.abs(error).max())
    largest = float(np.abs(wanted).max())
    if signal == 0:
        return Difference(max_abs, math.inf, -math.inf, 0.0)
    cosine = float((got * wanted).sum() / math.sqrt(float(np.square(got).sum()) * signal)) if got.any() else 0.0
    return Difference(max_abs, max_abs / largest, 10 * math.log10(signal / noise), cosine)


def worst(differences: list[Difference]) -> Difference:
    """The worst of each measure."""
    return Difference(
        max(d.max_abs for d in differences),
        max(d.max_relative for d in differences),
        min(d.sqnr_db for d in differences),
        min(d.cosine for d in differences),
    )

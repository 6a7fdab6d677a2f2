"""Metrics of the error of one array against another."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Difference:
    """The error of an array.

    `max_relative` is max|error| / max|expected|, `sqnr_db` is 10·log₁₀(Σ expected² / Σ error²).
    """

    max_abs: float
    max_relative: float
    sqnr_db: float
    cosine: float


def difference(actual: npt.ArrayLike, expected: npt.ArrayLike) -> Difference:
    """Compare in float64; another shape or values that are not finite count as an infinite error."""
    reference = np.asarray(expected, np.float64)
    values = np.asarray(actual, np.float64)
    if values.shape != reference.shape or not (np.isfinite(values).all() and np.isfinite(reference).all()):
        return Difference(math.inf, math.inf, -math.inf, math.nan)
    error = values - reference
    if not error.any():
        return Difference(0.0, 0.0, math.inf, 1.0)
    noise = float(np.square(error).sum())
    signal = float(np.square(reference).sum())
    max_abs = float(np.abs(error).max())
    max_reference = float(np.abs(reference).max())
    if signal == 0:
        return Difference(max_abs, math.inf, -math.inf, 0.0)
    cosine = (
        float((values * reference).sum() / math.sqrt(float(np.square(values).sum()) * signal)) if values.any() else 0.0
    )
    return Difference(max_abs, max_abs / max_reference, 10 * math.log10(signal / noise), cosine)


@dataclass(frozen=True)
class SampleError:
    """The SQNR of samples: of all together (pooled), of the median image, and of the worst one."""

    pooled_db: float
    median_db: float
    worst_db: float

    def __sub__(self, other: SampleError) -> SampleError:
        """By how much each is better than that of other samples."""
        return SampleError(
            self.pooled_db - other.pooled_db, self.median_db - other.median_db, self.worst_db - other.worst_db
        )


def sample_error(actual: npt.ArrayLike, expected: npt.ArrayLike) -> SampleError:  # (B, ...)
    """Compare samples with the reference solution, image by image."""
    values, reference = np.asarray(actual), np.asarray(expected)
    each = [difference(image, of).sqnr_db for image, of in zip(values, reference, strict=True)]
    return SampleError(difference(values, reference).sqnr_db, float(np.median(each)), min(each))


def worst(differences: list[Difference]) -> Difference:
    """Take the worst value of each metric."""
    return Difference(
        max(d.max_abs for d in differences),
        max(d.max_relative for d in differences),
        min(d.sqnr_db for d in differences),
        min(d.cosine for d in differences),
    )

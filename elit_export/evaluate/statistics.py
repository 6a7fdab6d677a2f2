"""Statistics of a classifier's features: Gaussian fits, Fréchet distances, real-vs-real baselines, accuracy.

F is the number of features, n that of images.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from elit_export.arrays import Bools, Float64, Int64
from elit_export.errors import InputError

BASELINE_IMAGES = (64, 128, 256, 512, 1024, 2048)  # sample sizes at which the real-vs-real baseline is measured
BASELINE_DRAWS = 10
SIDE_DIVISOR = 8  # a classifier halves the side of an image three times
WIDTH_DIVISOR = 8
MAX_VALUES = {"channels": 3, "size": 256, "num_classes": 1000, "width": 128, "features": 64}


@dataclass(frozen=True, kw_only=True)
class ClassifierSpec:
    """The shape of a classifier: square images of side `size`, `features` numbers before the last layer."""

    channels: int
    size: int
    num_classes: int
    width: int
    features: int

    def __post_init__(self) -> None:
        for name, max_value in MAX_VALUES.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= max_value:
                raise InputError(f"classifier: {name} is {value!r}, must be a whole number in 1..{max_value}")
        for name, divisor in (("size", SIDE_DIVISOR), ("width", WIDTH_DIVISOR)):
            if getattr(self, name) % divisor:
                raise InputError(f"classifier: {name} is {getattr(self, name)}, must be a multiple of {divisor}")


# ---------------------------------------------------------------- Fréchet distance


@dataclass(frozen=True, eq=False)
class Gaussian:
    """A normal distribution of features: `mean` (F,), `covariance` (F, F)."""

    mean: Float64
    covariance: Float64

    @classmethod
    def fit(cls, features: Float64) -> Gaussian:  # (n, F)
        """Fit mean and covariance; raises InputError for so few images that the covariance has no full rank."""
        check_images(len(features), features.shape[1])
        return cls(features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False)))


def check_images(images: int, features: int) -> None:
    """Require F + 1 images, from which on a covariance of F features has full rank; raises InputError."""
    if images <= features:
        raise InputError(
            f"{images} images cannot tell the covariance of {features} features",
            f"give at least {features + 1}, better many times that",
        )


def frechet_distance(one: Gaussian, other: Gaussian) -> float:
    """Compute |m₁ − m₂|² + tr(C₁ + C₂ − 2·(C₁^½·C₂·C₁^½)^½): of Inception's features this is the FID."""
    root = _root(one.covariance)
    inner = root @ other.covariance @ root
    cross_term = np.sqrt(np.linalg.eigvalsh((inner + inner.T) / 2).clip(min=0)).sum()
    mean_term = np.square(one.mean - other.mean).sum()
    distance = mean_term + np.trace(one.covariance) + np.trace(other.covariance) - 2 * cross_term
    return max(0.0, float(distance))  # rounding can leave a trace below zero


def _root(covariance: Float64) -> Float64:
    """Compute the symmetric square root of a positive semi-definite matrix."""
    values, vectors = np.linalg.eigh(covariance)
    result: Float64 = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    return result


# ---------------------------------------------------------------- real-vs-real baselines


@dataclass(frozen=True)
class Baseline:
    """The Fréchet distance of `images` real images, balanced over the classes, from the other real ones.

    `distance` is the mean over draws, `spread` their standard deviation.
    """

    images: int
    distance: float
    spread: float


def baselines(features: Float64, labels: Int64, *, seed: int) -> Iterator[Baseline]:
    """Measure baselines, smallest sample first; the last one compares two halves.

    Raises InputError for too few images.
    """
    check_halves(len(features), features.shape[1])
    half, width = len(features) // 2, features.shape[1]
    rng = np.random.default_rng(seed)
    orders = [balanced_order(labels, rng) for _ in range(BASELINE_DRAWS)]
    for count in sorted({half, *(count for count in BASELINE_IMAGES if width < count < half)}):
        distances = [_split_distance(features[order[:count]], features[order[count:]]) for order in orders]
        yield Baseline(count, float(np.mean(distances)), float(np.std(distances, ddof=1)))


def check_halves(images: int, features: int) -> None:
    """Require enough images to fit a covariance to each half; raises InputError."""
    if images // 2 <= features:
        raise InputError(
            f"{images} test images are too few for {features} features: each half needs at least {features + 1}",
            f"give more test images, or --features {max(1, images // 2 - 1)}",
        )


def balanced_order(labels: Int64, rng: np.random.Generator) -> Int64:
    """Draw a random order of images in which every prefix has the classes as balanced as possible."""
    order = rng.permutation(len(labels))
    ranks = np.empty(len(labels), np.int64)  # of each image among those of its class
    for label in np.unique(labels):
        members = labels[order] == label
        ranks[members] = np.arange(members.sum())
    ordered: Int64 = order[np.argsort(ranks, kind="stable")]
    return ordered


def _split_distance(some: Float64, rest: Float64) -> float:
    return frechet_distance(Gaussian.fit(some), Gaussian.fit(rest))


# ---------------------------------------------------------------- evaluator


@dataclass(frozen=True, eq=False)
class EvaluatorFacts:
    """The statistics of real test images under a classifier, its accuracy, the baselines, and its origin."""

    spec: ClassifierSpec
    real: Gaussian
    test_images: int
    test_accuracy: float
    floors: tuple[Baseline, ...]  # real-vs-real baselines, by the name of their key in the file
    class_names: tuple[str, ...]
    train_sha256: str
    test_sha256: str
    command: str

    def __post_init__(self) -> None:
        width = self.spec.features
        if self.real.mean.shape != (width,) or self.real.covariance.shape != (width, width):
            raise InputError(f"classifier: mean and covariance are not those of {width} features")
        if not all(np.isfinite(values).all() for values in (self.real.mean, self.real.covariance)):
            raise InputError("classifier: mean or covariance hold values that are not finite")
        if not all(baseline.images > 0 and baseline.distance >= 0 and baseline.spread >= 0 for baseline in self.floors):
            raise InputError("classifier: a baseline is below zero")
        if not self.floors or not 0 <= self.test_accuracy <= 1:
            raise InputError("classifier: no baselines, or an accuracy outside 0..1")

    @property
    def halves_baseline(self) -> Baseline:
        """The baseline of two halves of the test images."""
        return self.floors[-1]

    def baseline_at(self, images: int) -> Baseline:
        """The baseline of the largest sample with at most `images` images, or the smallest baseline."""
        smaller = [baseline for baseline in self.floors if baseline.images <= images]
        return smaller[-1] if smaller else self.floors[0]


def share_of(is_right: Bools) -> tuple[float, float]:
    """Compute the share of images that are right, and its binomial standard error."""
    share = float(is_right.mean())
    return share, math.sqrt(share * (1 - share) / len(is_right))

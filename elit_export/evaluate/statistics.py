"""Gaussian fits of a classifier's features, how far two of them are apart, and what a classifier says of images.

F is the number of features, n that of images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from elit_export.arrays import Bools, Float64, Int64, Pixels
from elit_export.errors import InputError

FLOOR_IMAGES = (64, 128, 256, 512, 1024, 2048)  # sample sizes at which the floor is measured
FLOOR_DRAWS = 10
SIDE_DIVISOR = 8  # a classifier halves the side of an image three times
WIDTH_DIVISOR = 8
MOST = {"channels": 3, "size": 256, "num_classes": 1000, "width": 128, "features": 64}


@dataclass(frozen=True, kw_only=True)
class ClassifierSpec:
    """What fixes a classifier's layers: square images of `size`, `features` numbers before the last layer."""

    channels: int
    size: int
    num_classes: int
    width: int
    features: int

    def __post_init__(self) -> None:
        for name, most in MOST.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
                raise InputError(f"classifier: {name} is {value!r}, must be a whole number in 1..{most}")
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
        """Raises InputError for so few images that the covariance would have no full rank."""
        check_images(len(features), features.shape[1])
        return cls(features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False)))


def check_images(images: int, features: int) -> None:
    """A covariance of F features has full rank from F + 1 images on."""
    if images <= features:
        raise InputError(
            f"{images} images cannot tell the covariance of {features} features",
            f"give at least {features + 1}, better many times that",
        )


def frechet_distance(one: Gaussian, other: Gaussian) -> float:
    """|m₁ − m₂|² + tr(C₁ + C₂ − 2·(C₁^½·C₂·C₁^½)^½), which is what FID is of Inception's features."""
    root = _root(one.covariance)
    inner = root @ other.covariance @ root
    shared = np.sqrt(np.linalg.eigvalsh((inner + inner.T) / 2).clip(min=0)).sum()
    gap = np.square(one.mean - other.mean).sum()
    distance = gap + np.trace(one.covariance) + np.trace(other.covariance) - 2 * shared
    return max(0.0, float(distance))  # rounding can leave a trace below zero


def _root(covariance: Float64) -> Float64:
    """The symmetric square root of a symmetric matrix without negative eigenvalues."""
    values, vectors = np.linalg.eigh(covariance)
    rooted: Float64 = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    return rooted


# ---------------------------------------------------------------- floors


@dataclass(frozen=True)
class Floor:
    """How far `images` real images, evenly of all classes, are from the other real ones.

    `distance` is the mean over draws, `spread` their standard deviation.
    """

    images: int
    distance: float
    spread: float


def floors(features: Float64, labels: Int64, *, seed: int) -> Iterator[Floor]:
    """Smallest sample first; the last is that of two halves. Raises InputError for too few images."""
    check_halves(len(features), features.shape[1])
    half, width = len(features) // 2, features.shape[1]
    rng = np.random.default_rng(seed)
    orders = [evenly(labels, rng) for _ in range(FLOOR_DRAWS)]
    for count in sorted({half, *(count for count in FLOOR_IMAGES if width < count < half)}):
        found = [_apart(features[order[:count]], features[order[count:]]) for order in orders]
        yield Floor(count, float(np.mean(found)), float(np.std(found, ddof=1)))


def check_halves(images: int, features: int) -> None:
    """Two halves of the images must each tell a covariance."""
    if images // 2 <= features:
        raise InputError(
            f"{images} test images are too few for {features} features: each half needs at least {features + 1}",
            f"give more test images, or --features {max(1, images // 2 - 1)}",
        )


def evenly(labels: Int64, rng: np.random.Generator) -> Int64:
    """A random order of images whose every beginning holds the classes as evenly as can be."""
    order = rng.permutation(len(labels))
    ranks = np.empty(len(labels), np.int64)  # of an image among those of its class
    for label in np.unique(labels):
        members = labels[order] == label
        ranks[members] = np.arange(members.sum())
    ordered: Int64 = order[np.argsort(ranks, kind="stable")]
    return ordered


def _apart(some: Float64, rest: Float64) -> float:
    return frechet_distance(Gaussian.fit(some), Gaussian.fit(rest))


# ---------------------------------------------------------------- what judges samples


@dataclass(frozen=True, eq=False)
class JudgeFacts:
    """What is known of a classifier: the real test images' features, its accuracy on them, the floors, its origin."""

    spec: ClassifierSpec
    real: Gaussian
    test_images: int
    test_accuracy: float
    floors: tuple[Floor, ...]
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
        if not all(floor.images > 0 and floor.distance >= 0 and floor.spread >= 0 for floor in self.floors):
            raise InputError("classifier: a floor is below zero")
        if not self.floors or not 0 <= self.test_accuracy <= 1:
            raise InputError("classifier: no floors, or an accuracy outside 0..1")

    @property
    def halves_floor(self) -> Floor:
        return self.floors[-1]

    def floor_at(self, images: int) -> Floor:
        """Of the largest known sample that is not larger, or of the smallest known one."""
        smaller = [floor for floor in self.floors if floor.images <= images]
        return smaller[-1] if smaller else self.floors[0]


@dataclass(frozen=True, eq=False)
class Judge:
    """A classifier and what is known of it. `look` gives features (n, F) and predicted labels (n,)."""

    look: Callable[[Pixels], tuple[Float64, Int64]]  # (n, C, H, W)
    facts: JudgeFacts


def share_of(is_right: Bools) -> tuple[float, float]:
    """The share that is right, and its binomial standard error."""
    share = float(is_right.mean())
    return share, math.sqrt(share * (1 - share) / len(is_right))

"""Judges sets of images that show the same labels from the same noise, so that their differences are paired.

The standard error of a paired difference is far smaller than that of each value. Standard errors of Fréchet distances
are those of a bootstrap that draws images within their class.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from elit_export.arrays import Bools, Float64, Int64, Pixels
from elit_export.evaluate.protocol import Evaluator
from elit_export.evaluate.statistics import share_of

RESAMPLINGS = 50


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error."""

    value: float
    error: float


@dataclass(frozen=True, eq=False)
class Judged:
    """A set of images as an evaluator sees it; `resampled` are the Fréchet distances of the bootstrap's draws.

    The methods named `…_change` compare it with another set of the same judge.
    """

    is_right: Bools  # (n,)
    distance: float
    resampled: Float64  # (RESAMPLINGS,)

    @property
    def agreement(self) -> Estimate:
        """The share of images whose predicted class is the requested one."""
        return Estimate(*share_of(self.is_right))

    def agreement_change(self, first: Judged) -> Estimate:
        change = self.is_right.astype(float) - first.is_right
        return Estimate(float(change.mean()), float(change.std(ddof=1)) / math.sqrt(len(change)))

    @property
    def frechet(self) -> Estimate:
        """The distance to real images."""
        return Estimate(self.distance, float(self.resampled.std(ddof=1)))

    def frechet_change(self, first: Judged) -> Estimate:
        return Estimate(self.distance - first.distance, float((self.resampled - first.resampled).std(ddof=1)))


class Judge:
    """An evaluator that sees sets of images, all of the same labels, and resamples all of them alike."""

    def __init__(self, evaluator: Evaluator, labels: Int64, seed: int) -> None:  # (n,)
        self._evaluator, self._labels = evaluator, labels
        self._draws = resampled_within(labels, np.random.default_rng(seed), RESAMPLINGS)

    def judged(self, pixels: Pixels) -> Judged:  # (n, C, H, W)
        features, predicted = self._evaluator.look(pixels)
        distance = self._evaluator.distance
        resampled = np.array([distance(features[draw]) for draw in self._draws])
        return Judged(predicted == self._labels, distance(features), resampled)


def resampled_within(labels: Int64, rng: np.random.Generator, draws: int) -> Int64:  # (draws, n)
    """Draw images with replacement, each from those of its own class."""
    drawn = np.empty((draws, len(labels)), np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        drawn[:, members] = rng.choice(members, (draws, len(members)))
    return drawn

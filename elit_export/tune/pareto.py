"""Orders sampling configs by time and quality: the Pareto front, paired comparisons, and candidates for a preset."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from elit_export.arrays import Float64
from elit_export.evaluate.paired import Estimate

SIGNIFICANT = 2.0  # standard errors
MAX_DB = 200.0  # of samples that equal the reference, whose dB are infinite


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return which points no other one beats: none is as good in both numbers and better in one. Less is better."""
    best, chosen = math.inf, list[int]()
    for index in sorted(range(len(points)), key=lambda index: points[index]):
        if points[index][1] < best or (chosen and points[index] == points[chosen[-1]]):
            best = points[index][1]
            chosen.append(index)
    return sorted(chosen)


# ---------------------------------------------------------------- quality


@dataclass(frozen=True, eq=False)
class Errors:
    """Holds the energy of each image's error against the reference solution, and of the solution: both (n,)."""

    noise: Float64
    signal: Float64

    @property
    def db(self) -> Float64:
        """Compute the SQNR of each image."""
        with np.errstate(divide="ignore"):
            db: Float64 = np.minimum(10 * np.log10(self.signal / self.noise), MAX_DB)
        return db

    @property
    def pooled_db(self) -> float:
        """Compute the SQNR of all images together."""
        noise = float(self.noise.sum())
        return min(10 * math.log10(float(self.signal.sum()) / noise), MAX_DB) if noise else MAX_DB


@dataclass(frozen=True, eq=False)
class Distance:
    """Holds the Fréchet distance of some images from real ones, and of each draw of the bootstrap, which rows share."""

    value: float
    resampled: Float64  # (draws,)

    @property
    def error(self) -> float:
        return float(self.resampled.std(ddof=1))


@dataclass(frozen=True, eq=False)
class Quality:
    """Holds what is known of a config's images: errors if it has the reference's solution, a distance if one exists."""

    errors: Errors | None = None
    distance: Distance | None = None


def worse_in_db(one: Errors, other: Errors) -> Estimate:
    """By how many dB the images of one are worse than the same images of the other: mean and its standard error."""
    loss = other.db - one.db
    return Estimate(float(loss.mean()), float(loss.std(ddof=1)) / math.sqrt(len(loss)))


def worse_in_distance(one: Distance, other: Distance) -> Estimate:
    """By how much one is farther from real images than the other, with the standard error of paired draws."""
    spread = (one.resampled - other.resampled).std(ddof=1)
    return Estimate(one.value - other.value, float(spread))


def is_significant(loss: Estimate) -> bool:
    """Say whether a loss is more than two standard errors."""
    return loss.value > SIGNIFICANT * loss.error + 1e-9


# ---------------------------------------------------------------- candidates


@dataclass(frozen=True, eq=False)
class Candidate:
    """A config by its index, its cost, and what is known of its quality. A cost of 1 is the target's, if it is time."""

    index: int
    cost: float
    quality: Quality


@dataclass(frozen=True)
class Goal:
    """Says what a preset of this name must reach: at most a cost, or at least so many dB."""

    name: str
    max_cost: float = math.inf
    min_db: float | None = None

    def candidates(self, among: Iterable[Candidate]) -> list[Candidate]:
        """Order those that reach it: by quality, or where the goal is in dB, by cost."""
        if self.min_db is None:
            return by_quality(each for each in among if each.cost <= self.max_cost)
        good = [each for each in among if pooled_db(each.quality) >= self.min_db]
        return sorted(good, key=lambda each: each.cost)


def by_quality(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Order by quality, the best first.

    With distances, those not significantly farther than the nearest come first; among these, the ones with the
    reference's solution, the most dB first, for they are nearest to what the model means. Without, dB decide.
    """
    ordered = list(candidates)
    evaluated = [(each, each.quality.distance) for each in ordered if each.quality.distance]
    if not evaluated:
        return sorted(ordered, key=lambda each: (-pooled_db(each.quality), each.cost))
    _, nearest = min(evaluated, key=lambda pair: pair[1].value)
    return [each for each, _ in sorted(evaluated, key=lambda pair: _evaluated_order(pair[0], pair[1], nearest))]


def _evaluated_order(candidate: Candidate, distance: Distance, nearest: Distance) -> tuple[bool, bool, float, float]:
    is_farther = is_significant(worse_in_distance(distance, nearest))
    by_distance = is_farther or candidate.quality.errors is None
    return is_farther, by_distance, distance.value if by_distance else -pooled_db(candidate.quality), candidate.cost


def pooled_db(quality: Quality) -> float:
    return quality.errors.pooled_db if quality.errors else -math.inf


def survivors(candidates: Sequence[Candidate], goals: Iterable[Goal]) -> list[Candidate]:
    """Halve once: for each goal keep the better half of what reaches it, at least two; all of them need distances."""
    kept = set[int]()
    for goal in goals:
        within = goal.candidates(candidates)
        kept |= {each.index for each in within[: max(2, math.ceil(len(within) / 2))]}
    return [each for each in candidates if each.index in kept]


def nearest_slower(ms: float, times_ms: Sequence[tuple[str, float]]) -> list[int]:
    """For each family of controls, given as (family, ms), the fastest one that takes as much time or more."""
    slower = [index for index, (_, time_ms) in enumerate(times_ms) if time_ms >= ms]
    families = dict.fromkeys(times_ms[index][0] for index in slower)
    return [min((i for i in slower if times_ms[i][0] == family), key=lambda i: times_ms[i][1]) for family in families]

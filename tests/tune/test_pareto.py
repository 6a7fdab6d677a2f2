"""The Pareto front against brute force, paired comparisons, and who comes first."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elit_export.tune.pareto import (
    MAX_DB,
    Candidate,
    Distance,
    Errors,
    Goal,
    Quality,
    by_quality,
    front,
    is_significant,
    nearest_slower,
    survivors,
    worse_in_db,
    worse_in_distance,
)

POINTS = st.lists(st.tuples(*[st.integers(0, 6).map(float)] * 2), max_size=12)


@given(POINTS)
def test_the_front_is_that_of_brute_force(points: list[tuple[float, float]]) -> None:
    def is_beaten(point: tuple[float, float]) -> bool:
        return any(other != point and other[0] <= point[0] and other[1] <= point[1] for other in points)

    assert front(points) == [index for index, point in enumerate(points) if not is_beaten(point)]


def errors(*db: float) -> Errors:
    """Images of energy 1 with these errors."""
    return Errors(np.array([10 ** (-value / 10) for value in db]), np.ones(len(db)))


def distance(value: float, *resampled: float) -> Distance:
    return Distance(value, np.array(resampled or (value - 0.1, value, value + 0.1)))


def test_errors_are_told_of_each_image_and_of_all_together() -> None:
    np.testing.assert_allclose(errors(10, 20).db, [10, 20])
    assert errors(10, 20).pooled_db == pytest.approx(-10 * math.log10((0.1 + 0.01) / 2))
    exact = Errors(np.zeros(2), np.ones(2))
    assert (exact.pooled_db, *exact.db) == (MAX_DB, MAX_DB, MAX_DB)


def test_differences_are_paired() -> None:
    """Each image is two dB worse: that is sure, however much images differ."""
    one, other = errors(10, 30, 20), errors(12, 32, 22)
    loss = worse_in_db(one, other)
    assert (loss.value, loss.error) == (pytest.approx(2), pytest.approx(0, abs=1e-9))
    assert is_significant(loss)
    assert not is_significant(worse_in_db(other, one))
    assert not is_significant(worse_in_db(errors(10, 30, 20), errors(12, 29, 20)))
    farther = worse_in_distance(distance(3, 2, 3, 4), distance(2, 1, 2, 3))
    assert (farther.value, farther.error) == (1, 0)
    assert not is_significant(worse_in_distance(distance(3, 2, 3, 4), distance(2, 3, 1, 2)))


def test_among_equal_distances_the_solution_of_the_reference_comes_first() -> None:
    candidates = [
        Candidate(0, 0.5, Quality(None, distance(2.0, 1, 2, 3))),
        Candidate(1, 0.7, Quality(errors(20, 20), distance(2.1, 2, 1, 3.3))),
        Candidate(2, 0.9, Quality(errors(30, 30), distance(2.2, 3, 2, 1.6))),
        Candidate(3, 0.1, Quality(errors(40, 40), distance(9.0, 8, 9, 10))),
    ]
    assert [each.index for each in by_quality(candidates)] == [2, 1, 0, 3]
    assert [each.index for each in Goal("fast", max_cost=0.6).candidates(candidates)] == [0, 3]


def test_a_goal_in_decibels_takes_the_cheapest() -> None:
    candidates = [
        Candidate(index, cost, Quality(errors(db, db))) for index, cost, db in ((0, 9, 40), (1, 5, 34), (2, 1, 20))
    ]
    assert [each.index for each in Goal("fast", min_db=30).candidates(candidates)] == [1, 0]
    assert [each.index for each in by_quality(candidates)] == [0, 1, 2]


def test_a_halving_keeps_the_better_half_for_each_goal() -> None:
    candidates = [
        Candidate(index, index / 10, Quality(None, distance(10 - index, *[10.0 - index] * 3))) for index in range(8)
    ]
    kept = survivors(candidates, [Goal("best"), Goal("fast", max_cost=0.1)])
    assert [each.index for each in kept] == [0, 1, 4, 5, 6, 7]


def test_of_each_family_the_fastest_control_that_is_no_faster_is_near() -> None:
    times = [("euler", 3.0), ("euler", 9.0), ("euler", 5.0), ("ab3", 4.0), ("cache", 2.0)]
    assert nearest_slower(4.0, times) == [2, 3]

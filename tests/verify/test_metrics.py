from __future__ import annotations

import math

import numpy as np
import pytest

from elit_export.spec import Precision
from elit_export.verify.compare import Comparison
from elit_export.verify.metrics import difference, worst
from elit_export.verify.tolerances import TOLERANCES


def test_known_error_gives_known_measures() -> None:
    expected = np.array([3.0, -4.0])
    found = expected + np.array([0.0, 0.05])
    measured = difference(found, expected)
    assert measured.max_abs == pytest.approx(0.05)
    assert measured.max_relative == pytest.approx(0.0125)
    assert measured.sqnr_db == pytest.approx(10 * math.log10(25 / 0.0025))


def test_equal_arrays_have_no_noise() -> None:
    assert difference([1.0, 2.0], [1.0, 2.0]).sqnr_db == math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_infinitely_wrong(bad: float) -> None:
    measured = difference([1.0, bad], [1.0, 2.0])
    assert measured.sqnr_db == -math.inf
    assert measured.max_abs == math.inf


def test_another_shape_is_infinitely_wrong() -> None:
    assert difference([1.0, 1.0], [1.0]).sqnr_db == -math.inf


def test_empty_arrays_are_equal() -> None:
    assert difference([], []).sqnr_db == math.inf


def test_anything_beside_zero_is_infinitely_wrong() -> None:
    assert difference([1e-9], [0.0]).sqnr_db == -math.inf


def test_worst_takes_the_worst_of_each_measure() -> None:
    small, large = difference([1.0, 1.001], [1.0, 1.0]), difference([100.0, 101.0], [100.0, 100.0])
    assert worst([small, large]).max_abs == large.max_abs
    assert worst([small, large]).sqnr_db == large.sqnr_db


def test_cosine_of_opposite_arrays_is_minus_one() -> None:
    assert difference([1.0, -2.0], [-1.0, 2.0]).cosine == pytest.approx(-1.0)


def test_a_miss_says_what_would_have_passed() -> None:
    found = difference([1.0, 1.001], [1.0, 1.0])
    assert Comparison("profile full", "K=1", found, 60.0).passed
    assert "3.0 dB better than needed" in Comparison("profile full", "K=1", found, 60.0).verdict
    assert "a tolerance of 63 dB would have passed" in Comparison("profile full", "K=1", found, 80.0).verdict


@pytest.mark.parametrize(
    ("found", "expected", "why"),
    [([1.0, math.nan], [1.0, 1.0], "not finite"), ([1.0], [1.0, 1.0], "shape"), ([1e-9], [0.0], "zeros only")],
)
def test_a_hopeless_miss_names_no_tolerance(found: list[float], expected: list[float], why: str) -> None:
    verdict = Comparison("profile full", "K=1", difference(found, expected), 60.0).verdict
    assert "no tolerance would have passed" in verdict
    assert why in verdict
    assert "tolerance of" not in verdict


def test_every_precision_has_a_tolerance() -> None:
    assert set(TOLERANCES) == set(Precision)

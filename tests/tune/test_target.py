"""Targets as they are typed, and what they ask of presets."""

from __future__ import annotations

import math

import pytest

from elit_export.errors import InputError
from elit_export.tune.target import PRESETS, TOLERANCE_DB, Target, milliseconds, rounded_up


@pytest.mark.parametrize(("text", "ms"), [("40ms", 40), ("0.04s", 40), ("40", 40), (" 1.5 ms ", 1.5), (".5s", 500)])
def test_times_have_units(text: str, ms: float) -> None:
    assert milliseconds(text) == pytest.approx(ms)


@pytest.mark.parametrize("text", ["", "ms", "-4ms", "4 min", "1e3", "nan", "٤ms"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"write it as 40ms or 0\.04s"):
        milliseconds(text)


@pytest.mark.parametrize("values", [(), (1.0, 2.0), (0.0,), (-1.0,), (math.inf,), (None, None, math.nan)])
def test_there_is_one_target(values: tuple[float | None, ...]) -> None:
    with pytest.raises(InputError, match=r"give one of --latency 40ms|finite number above zero"):
        Target(*values)


def test_goals_are_shares_of_a_time_or_decibels_more() -> None:
    assert [goal.max_cost for goal in Target(latency_ms=40).goals(PRESETS)] == [0.35, 0.6, 1.0]
    assert [goal.min_db for goal in Target(min_sqnr_db=34).goals(PRESETS)] == [34, 37, 40]
    (own,) = Target(speedup=10).goals(("mine",))
    assert (own.name, own.max_cost, own.min_db) == ("mine", 1.0, None)
    assert Target(speedup=10).limit_ms(200) == 20
    assert Target(latency_ms=40).limit_ms(200) == 40
    assert Target(min_sqnr_db=34).limit_ms(200) == math.inf
    assert pytest.approx(20 * math.log10(1 / 0.95)) == TOLERANCE_DB


@pytest.mark.parametrize(
    ("ms", "text"), [(1234.2, "1235"), (0.01234, "0.0124"), (99.96, "100.0"), (40, "40.0"), (123456.7, "123457")]
)
def test_a_time_that_is_advised_can_be_typed(ms: float, text: str) -> None:
    assert rounded_up(ms) == text
    assert ms <= milliseconds(f"{rounded_up(ms)}ms") <= ms * 1.01

from __future__ import annotations

from pathlib import Path

import pytest

from elit_export.bench.limits import Limit, load_limits, misses
from elit_export.errors import InputError

FACTS = {"switching": 1.05, "budgets": [{"speedups": {"eager": 1.4}}]}


def test_what_holds_is_silent_and_what_misses_is_told() -> None:
    bars = [Limit(metric="switching", max=1.2), Limit(metric="budgets.0.speedups.eager", min=1.5)]
    assert misses(bars, FACTS) == ["budgets.0.speedups.eager is 1.4, the limit is at least 1.5"]


@pytest.mark.parametrize("metric", ["nothing", "budgets.1.speedups", "budgets.x", "switching.deeper", "budgets"])
def test_a_metric_that_is_not_there_is_an_error(metric: str) -> None:
    with pytest.raises(InputError, match="metric"):
        misses([Limit(metric=metric)], FACTS)


def test_a_metric_that_was_not_measured_is_an_error() -> None:
    with pytest.raises(InputError, match="'bank_memory_ratio' was not measured"):
        misses([Limit(metric="bank_memory_ratio", max=1.1)], {"bank_memory_ratio": None})


def test_a_negative_number_counts_from_the_end() -> None:
    assert misses([Limit(metric="budgets.-1", max=2)], {"budgets": [1, 3]}) == [
        "budgets.-1 is 3, the limit is at most 2"
    ]


@pytest.mark.parametrize("content", ["null", "{}", '[{"metrik": "switching"}]', '[{"metric": "a", "min": "x"}]'])
def test_a_file_that_is_no_list_of_bars_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "limits.json").write_text(content)
    with pytest.raises(InputError, match="not a list of limits"):
        load_limits(tmp_path / "limits.json")


def test_a_file_that_is_not_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "limits.json").write_text("")
    with pytest.raises(InputError, match=r"not JSON: .*; copy or write the limits again"):
        load_limits(tmp_path / "limits.json")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no file of limits"):
        load_limits(tmp_path / "limits.json")

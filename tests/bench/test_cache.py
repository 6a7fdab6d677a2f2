"""The sweep of cached sampling configs and their controls."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from elit_export import Pipeline
from elit_export.bench.cache import (
    CACHED,
    COMBINED,
    CONTROLS,
    FEWER_STEPS,
    MULTISTEP,
    REFERENCE,
    SMALLER_BUDGET,
    SweepResult,
    SweepRow,
    best_configs,
    error_at,
    smaller_budgets,
    sweep,
)
from elit_export.bundle.reading import Bundle
from elit_export.cli import main
from elit_export.errors import CalibrationError, InputError
from tests.helpers import calibrate, fit_of


@pytest.fixture(scope="module")
def calibrated_bundle(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = Path(shutil.copytree(tiny_bundle.folder, tmp_path_factory.mktemp("sweep") / "bundle"))
    return calibrate(folder, fit_of(None))


@pytest.fixture(scope="module")
def swept(calibrated_bundle: Bundle) -> tuple[SweepResult, list[str]]:
    said: list[str] = []
    totals: set[int] = set()

    def on_way(way: str, total: int) -> None:
        said.append(way)
        totals.add(total)

    with Pipeline.load(calibrated_bundle.folder) as pipeline:
        result = sweep(pipeline, schedule="full", guidance="cfg:2", images=2, rounds=1, fine_steps=60, on_way=on_way)
    assert totals == {len(said)}
    return result, said


def row_of(family: str, engine_ms: float, sqnr_db: float, name: str = "") -> SweepRow:
    return SweepRow(
        name=name or f"{family} {engine_ms}",
        family=family,
        options={},
        computed=1,
        reused=0,
        probes=0,
        ms_per_image=engine_ms,
        engine_ms_per_image=engine_ms,
        over_parts=1.0,
        speedup=1.0,
        sqnr_db=sqnr_db,
        control_db={},
    )


# ---------------------------------------------------------------- the whole


def test_every_cached_way_stands_beside_the_controls(swept: tuple[SweepResult, list[str]]) -> None:
    result, _ = swept
    families = {row.family for row in result.rows}
    assert {REFERENCE, CACHED, COMBINED, *CONTROLS} <= families
    for row in result.rows:
        assert set(row.control_db) == (set(CONTROLS) if row.family in (CACHED, COMBINED) else set())
        assert not row.reused or row.options["cache"] != "none"


def test_calls_are_counted(swept: tuple[SweepResult, list[str]]) -> None:
    rows = {row.name: row for row in swept[0].rows}
    assert (rows[REFERENCE].computed, rows[REFERENCE].reused, rows[REFERENCE].probes) == (50, 0, 0)
    assert rows["ab3 14"].computed == 15
    assert (rows["every@2,order=1"].computed, rows["every@2,order=1"].reused) == (26, 24)
    assert rows["every@2,order=1"].probes == 0
    assert rows["teacache:0.2,order=1"].probes == 49
    assert rows["teacache:0.2,order=1"].computed + rows["teacache:0.2,order=1"].reused == 50


def test_errors_are_those_of_the_samples(swept: tuple[SweepResult, list[str]]) -> None:
    """More steps err less, and so does a forecast."""
    rows = {row.name: row.sqnr_db for row in swept[0].rows}
    assert rows["euler 8"] < rows["euler 25"] < rows[REFERENCE] < rows["ab3 20"]
    assert rows["every@4,order=0"] < rows["every@4,order=1"]


def test_the_best_ways_err_no_more_than_their_level(swept: tuple[SweepResult, list[str]]) -> None:
    result, _ = swept
    rows = {row.name: row for row in result.rows}
    assert rows[result.best["+0 dB"]].sqnr_db >= rows[REFERENCE].sqnr_db
    assert rows[result.best["-10 dB"]].engine_ms_per_image <= rows[result.best["+0 dB"]].engine_ms_per_image


# ---------------------------------------------------------------- its parts


def test_a_control_is_read_off_between_what_was_measured() -> None:
    rows = [row_of(FEWER_STEPS, 1, 10), row_of(FEWER_STEPS, 4, 20), row_of(REFERENCE, 16, 30), row_of(MULTISTEP, 8, 50)]
    assert error_at(2, FEWER_STEPS, rows) == pytest.approx(15)
    assert error_at(8, FEWER_STEPS, rows) == pytest.approx(25)
    assert error_at(17, FEWER_STEPS, rows) is None
    assert error_at(0.5, FEWER_STEPS, rows) is None
    assert error_at(8, MULTISTEP, rows) == pytest.approx(50)
    assert error_at(9, MULTISTEP, rows) is None
    assert error_at(2, SMALLER_BUDGET, rows) is None


def test_the_cheapest_of_those_that_are_good_enough() -> None:
    rows = [
        row_of(REFERENCE, 10, 30, "reference"),
        row_of(FEWER_STEPS, 1, 19, "bad"),
        row_of(FEWER_STEPS, 3, 21, "rough"),
        row_of(CACHED, 5, 31, "good"),
        row_of(CACHED, 6, 32, "dear"),
    ]
    assert best_configs(rows) == {"-10 dB": "rough", "+0 dB": "good"}
    assert best_configs([*rows, replace(rows[0], name="fine", family=MULTISTEP, sqnr_db=36.0)])["+6 dB"] == "fine"


def test_smaller_budgets_are_below_the_schedules(calibrated_bundle: Bundle) -> None:
    with Pipeline.load(calibrated_bundle.folder) as pipeline:
        assert smaller_budgets(pipeline, "full") == ["half", "quarter"]
        assert smaller_budgets(pipeline, "quarter") == []
        assert smaller_budgets(pipeline, "0.0-0.5:half,0.5-1.0:full") == ["quarter"]
        with pytest.raises(InputError, match="past the last step"):
            sweep(
                pipeline,
                schedule="0-9:half,10-49:full",
                guidance="none",
                images=1,
                rounds=1,
                fine_steps=60,
                on_way=lambda _way, _total: None,
            )


def test_a_bundle_without_calibration_is_refused(tiny_bundle: Bundle) -> None:
    with Pipeline.load(tiny_bundle.folder) as pipeline, pytest.raises(CalibrationError, match="calibrate cache"):
        sweep(
            pipeline,
            schedule="full",
            guidance="none",
            images=1,
            rounds=1,
            fine_steps=2,
            on_way=lambda _way, _total: None,
        )


def test_the_command_writes_table_plot_and_facts(calibrated_bundle: Bundle, tmp_path: Path) -> None:
    options = ["--images", "1", "--rounds", "1", "--fine-steps", "50"]
    files = ["--plot", str(tmp_path / "sweep.png"), "--json", str(tmp_path / "sweep.json")]
    done = CliRunner().invoke(main, ["bench", "cache", str(calibrated_bundle.folder), *options, *files])
    assert done.exit_code == 0, done.output
    assert "teacache:0.1" in done.output
    facts = json.loads((tmp_path / "sweep.json").read_text())["cache_sweep"]
    assert facts["schedule"] == "full"
    assert {row["family"] for row in facts["rows"]} >= {REFERENCE, CACHED}
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")

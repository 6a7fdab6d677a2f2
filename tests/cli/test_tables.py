"""What the tables of a bench say; the tables of `inspect` and `verify` are tested through their commands."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.table import Table

from elit_export.bench.engines import ENGINE, BenchResult, DecodeResult, budget_results
from elit_export.bench.timing import Timing
from elit_export.cli.tables.bench import bench_tables, quality_table
from elit_export.cost.flops import flops
from elit_export.evaluate.quality import Estimate, QualityResult, QualityRow
from elit_export.evaluate.statistics import Baseline
from elit_export.spec import Budget
from tests.helpers import tiny_spec

SPEC = tiny_spec()


def result_of(budgets: dict[str, Budget]) -> BenchResult:
    """Nothing sampled; the engine's times follow the FLOPs."""
    timed = {}
    for name, budget in budgets.items():
        engine_ms = flops(SPEC, budget).total / 1e6
        timed[name] = {name: Timing(factor * engine_ms, 0.0, 0.0, 1) for name, factor in ((ENGINE, 1), ("eager", 2))}
    results = list(budget_results(SPEC, budgets, timed, rows=2, text=0, peak=100.0))
    return BenchResult(
        rows=2,
        peak_gflops=100.0,
        budgets=results,
        switching=1.0,
        samplings=[],
        plan_bytes=4_000,
        bank_bytes=2_000_000,
        bank_memory_ratio=1.25,
        resident_bytes=3_000_000,
        decode=None,
    )


def printed(table: Table) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return " ".join(capture.get().split())


def test_columns_say_what_times_are_relative_to() -> None:
    (full,) = bench_tables(result_of({"full": Budget(4, 4), "half": Budget(2, 4)}))
    assert {"time / full", "FLOPs / full", "eager / engine"} <= {str(column.header) for column in full.columns}
    (partial,) = bench_tables(result_of({"3of4": Budget(3, 4), "half": Budget(2, 4)}))
    headers = {str(column.header) for column in partial.columns}
    assert {"time / 3of4", "FLOPs / 3of4"} <= headers
    assert "time / full" not in headers


def test_the_caption_tells_the_memory_where_it_is_known() -> None:
    result = result_of({"full": Budget(4, 4)})
    (known,) = bench_tables(result)
    told = "the plans take 4 kB on disk; all engines hold 2 MB, 1.25 of one; the whole process holds 3 MB"
    assert told in printed(known)
    (unknown,) = bench_tables(replace(result, bank_bytes=None, bank_memory_ratio=None, resident_bytes=None))
    assert "hold" not in printed(unknown)
    assert "decod" not in printed(known)
    (decoding,) = bench_tables(replace(result, decode=DecodeResult(images=2, ms_per_image=12.34, plan_bytes=5_000)))
    assert "decoding 2 at once takes 12.3 ms per image; the plan of the decoder takes 5 kB on disk" in printed(decoding)


def quality_of(**changes: Any) -> QualityResult:
    row = QualityRow(
        target="cpu",
        precision="fp32",
        name="full",
        budget="4of4",
        way="ab3 14",
        calls=15,
        agreement=Estimate(0.75, 0.02),
        agreement_change=Estimate(0.0, 0.0),
        frechet=Estimate(20.0, 1.5),
        frechet_change=Estimate(0.0, 0.0),
        sqnr_db=None,
    )
    smaller = replace(row, name="half", budget="2of4", frechet_change=Estimate(-2.5, 0.25), sqnr_db=12.34)
    facts = {"images": 512, "guidance": "cfg:2", "seed": 0, "features": 48, "real_images": 10_000}
    facts |= {"real_agreement": 0.92, "halves_floor": Baseline(5000, 0.19, 0.03), "floor": Baseline(512, 1.02, 0.15)}
    return QualityResult(**{**facts, "rows": [row, smaller], "skipped": {}, **changes})  # type: ignore[arg-type]


def test_quality_is_told_with_errors_and_what_real_images_reach() -> None:
    said = printed(quality_table(quality_of()))
    assert "0.750 ± 0.020 │ +0.000 ± 0.000 │ 20.00 ± 1.50 │ +0.00 ± 0.00 │ – │" in said
    assert "-2.50 ± 0.25 │ 12.3 │" in said
    assert "real test images 0.920" in said
    assert "one half of these to the other 0.19, 512 of them to the rest 1.02 ± 0.15" in said
    assert "changes are to ab3 14 at full in fp32" in said
    assert "not measured" not in said


def test_plan_sets_that_cannot_run_are_told() -> None:
    said = printed(quality_table(quality_of(skipped={"rtx fp8": "no GPU"})))
    assert "not measured: rtx fp8: no GPU" in said

"""What the tables of a bench say; the tables of `inspect` and `verify` are tested through their commands."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console
from rich.table import Table

from elit_export.models.cost import flops
from elit_export.report.tables import bench_tables
from elit_export.spec import Budget
from elit_export.verify.bench import ENGINE, BenchResult, budget_results
from elit_export.verify.timing import Timing
from tests.helpers import tiny_spec

SPEC = tiny_spec()


def result_of(budgets: dict[str, Budget]) -> BenchResult:
    """Nothing sampled; the engine's times follow the FLOPs."""
    timed = {}
    for name, budget in budgets.items():
        engine_ms = flops(SPEC, budget).total / 1e6
        timed[name] = {name: Timing(factor * engine_ms, 0.0, 0.0, 1) for name, factor in ((ENGINE, 1), ("eager", 2))}
    results = list(budget_results(SPEC, budgets, timed, rows=2, peak=100.0))
    return BenchResult(2, 100.0, results, 1.0, [], bank_memory_ratio=1.25, resident_bytes=3_000_000)


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
    assert "all engines hold 1.25 of the memory of one; the whole process holds 3 MB" in printed(known)
    (unknown,) = bench_tables(replace(result, bank_memory_ratio=None, resident_bytes=None))
    assert "memory" not in printed(unknown)

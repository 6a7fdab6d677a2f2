"""bench engines: time each budget beside PyTorch, and whole samplings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from elit_export.cli.bench.options import (
    BUNDLE,
    CHECKPOINT_OPTION,
    ROUNDS_OPTION,
    ROWS_OPTION,
    advancing,
    drawer,
    measure_each,
    opened_pipeline,
    torch_runners,
)
from elit_export.cli.common import (
    ALL_OPTION,
    CHECK_OPTION,
    INTERFACE_OPTION,
    JSON_OPTION,
    OUTPUT,
    TARGET_OPTIONS,
    TRUST_OPTION,
    limits_in,
    progress_bar,
    refuse_alone,
    refuse_one_file,
    show,
)
from elit_export.errors import InputError

if TYPE_CHECKING:
    from elit_export.bench.engines import BenchResult
    from elit_export.bundle.manifest import PlanSet
    from elit_export.bundle.reading import Bundle
    from elit_export.cli.tables.layout import Table


@click.command()
@BUNDLE
@CHECKPOINT_OPTION
@INTERFACE_OPTION
@click.option("--no-compile", is_flag=True, help="Leave torch.compile out.")
@ROWS_OPTION
@ROUNDS_OPTION
@click.option("--no-sampling", is_flag=True, help="Leave out whole samplings, which take long for large models.")
@click.option("--plot", type=OUTPUT, help="Draw latency and error against budget into a PNG.")
@CHECK_OPTION
@TARGET_OPTIONS
@TRUST_OPTION
@ALL_OPTION
@JSON_OPTION
def engines(
    bundle: Path,
    checkpoint: str | None,
    interface: Path | None,
    no_compile: bool,
    rows: int,
    rounds: int,
    no_sampling: bool,
    plot: Path | None,
    check: Path | None,
    target: str | None,
    precision: str | None,
    trust: bool,
    every: bool,
    json_to: str | None,
) -> None:
    """Time and error per budget, cost of switching, and whole samplings."""
    from elit_export.bench.engines import BenchResult, check_rows, measured_budgets
    from elit_export.bundle.reading import Bundle
    from elit_export.cli.tables.bench import bench_tables
    from elit_export.runtime.opening import unopened

    refuse_alone(interface, checkpoint)
    refuse_one_file("--plot", plot, every=every)
    if no_compile and not checkpoint:
        raise InputError("--no-compile is of PyTorch's own times", "give --checkpoint FILE too")
    unmeasured = unmeasured_by(checkpoint, compiled=not no_compile, sampling=not no_sampling)
    limits, draw = limits_in(check, BenchResult, unmeasured), drawer("plot_bench", plot)
    opened = Bundle.open(bundle, trust=trust)

    @cache
    def others() -> Mapping[str, Any]:
        return torch_runners(opened, checkpoint, interface, compiled=not no_compile) if checkpoint else {}

    def measured(plan_set: PlanSet) -> tuple[list[Table], dict[str, Any]]:
        before = unopened(opened, plan_set)
        check_rows(before, measured_budgets(before), rows)  # nor is torch imported yet
        result = benched(
            opened, plan_set, others(), rows=rows, rounds=rounds, sampling=not no_sampling, json_to=json_to
        )
        draw(result)
        return list(bench_tables(result)), asdict(result)

    measure_each(opened, target, precision, measured, limits, json_to, every=every)


def unmeasured_by(checkpoint: str | None, *, compiled: bool, sampling: bool) -> dict[str, str]:
    """Parts of the facts that these options leave out, and what to give instead."""
    unmeasured = {} if checkpoint else dict.fromkeys(("speedups", "eager", "compile"), "give --checkpoint FILE")
    if not compiled:
        unmeasured["compile"] = "leave --no-compile out"
    return unmeasured | ({} if sampling else dict.fromkeys(("samplings", "sample_sqnr_db"), "leave --no-sampling out"))


def benched(
    bundle: Bundle,
    plan_set: PlanSet,
    others: Mapping[str, Any],
    *,
    rows: int,
    rounds: int,
    sampling: bool,
    json_to: str | None,
) -> BenchResult:
    """Say where FLOPs go, then measure one plan set."""
    from elit_export.bench.engines import bench
    from elit_export.bench.memory import bank_memory
    from elit_export.cli.tables.bench import cost_table

    decoder = plan_set.decoder
    with opened_pipeline(bundle, plan_set) as pipeline:
        show(cost_table(pipeline.spec, pipeline.coverage.tokens), json_to=json_to)
        with progress_bar() as progress:
            return bench(
                pipeline,
                others,
                rows=rows,
                rounds=rounds,
                sampling=sampling,
                plan_bytes=plan_set.model_bytes,
                decoder_bytes=decoder.plan.artifact.size_bytes if decoder else None,
                memory=partial(bank_memory, bundle, plan_set),
                on_stage=advancing(progress, progress.add_task("", total=None)),
            )

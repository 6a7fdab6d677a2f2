"""bench engines: time each budget beside PyTorch, and whole samplings."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path

import click

from elit_export.cli.bench.options import (
    BUNDLE,
    CHECKPOINT_OPTION,
    ROUNDS_OPTION,
    ROWS_OPTION,
    advancing,
    chosen,
    drawer,
    torch_runners,
)
from elit_export.cli.common import (
    CHECK_OPTION,
    INTERFACE_OPTION,
    JSON_OPTION,
    OUTPUT,
    TARGET_OPTIONS,
    TRUST_OPTION,
    conclude,
    progress_bar,
    refuse_alone,
    show,
)
from elit_export.errors import InputError


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
    json_to: str | None,
) -> None:
    """Time and error per budget, cost of switching, ways to sample."""
    from elit_export.bench import engines as measured
    from elit_export.bench.limits import load_limits
    from elit_export.bench.memory import bank_memory
    from elit_export.cli.tables.bench import bench_tables, cost_table

    refuse_alone(interface, checkpoint)
    if no_compile and not checkpoint:
        raise InputError("--no-compile is of PyTorch's own times", "give --checkpoint FILE too")
    limits, draw = load_limits(check) if check else [], drawer("plot_bench", plot)
    opened = chosen(bundle, target, precision, json_to, trust=trust)
    plan_set, decoder = opened.plan_set, opened.plan_set.decoder
    with opened.pipeline as pipeline:
        show(cost_table(pipeline.spec, pipeline.coverage.tokens), json_to=json_to)
        others = torch_runners(opened.bundle, checkpoint, interface, compiled=not no_compile) if checkpoint else {}
        with progress_bar() as progress:
            result = measured.bench(
                pipeline,
                others,
                rows=rows,
                rounds=rounds,
                sampling=not no_sampling,
                plan_bytes=plan_set.model_bytes,
                decoder_bytes=decoder.plan.artifact.size_bytes if decoder else None,
                memory=partial(bank_memory, opened.bundle, plan_set),
                on_stage=advancing(progress, progress.add_task("", total=None)),
            )
    draw(result)
    conclude(list(bench_tables(result)), asdict(result), limits, json_to)

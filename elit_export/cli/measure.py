"""The command that measures: bench."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from elit_export.cli.common import FILE, FOLDER, JSON_OPTION, progress_bar, show, write_json
from elit_export.report.tables import bench_tables, cost_table, soak_table, table
from elit_export.runtime.pipeline import Pipeline

Measured = tuple[list[Table], dict[str, Any]]


@click.command()
@click.argument("bundle", type=FOLDER)
@click.option("--checkpoint", help="Compare with PyTorch eager and torch.compile, in turn in this process.")
@click.option("--no-compile", is_flag=True, help="Leave torch.compile out.")
@click.option("--rows", default=8, show_default=True, help="Engine rows per call.")
@click.option("--rounds", default=10, show_default=True, help="Measured calls per budget, after warm-up.")
@click.option("--no-sampling", is_flag=True, help="Leave out whole samplings, which take long for large models.")
@click.option("--samplers", is_flag=True, help="Measure the error of every sampler instead.")
@click.option("--guidance", default="none", show_default=True, help="For --samplers.")
@click.option("--soak", type=click.IntRange(min=1), metavar="N", help="Watch memory over N short samplings instead.")
@click.option("--plot", type=FILE, help="Draw latency and error against budget into a PNG.")
@click.option("--check", type=FILE, help="JSON file of bars to hold; ends with status 1 if one does not.")
@click.option("--target", help="Needed if the bundle has several.")
@JSON_OPTION
def bench(
    bundle: Path,
    checkpoint: str | None,
    no_compile: bool,
    rows: int,
    rounds: int,
    no_sampling: bool,
    samplers: bool,
    guidance: str,
    soak: int | None,
    plot: Path | None,
    check: Path | None,
    target: str | None,
    json_to: str | None,
) -> None:
    """Measure BUNDLE's engines: time and error per budget, cost of switching, ways to sample."""
    from elit_export.verify.bars import load_bars, misses

    bars = load_bars(check) if check else []
    with Pipeline.load(bundle, target=target) as pipeline:
        if samplers:
            tables, facts = bench_samplers(pipeline, rows, guidance)
        elif soak:
            tables, facts = bench_memory(pipeline, soak)
        else:
            show(cost_table(pipeline.spec), json_to=json_to)
            tables, facts = bench_engines(
                pipeline, torch_runners(checkpoint, no_compile), rows, rounds, not no_sampling, plot
            )
    show(*tables, json_to=json_to)
    write_json(facts, json_to)
    missed = misses(bars, facts)
    for line in missed:
        click.echo(line, err=True)
    if missed:
        raise SystemExit(1)


def torch_runners(checkpoint: str | None, no_compile: bool) -> Mapping[str, Any]:
    if checkpoint is None:
        return {}
    from elit_export.checkpoint import load_checkpoint
    from elit_export.verify.reference import torch_engine

    model = load_checkpoint(checkpoint)
    eager = {"eager": torch_engine(model)}
    return eager if no_compile else {**eager, "compile": torch_engine(model, compiled=True)}


def bench_engines(
    pipeline: Pipeline, others: Mapping[str, Any], rows: int, rounds: int, sampling: bool, plot: Path | None
) -> Measured:
    from elit_export.verify import bench

    with progress_bar() as progress:
        task = progress.add_task("", total=len(pipeline.spec.named_budgets) + 4)

        def on_stage(stage: str) -> None:
            progress.update(task, description=stage, advance=1)

        result = bench.bench(pipeline, others, rows=rows, rounds=rounds, sampling=sampling, on_stage=on_stage)
    if plot:
        from elit_export.report.plots import plot_bench

        plot_bench(result, plot)
    return list(bench_tables(result)), asdict(result)


def bench_samplers(pipeline: Pipeline, images: int, guidance: str) -> Measured:
    from elit_export.verify.solvers import COMPARED, FINE_STEPS, solver_errors

    labels = [image % pipeline.spec.num_classes for image in range(images)]
    with progress_bar() as progress:
        errors = solver_errors(pipeline, labels, schedule="full", guidance=guidance, seed=0)
        found = list(progress.track(errors, total=len(COMPARED), description="sampling"))
    rows = [(error.sampler, str(error.steps), str(error.calls), f"{error.sqnr_db:.1f}") for error in found]
    title = f"{images} samples, guidance {guidance}, against Heun at {FINE_STEPS} steps"
    tables = [table(title, ("sampler", "steps", "calls", "SQNR dB"), rows)]
    return tables, {"samplers": [asdict(error) for error in found]}


def bench_memory(pipeline: Pipeline, samplings: int) -> Measured:
    from elit_export.verify.soak import soak

    with progress_bar() as progress:
        task = progress.add_task("sampling", total=samplings)
        result = soak(pipeline, samplings=samplings, on_sampling=lambda _: progress.advance(task))
    return [soak_table(result)], {"soak": asdict(result)}

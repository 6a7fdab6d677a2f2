"""The command that measures: bench."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from elit_export.bundle import Bundle
from elit_export.cli.backends import bench_backends
from elit_export.cli.common import (
    FILE,
    FOLDER,
    INTERFACE_OPTION,
    JSON_OPTION,
    progress_bar,
    refuse_alone,
    say,
    say_accepted,
    show,
    write_json,
)
from elit_export.cli.quality import bench_quality
from elit_export.errors import InputError
from elit_export.manifest import PlanSet
from elit_export.report.measures import bench_tables, cost_table, soak_table, sweep_tables
from elit_export.report.tables import table
from elit_export.runtime.opening import chosen_plan_set
from elit_export.runtime.pipeline import Pipeline
from elit_export.verify.bars import Bar
from elit_export.verify.bench import BenchResult
from elit_export.verify.cache_sweep import SweepResult

COUNT = click.IntRange(min=1)
Measured = tuple[list[Table], dict[str, Any]]
Runners = Mapping[str, Any]


@click.command()
@click.argument("bundle", type=FOLDER)
@click.option("--checkpoint", help="Compare with PyTorch eager and torch.compile, in turn in this process.")
@INTERFACE_OPTION
@click.option("--no-compile", is_flag=True, help="Leave torch.compile out.")
@click.option("--rows", type=COUNT, default=8, show_default=True, help="Engine rows per call.")
@click.option("--rounds", type=COUNT, default=10, show_default=True, help="Measured calls per budget, after warm-up.")
@click.option("--no-sampling", is_flag=True, help="Leave out whole samplings, which take long for large models.")
@click.option("--samplers", is_flag=True, help="Measure the error of every sampler instead.")
@click.option("--guidance", help="For --samplers, --cache-sweep (default: none) and --quality (default: cfg:2).")
@click.option("--soak", type=COUNT, metavar="N", help="Watch memory over N short samplings instead.")
@click.option("--cache-sweep", is_flag=True, help="Measure what step caching is worth instead; --rows are images.")
@click.option("--schedule", default="full", show_default=True, help="For --cache-sweep; t ranges fit every step count.")
@click.option("--fine-steps", type=COUNT, default=100, show_default=True, help="For --cache-sweep: Heun's.")
@click.option("--backends", is_flag=True, help="Time all plan sets that run here side by side instead.")
@click.option("--quality", is_flag=True, help="Measure the quality of samples instead, as a classifier sees it.")
@click.option("--images", type=COUNT, default=512, show_default=True, help="For --quality: images of each row.")
@click.option(
    "--way", "ways", multiple=True, metavar="SAMPLER:STEPS", help="For --quality. [default: euler:50, ab3:14]"
)
@click.option(
    "--classifier", metavar="FILE", help="For --quality: what train-classifier made. [default: the shipped one]"
)
@click.option("--plot", type=FILE, help="Draw error against budget, or against time with --cache-sweep, into a PNG.")
@click.option("--check", type=FILE, help="JSON file of bars to hold; ends with status 1 if one does not.")
@click.option("--target", help="Needed if the bundle has several; --quality and --backends take all.")
@click.option("--precision", help="Needed if the target has several; --quality and --backends take all.")
@JSON_OPTION
def bench(
    bundle: Path,
    checkpoint: str | None,
    interface: Path | None,
    no_compile: bool,
    rows: int,
    rounds: int,
    no_sampling: bool,
    samplers: bool,
    guidance: str | None,
    soak: int | None,
    cache_sweep: bool,
    schedule: str,
    fine_steps: int,
    backends: bool,
    quality: bool,
    images: int,
    ways: tuple[str, ...],
    classifier: str | None,
    plot: Path | None,
    check: Path | None,
    target: str | None,
    precision: str | None,
    json_to: str | None,
) -> None:
    """Measure BUNDLE's engines: time and error per budget, cost of switching, ways to sample."""
    from elit_export.verify.bars import load_bars
    from elit_export.verify.subjects import tokens_of

    instead = {"--samplers": samplers, "--soak": soak, "--cache-sweep": cache_sweep, "--quality": quality}
    more = {"--checkpoint": checkpoint if not backends else None, "--plot": None if cache_sweep else plot}
    refuse_together({**instead, "--backends": backends}, more)
    refuse_alone(interface, checkpoint)
    bars = load_bars(check) if check else []
    steered = guidance or ("cfg:2" if quality else "none")
    if quality:
        tables, facts = bench_quality(
            bundle,
            target=target,
            precision=precision,
            classifier=classifier,
            images=images,
            guidance=steered,
            ways=ways,
            json_to=json_to,
        )
        conclude(tables, facts, bars, json_to)
        return
    if backends:
        tables, facts = bench_backends(
            bundle,
            target=target,
            precision=precision,
            checkpoint=checkpoint,
            interface=interface,
            rows=rows,
            rounds=rounds,
        )
        say(f"the fastest, in a recipe:\n{facts['backends']['fastest_recipe']}", json_to=json_to)
        conclude(tables, facts, bars, json_to)
        return
    opened = Bundle.open(bundle)
    plan_set = chosen_plan_set(opened.manifest.plan_sets, target, precision)
    say_accepted(opened, plan_set, json_to=json_to)
    with Pipeline.load(bundle, target=target, precision=precision) as pipeline:
        if samplers:
            tables, facts = bench_samplers(pipeline, images=rows, guidance=steered)
        elif soak:
            tables, facts = bench_soak(pipeline, samplings=soak)
        elif cache_sweep:
            tables, facts = bench_cache(
                pipeline,
                schedule=schedule,
                guidance=steered,
                images=rows,
                rounds=rounds,
                fine_steps=fine_steps,
                plot=plot,
            )
        else:
            show(cost_table(pipeline.spec, tokens_of(pipeline)), json_to=json_to)
            others = torch_runners(opened, checkpoint, interface, compiled=not no_compile) if checkpoint else {}
            tables, facts = bench_engines(
                pipeline, others, opened, plan_set, rows=rows, rounds=rounds, sampling=not no_sampling, plot=plot
            )
    conclude(tables, facts, bars, json_to)


def conclude(tables: Sequence[Table], facts: Mapping[str, Any], bars: list[Bar], json_to: str | None) -> None:
    """Show, write, and end with status 1 where a bar does not hold."""
    from elit_export.verify.bars import misses

    show(*tables, json_to=json_to)
    write_json(facts, json_to)
    missed = misses(bars, facts)
    for line in missed:
        click.echo(line, err=True)
    if missed:
        raise SystemExit(1)


def refuse_together(instead: Mapping[str, object], engines_only: Mapping[str, object]) -> None:
    """What measures something else instead goes alone, and without what belongs to the measuring of engines."""
    given = [name for name, value in instead.items() if value]
    more = [name for name, value in engines_only.items() if value]
    if len(given) > 1 or (given and more):
        raise InputError(f"{' and '.join([*given, *more])} cannot be given together: leave out one of them")


def torch_runners(bundle: Bundle, checkpoint: str, interface: Path | None, *, compiled: bool) -> Runners:
    from elit_export.models.widening import widened_whole
    from elit_export.verify.check import model_of
    from elit_export.verify.reference import torch_engine

    model = widened_whole(model_of(bundle, checkpoint, interface))
    eager = {"eager": torch_engine(model)}
    return {**eager, "compile": torch_engine(model, compiled=True)} if compiled else eager


def bench_engines(
    pipeline: Pipeline,
    others: Runners,
    bundle: Bundle,
    plan_set: PlanSet,
    *,
    rows: int,
    rounds: int,
    sampling: bool,
    plot: Path | None,
) -> Measured:
    from elit_export.verify import bench
    from elit_export.verify.memory import bank_memory

    draw, decoder = drawer(plot), plan_set.decoder
    stages = (5 if sampling else 3) + (1 if decoder else 0)
    with progress_bar() as progress:
        task = progress.add_task("", total=len(bench.measured_budgets(pipeline)) + stages)

        def on_stage(stage: str) -> None:
            progress.update(task, description=stage, advance=1)

        result = bench.bench(
            pipeline,
            others,
            rows=rows,
            rounds=rounds,
            sampling=sampling,
            plan_bytes=plan_set.model_bytes,
            decoder_bytes=decoder.plan.artifact.size_bytes if decoder else None,
            memory=partial(bank_memory, bundle.folder, plan_set),
            on_stage=on_stage,
        )
    draw(result)
    return list(bench_tables(result)), asdict(result)


def drawer(plot: Path | None) -> Callable[[BenchResult], None]:
    """What draws into a file, if one is named; refuses before anything is measured if matplotlib is not there."""
    if plot is None:
        return lambda _result: None
    from elit_export.report.plots import plot_bench

    return partial(plot_bench, path=plot)


def sweep_drawer(plot: Path | None) -> Callable[[SweepResult], None]:
    """The same for a sweep."""
    if plot is None:
        return lambda _result: None
    from elit_export.report.plots import plot_sweep

    return partial(plot_sweep, path=plot)


def bench_samplers(pipeline: Pipeline, *, images: int, guidance: str) -> Measured:
    from elit_export.verify.solvers import COMPARED, EXACT_STEPS, solver_errors
    from elit_export.verify.subjects import subjects_of, text_of

    subjects = subjects_of(pipeline.spec, range(images), text_of(pipeline))
    with progress_bar() as progress:
        errors = solver_errors(pipeline, subjects, schedule="full", guidance=guidance, seed=0)
        found = list(progress.track(errors, total=len(COMPARED), description="sampling"))
    rows = [(error.sampler, str(error.steps), str(error.calls), f"{error.sqnr_db:.1f}") for error in found]
    title = f"{images} samples, guidance {guidance}, against Heun at {EXACT_STEPS} steps"
    tables = [table(title, ("sampler", "steps", "calls", "SQNR dB"), rows)]
    return tables, {"samplers": [asdict(error) for error in found]}


def bench_cache(
    pipeline: Pipeline, *, schedule: str, guidance: str, images: int, rounds: int, fine_steps: int, plot: Path | None
) -> Measured:
    from elit_export.verify.cache_sweep import count_of_ways, sweep

    draw = sweep_drawer(plot)
    with progress_bar() as progress:
        task = progress.add_task("", total=count_of_ways(pipeline, schedule, guidance, rounds))
        result = sweep(
            pipeline,
            schedule=schedule,
            guidance=guidance,
            images=images,
            rounds=rounds,
            fine_steps=fine_steps,
            on_way=lambda way: progress.update(task, description=way, advance=1),
        )
    draw(result)
    return list(sweep_tables(result)), {"cache_sweep": asdict(result)}


def bench_soak(pipeline: Pipeline, *, samplings: int) -> Measured:
    from elit_export.verify.soak import soak

    with progress_bar() as progress:
        task = progress.add_task("sampling", total=samplings)
        result = soak(pipeline, samplings=samplings, on_sampling=lambda _: progress.advance(task))
    return [soak_table(result)], {"soak": asdict(result)}

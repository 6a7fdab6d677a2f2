"""bench samplers and bench cache: weigh error against time."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from elit_export.cli.bench.options import (
    BUNDLE,
    GUIDANCE_OPTION,
    IMAGES_OPTION,
    ROUNDS_OPTION,
    advancing,
    chosen,
    drawer,
)
from elit_export.cli.common import (
    CHECK_OPTION,
    JSON_OPTION,
    OUTPUT,
    TARGET_OPTIONS,
    TRUST_OPTION,
    Count,
    conclude,
    progress_bar,
)
from elit_export.spec import limits


@click.command()
@BUNDLE
@IMAGES_OPTION
@GUIDANCE_OPTION
@CHECK_OPTION
@TARGET_OPTIONS
@TRUST_OPTION
@JSON_OPTION
def samplers(
    bundle: Path,
    images: int,
    guidance: str,
    check: Path | None,
    target: str | None,
    precision: str | None,
    trust: bool,
    json_to: str | None,
) -> None:
    """The error of every sampler."""
    from elit_export.bench.limits import load_limits
    from elit_export.bench.samplers import COMPARED, EXACT_STEPS, solver_errors
    from elit_export.cli.tables.bench import samplers_table
    from elit_export.runtime.conditioning import numbered

    limits = load_limits(check) if check else []
    with chosen(bundle, target, precision, json_to, trust=trust).pipeline as pipeline, progress_bar() as progress:
        conditioning = numbered(pipeline.spec, range(images), pipeline.coverage.text)
        errors = solver_errors(pipeline, conditioning, schedule="full", guidance=guidance, seed=0)
        found = list(progress.track(errors, total=len(COMPARED), description="sampling"))
    title = f"{images} samples, guidance {guidance}, against Heun at {EXACT_STEPS} steps"
    facts = {"samplers": [asdict(error) for error in found]}
    conclude([samplers_table(title, found)], facts, limits, json_to)


@click.command()
@BUNDLE
@IMAGES_OPTION
@ROUNDS_OPTION
@click.option("--schedule", default="full", show_default=True, help="t ranges fit every step count.")
@GUIDANCE_OPTION
@click.option(
    "--fine-steps", type=Count(limits.STEPS), default=100, show_default=True, help="Heun's, of the reference solution."
)
@click.option("--plot", type=OUTPUT, help="Draw error against time into a PNG.")
@CHECK_OPTION
@TARGET_OPTIONS
@TRUST_OPTION
@JSON_OPTION
def cache(
    bundle: Path,
    images: int,
    rounds: int,
    schedule: str,
    guidance: str,
    fine_steps: int,
    plot: Path | None,
    check: Path | None,
    target: str | None,
    precision: str | None,
    trust: bool,
    json_to: str | None,
) -> None:
    """What step caching is worth, beside what else the time could buy."""
    from elit_export.bench.cache import sweep
    from elit_export.bench.limits import load_limits
    from elit_export.cli.tables.bench import sweep_tables

    limits, draw = load_limits(check) if check else [], drawer("plot_sweep", plot)
    with chosen(bundle, target, precision, json_to, trust=trust).pipeline as pipeline, progress_bar() as progress:
        result = sweep(
            pipeline,
            schedule=schedule,
            guidance=guidance,
            images=images,
            rounds=rounds,
            fine_steps=fine_steps,
            on_way=advancing(progress, progress.add_task("", total=None)),
        )
    draw(result)
    conclude(list(sweep_tables(result)), {"cache_sweep": asdict(result)}, limits, json_to)

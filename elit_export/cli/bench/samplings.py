"""bench samplers and bench cache: weigh error against time."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from elit_export.cli.bench.options import (
    BUNDLE,
    GUIDANCE_OPTION,
    IMAGES_OPTION,
    ROUNDS_OPTION,
    advancing,
    drawer,
    measure_each,
    opened_pipeline,
)
from elit_export.cli.bench.whole_image import FLAG, WHOLE_IMAGE_OPTIONS, Asked, compare_with_pytorch
from elit_export.cli.bench.whole_image import GUIDANCE as WHOLE_GUIDANCE
from elit_export.cli.bench.whole_image import IMAGES as WHOLE_IMAGES
from elit_export.cli.common import (
    ALL_OPTION,
    CHECK_OPTION,
    JSON_OPTION,
    OUTPUT,
    TARGET_OPTIONS,
    TRUST_OPTION,
    Count,
    limits_in,
    progress_bar,
    refuse_one_file,
)
from elit_export.spec import limits

if TYPE_CHECKING:
    from elit_export.bundle.manifest import PlanSet
    from elit_export.bundle.reading import Bundle
    from elit_export.cli.tables.layout import Table

IMAGES, GUIDANCE = 8, "none"  # of `bench samplers` without FLAG


@click.command()
@BUNDLE
@click.option(
    "--images", type=Count(limits.IMAGES), help=f"Sampled at once.  [default: {IMAGES}; {FLAG}: {WHOLE_IMAGES}]"
)
@click.option("--guidance", help=f"[default: {GUIDANCE}; {FLAG}: {WHOLE_GUIDANCE}]")
@WHOLE_IMAGE_OPTIONS
@CHECK_OPTION
@TARGET_OPTIONS
@TRUST_OPTION
@ALL_OPTION
@JSON_OPTION
def samplers(
    bundle: Path,
    images: int | None,
    guidance: str | None,
    whole: Asked | None,
    check: Path | None,
    target: str | None,
    precision: str | None,
    trust: bool,
    every: bool,
    json_to: str | None,
) -> None:
    """The error of every sampler; with --whole-image, presets beside PyTorch."""
    from elit_export.bench.samplers import SamplerError
    from elit_export.bundle.reading import Bundle

    if whole:
        choices = whole.choices(images, guidance)
        opened = Bundle.open(bundle, trust=trust)
        compare_with_pytorch(opened, whole, choices, (target, precision), check, json_to, every=every)
        return
    measured = partial(sampler_facts, IMAGES if images is None else images, GUIDANCE if guidance is None else guidance)
    held_to, opened = limits_in(check, {"samplers": list[SamplerError]}), Bundle.open(bundle, trust=trust)
    measure_each(opened, target, precision, partial(measured, opened), held_to, json_to, every=every)


def sampler_facts(
    images: int, guidance: str, bundle: Bundle, plan_set: PlanSet
) -> tuple[list[Table], dict[str, object]]:
    """Compare the samplers on one plan set."""
    from elit_export.bench.samplers import COMPARED, REFERENCE_STEPS, sampler_errors
    from elit_export.cli.tables.bench import samplers_table
    from elit_export.runtime.conditioning import numbered

    with opened_pipeline(bundle, plan_set) as pipeline, progress_bar() as progress:
        conditioning = numbered(pipeline.spec, range(images), pipeline.coverage.text)
        compared = sampler_errors(pipeline, conditioning, schedule="full", guidance=guidance, seed=0)
        errors = list(progress.track(compared, total=len(COMPARED), description="sampling"))
    title = f"{images} samples, guidance {guidance}, against Heun at {REFERENCE_STEPS} steps"
    return [samplers_table(title, errors)], {"samplers": [asdict(error) for error in errors]}


@click.command()
@BUNDLE
@IMAGES_OPTION
@ROUNDS_OPTION
@click.option(
    "--schedule",
    default="full",
    show_default=True,
    help="t ranges (from 1, noise, to 0) and shares of the steps (from 0%) fit every step count.",
)
@GUIDANCE_OPTION
@click.option(
    "--fine-steps", type=Count(limits.STEPS), default=100, show_default=True, help="Heun's, of the reference solution."
)
@click.option("--plot", type=OUTPUT, help="Draw error against time into a PNG.")
@CHECK_OPTION
@TARGET_OPTIONS
@TRUST_OPTION
@ALL_OPTION
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
    every: bool,
    json_to: str | None,
) -> None:
    """What step caching is worth, beside what else the time could buy."""
    from elit_export.bench.cache import SweepResult, check_sweep, sweep
    from elit_export.bundle.reading import Bundle
    from elit_export.cli.tables.bench import sweep_tables
    from elit_export.runtime.opening import unopened

    choices: dict[str, Any] = {"schedule": schedule, "guidance": guidance, "images": images, "fine_steps": fine_steps}

    def measured(plan_set: PlanSet) -> tuple[list[Table], dict[str, object]]:
        check_sweep(unopened(opened, plan_set), **choices)
        with opened_pipeline(opened, plan_set) as pipeline, progress_bar() as progress:
            result = sweep(
                pipeline,
                **choices,
                rounds=rounds,
                on_way=advancing(progress, progress.add_task("", total=None)),
            )
        draw(result)
        return list(sweep_tables(result)), {"cache_sweep": asdict(result)}

    refuse_one_file("--plot", plot, every=every)
    held_to, draw = limits_in(check, {"cache_sweep": SweepResult}), drawer("plot_sweep", plot)
    opened = Bundle.open(bundle, trust=trust)
    measure_each(opened, target, precision, measured, held_to, json_to, every=every)

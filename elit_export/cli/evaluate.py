"""evaluate: measure the quality of samples, for every plan set that can run here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.progress import Progress

from elit_export.cli.common import (
    CHECK_OPTION,
    FOLDER,
    JSON_OPTION,
    NAME,
    TRUST_OPTION,
    Count,
    conclude,
    limits_in,
    progress_bar,
    say_accepted,
)
from elit_export.spec.limits import IMAGES

if TYPE_CHECKING:
    from elit_export.bundle.manifest import PlanSet
    from elit_export.bundle.reading import Bundle
    from elit_export.runtime.pipeline import Pipeline


@click.command()
@click.argument("bundle", type=FOLDER)
@click.option("--images", type=Count(IMAGES), default=512, show_default=True, help="Images of each row.")
@click.option("--guidance", default="cfg:2", show_default=True)
@click.option("--way", "ways", multiple=True, metavar="SAMPLER:STEPS", help="[default: euler:50, ab3:14]")
@click.option("--classifier", type=NAME, metavar="FILE", help="What train-classifier made.  [default: the shipped one]")
@CHECK_OPTION
@click.option("--target", help="Only this one.  [default: all that can run here]")
@click.option("--precision", help="Only this one.  [default: all]")
@TRUST_OPTION
@JSON_OPTION
def evaluate(
    bundle: Path,
    images: int,
    guidance: str,
    ways: tuple[str, ...],
    classifier: str | None,
    check: Path | None,
    target: str | None,
    precision: str | None,
    trust: bool,
    json_to: str | None,
) -> None:
    """Measure the quality of BUNDLE's samples, as a classifier of real images sees it.

    Plan sets take turns, the most precise first; each is open only while it is measured.
    """
    from elit_export.bundle.reading import Bundle
    from elit_export.cli.plan_sets import verified_plan_sets
    from elit_export.cli.tables.bench import quality_table
    from elit_export.evaluate.facts import SHIPPED, load_facts
    from elit_export.evaluate.quality import DEFAULT_CONFIGS, QualityResult, SamplerConfig, check_quality, quality
    from elit_export.runtime.opening import unopened

    limits = limits_in(check, {"quality": QualityResult})
    configs = tuple(SamplerConfig.parse(way) for way in dict.fromkeys(ways)) or DEFAULT_CONFIGS
    facts = load_facts(classifier or SHIPPED)
    opened = Bundle.open(bundle, trust=trust)
    measured, skipped = verified_plan_sets(opened, target, precision)
    for plan_set in measured:  # before any of them is opened
        check_quality(unopened(opened, plan_set), facts, images=images, guidance=guidance, sampler_configs=configs)
        say_accepted(opened, plan_set, json_to=json_to)
    from elit_export.evaluate.evaluator import load_evaluator  # torch, when all of that is right

    evaluator = load_evaluator(classifier or SHIPPED)
    with progress_bar() as progress:
        result = quality(
            opened_in_turn(opened, measured, progress),
            evaluator,
            images=images,
            guidance=guidance,
            sampler_configs=configs,
            seed=0,
            skipped=skipped,
            on_images=lambda what, done, total: progress.update(
                progress.task_ids[-1], description=what, advance=done, total=total
            ),
        )
    conclude([quality_table(result)], {"quality": asdict(result)}, limits, json_to)


def opened_in_turn(bundle: Bundle, plan_sets: Sequence[PlanSet], progress: Progress) -> Iterator[tuple[str, Pipeline]]:
    """Open the plan sets one after the other, each with a progress bar of its own."""
    from elit_export.runtime.pipeline import Pipeline

    for plan_set in plan_sets:
        with Pipeline.of(bundle, plan_set) as pipeline:
            progress.add_task("", total=None)
            yield plan_set.target, pipeline

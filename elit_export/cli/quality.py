"""What `bench --quality` does: judge samples of every plan set that can run here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.progress import Progress
from rich.table import Table

from elit_export.bundle import Bundle
from elit_export.cli.common import progress_bar, say_accepted
from elit_export.manifest import PlanSet
from elit_export.report.measures import quality_table
from elit_export.runtime.opening import check_verified, chosen_plan_set, matching, unfit
from elit_export.runtime.pipeline import Pipeline
from elit_export.spec import Precision
from elit_export.verify.quality import WAYS, Way, evaluations, quality


def bench_quality(
    folder: Path,
    *,
    target: str | None,
    precision: str | None,
    classifier: str | None,
    images: int,
    guidance: str,
    ways: Sequence[str],
    json_to: str | None,
) -> tuple[list[Table], dict[str, Any]]:
    """Plan sets in turn, the most precise first; each is open only while it is measured."""
    from elit_export.judge import SHIPPED, load_judge

    chosen = tuple(Way.parse(way) for way in dict.fromkeys(ways)) or WAYS
    judge = load_judge(classifier or SHIPPED)
    bundle = Bundle.open(folder)
    measured, skipped = able_plan_sets(bundle, target, precision)
    for plan_set in measured:
        say_accepted(bundle, plan_set, json_to=json_to)
    with progress_bar() as progress:
        result = quality(
            opened_in_turn(bundle, measured, progress, images, chosen),
            judge,
            images=images,
            guidance=guidance,
            ways=chosen,
            seed=0,
            skipped=skipped,
            on_images=lambda what, done: progress.update(progress.task_ids[-1], description=what, advance=done),
        )
    return [quality_table(result)], {"quality": asdict(result)}


def able_plan_sets(bundle: Bundle, target: str | None, precision: str | None) -> tuple[list[PlanSet], dict[str, str]]:
    """Those asked for that can run here, and why the others cannot; raises if none can or one was never verified."""
    asked = matching(bundle.manifest.plan_sets, target, precision)
    judged = [(plan_set, unfit(plan_set)) for plan_set in asked]
    able = [plan_set for plan_set, reason in judged if not reason]
    if not able:
        able = [chosen_plan_set(bundle.manifest.plan_sets, target, precision)]  # which says why not, here or in opening
    for plan_set in able:
        check_verified(plan_set, bundle.folder)
    order = list(Precision)
    skipped = {f"{plan_set.target} {plan_set.precision.value}": reason for plan_set, reason in judged if reason}
    return sorted(able, key=lambda plan_set: order.index(plan_set.precision)), skipped


def opened_in_turn(
    bundle: Bundle, plan_sets: Sequence[PlanSet], progress: Progress, images: int, ways: Sequence[Way]
) -> Iterator[tuple[str, Pipeline]]:
    """A pipeline each, with a bar of its own."""
    for plan_set in plan_sets:
        name = plan_set.precision.value
        with Pipeline.load(bundle.folder, target=plan_set.target, precision=name) as pipeline:
            progress.add_task("", total=evaluations(pipeline, images, ways))
            yield plan_set.target, pipeline

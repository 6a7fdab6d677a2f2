"""What the commands of bench share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.progress import Progress, TaskID

from elit_export.cli.common import FOLDER, NAME, Count, finish, say, say_accepted, show
from elit_export.spec import limits

if TYPE_CHECKING:
    from elit_export.bench.limits import Limit
    from elit_export.bundle.manifest import PlanSet
    from elit_export.bundle.reading import Bundle
    from elit_export.cli.tables.layout import Table
    from elit_export.models.elit import Elit
    from elit_export.runtime.pipeline import Pipeline

BUNDLE = click.argument("bundle", type=FOLDER)
CHECKPOINT_OPTION = click.option(
    "--checkpoint", type=NAME, help="Time PyTorch beside the engines, in turn in this process."
)
ROWS_OPTION = click.option(
    "--rows", type=Count(limits.ROWS), default=8, show_default=True, help="Engine rows per call."
)
ROUNDS_OPTION = click.option(
    "--rounds", type=Count(limits.ROUNDS), default=10, show_default=True, help="Measured calls of each, after warm-up."
)
IMAGES_OPTION = click.option(
    "--images", type=Count(limits.IMAGES), default=8, show_default=True, help="Sampled at once."
)
GUIDANCE_OPTION = click.option("--guidance", default="none", show_default=True)


def advancing(progress: Progress, task: TaskID) -> Callable[[str, int], None]:
    """Return a listener for the stages of some work, and how many there are."""
    return lambda stage, total: progress.update(task, description=stage, advance=1, total=total)


def measure_each(
    bundle: Bundle,
    target: str | None,
    precision: str | None,
    measure: Callable[[PlanSet], tuple[Iterable[Table], Any]],
    held_to: Sequence[Limit],
    json_to: str | None,
    *,
    every: bool,
) -> None:
    """Measure the plan set that is meant, or each: show tables, write facts, hold every one of them to the limits.

    The facts of several stand by their names below `plan_sets`.
    """
    from elit_export.bench.limits import misses
    from elit_export.cli.plan_sets import selected_plan_sets

    plan_sets, skipped = selected_plan_sets(bundle, target, precision, every=every)
    for name, reason in skipped.items():
        say(f"{name} not measured: {reason}", json_to=json_to)
    facts, missed = {}, list[str]()
    for plan_set in plan_sets:
        say_accepted(bundle, plan_set, json_to=json_to)
        name = plan_set.name
        if every:
            say(name, json_to=json_to)
        tables, facts[name] = measure(plan_set)
        show(*tables, json_to=json_to)
        missed += [f"{name}: {line}" if every else line for line in misses(held_to, facts[name])]
    finish({"plan_sets": facts} if every else facts[name], missed, json_to)


def opened_pipeline(bundle: Bundle, plan_set: PlanSet) -> Pipeline:
    from elit_export.cli.opened import on_current
    from elit_export.runtime.pipeline import Pipeline

    return on_current(bundle, plan_set, Pipeline.of)


def torch_model(bundle: Bundle, checkpoint: str, interface: Path | None) -> Elit:
    """Return the bundle's model as PyTorch is timed with it: all of it in float32."""
    from elit_export.models.upcast import upcast_whole
    from elit_export.verify.check import model_of

    return upcast_whole(model_of(bundle, checkpoint, interface))


def torch_runners(bundle: Bundle, checkpoint: str, interface: Path | None, *, compiled: bool) -> Mapping[str, Any]:
    from elit_export.verify.reference import torch_engine

    model = torch_model(bundle, checkpoint, interface)
    eager = {"eager": torch_engine(model)}
    return {**eager, "compile": torch_engine(model, compiled=True)} if compiled else eager


def drawer(function: str, plot: Path | None) -> Callable[[Any], None]:
    """Return the function that draws into a file, if one is named; raises at once if matplotlib is not there."""
    if plot is None:
        return lambda _result: None
    from elit_export.report import plots

    plots.check_format(plot)
    return partial(getattr(plots, function), path=plot)

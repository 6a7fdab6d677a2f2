"""What the commands of bench share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.progress import Progress, TaskID

from elit_export.cli.common import FOLDER, NAME, Count, say_accepted
from elit_export.cli.opened import Opened, opened_once
from elit_export.spec import limits

if TYPE_CHECKING:
    from elit_export.bundle.reading import Bundle

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
    """What hears the stages of some work, and how many there are."""
    return lambda stage, total: progress.update(task, description=stage, advance=1, total=total)


def chosen(bundle: Path, target: str | None, precision: str | None, json_to: str | None, *, trust: bool) -> Opened:
    """A plan set with its engines open."""
    opened = opened_once(bundle, target, precision, trust=trust)
    say_accepted(opened.bundle, opened.plan_set, json_to=json_to)
    return opened


def torch_runners(bundle: Bundle, checkpoint: str, interface: Path | None, *, compiled: bool) -> Mapping[str, Any]:
    from elit_export.models.upcast import upcast_whole
    from elit_export.verify.check import model_of
    from elit_export.verify.reference import torch_engine

    model = upcast_whole(model_of(bundle, checkpoint, interface))
    eager = {"eager": torch_engine(model)}
    return {**eager, "compile": torch_engine(model, compiled=True)} if compiled else eager


def drawer(function: str, plot: Path | None) -> Callable[[Any], None]:
    """What draws into a file, if one is named; refuses before anything is measured if matplotlib is not there."""
    if plot is None:
        return lambda _result: None
    from elit_export.report import plots

    plots.check_format(plot)
    return partial(getattr(plots, function), path=plot)

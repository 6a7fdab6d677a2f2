"""bench memory and bench soak: tell what engines hold, now and over many samplings."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from elit_export.cli.bench.options import BUNDLE, chosen
from elit_export.cli.common import (
    CHECK_OPTION,
    JSON_OPTION,
    TARGET_OPTIONS,
    TRUST_OPTION,
    Count,
    conclude,
    progress_bar,
    say_accepted,
)
from elit_export.spec import limits

if TYPE_CHECKING:
    from elit_export.bench.memory import BankMemory
    from elit_export.bundle.manifest import PlanSet
    from elit_export.bundle.reading import Bundle


@click.command()
@BUNDLE
@CHECK_OPTION
@TARGET_OPTIONS
@TRUST_OPTION
@JSON_OPTION
def memory(
    bundle: Path,
    check: Path | None,
    target: str | None,
    precision: str | None,
    trust: bool,
    json_to: str | None,
) -> None:
    """What all engines hold, over what one of them does."""
    from elit_export.bench.limits import load_limits
    from elit_export.bench.memory import bank_memory
    from elit_export.bundle.reading import with_current
    from elit_export.cli.tables.bench import memory_table
    from elit_export.runtime.opening import select_plan_set

    limits = load_limits(check) if check else []

    def measured(opened: Bundle) -> tuple[PlanSet, BankMemory | None]:
        plan_set = select_plan_set(opened.manifest.plan_sets, target, precision)
        say_accepted(opened, plan_set, json_to=json_to)
        return plan_set, bank_memory(opened, plan_set)

    with progress_bar() as progress:
        progress.add_task("opening engines", total=None)
        plan_set, held = with_current(bundle, measured, trust=trust)
    facts = {"plan_bytes": plan_set.model_bytes, **(asdict(held) | {"ratio": held.ratio} if held else {})}
    conclude([memory_table(held, plan_set.model_bytes)], {"memory": facts}, limits, json_to)


@click.command()
@BUNDLE
@click.option(
    "--samplings",
    type=Count(limits.SAMPLINGS),
    default=10_000,
    show_default=True,
    help="Of one image in one or two steps.",
)
@CHECK_OPTION
@TARGET_OPTIONS
@TRUST_OPTION
@JSON_OPTION
def soak(
    bundle: Path,
    samplings: int,
    check: Path | None,
    target: str | None,
    precision: str | None,
    trust: bool,
    json_to: str | None,
) -> None:
    """Memory over many short samplings in one process."""
    from elit_export.bench.limits import load_limits
    from elit_export.bench.soak import soak as soaked
    from elit_export.cli.tables.bench import soak_table

    limits = load_limits(check) if check else []
    with chosen(bundle, target, precision, json_to, trust=trust).pipeline as pipeline, progress_bar() as progress:
        task = progress.add_task("sampling", total=samplings)
        result = soaked(pipeline, samplings=samplings, on_sampling=lambda _: progress.advance(task))
    conclude([soak_table(result)], {"soak": asdict(result)}, limits, json_to)

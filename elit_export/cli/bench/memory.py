"""bench memory and bench soak: tell what engines hold, now and over many samplings."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from elit_export.cli.bench.options import BUNDLE, measure_each, opened_pipeline
from elit_export.cli.common import (
    ALL_OPTION,
    CHECK_OPTION,
    JSON_OPTION,
    TARGET_OPTIONS,
    TRUST_OPTION,
    Count,
    limits_in,
    progress_bar,
)
from elit_export.spec import limits

if TYPE_CHECKING:
    from elit_export.bundle.manifest import PlanSet
    from elit_export.cli.tables.layout import Table

MEMORY_FACTS = {"plan_bytes": int, "whole_bytes": int, "one_bytes": int, "ratio": float}


@click.command()
@BUNDLE
@CHECK_OPTION
@TARGET_OPTIONS
@TRUST_OPTION
@ALL_OPTION
@JSON_OPTION
def memory(
    bundle: Path,
    check: Path | None,
    target: str | None,
    precision: str | None,
    trust: bool,
    every: bool,
    json_to: str | None,
) -> None:
    """What all engines hold, over what one of them does."""
    from elit_export.bench.memory import bank_memory
    from elit_export.bundle.reading import Bundle
    from elit_export.cli.opened import on_current
    from elit_export.cli.tables.bench import memory_table

    def measured(plan_set: PlanSet) -> tuple[list[Table], dict[str, object]]:
        with progress_bar() as progress:
            progress.add_task("opening engines", total=None)
            held = on_current(opened, plan_set, bank_memory)
        facts = {"plan_bytes": plan_set.model_bytes, **(asdict(held) | {"ratio": held.ratio} if held else {})}
        return [memory_table(held, plan_set.model_bytes)], {"memory": facts}

    held_to, opened = limits_in(check, {"memory": MEMORY_FACTS}), Bundle.open(bundle, trust=trust)
    measure_each(opened, target, precision, measured, held_to, json_to, every=every)


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
@ALL_OPTION
@JSON_OPTION
def soak(
    bundle: Path,
    samplings: int,
    check: Path | None,
    target: str | None,
    precision: str | None,
    trust: bool,
    every: bool,
    json_to: str | None,
) -> None:
    """Memory over many short samplings in one process."""
    from elit_export.bench.soak import SoakResult
    from elit_export.bench.soak import soak as soaked
    from elit_export.bundle.reading import Bundle
    from elit_export.cli.tables.bench import soak_table

    def measured(plan_set: PlanSet) -> tuple[list[Table], dict[str, object]]:
        with opened_pipeline(opened, plan_set) as pipeline, progress_bar() as progress:
            task = progress.add_task("sampling", total=samplings)
            result = soaked(pipeline, samplings=samplings, on_sampling=lambda _: progress.advance(task))
        return [soak_table(result)], {"soak": asdict(result)}

    held_to, opened = limits_in(check, {"soak": SoakResult}), Bundle.open(bundle, trust=trust)
    measure_each(opened, target, precision, measured, held_to, json_to, every=every)

"""verify: compare a bundle's engines with PyTorch."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from elit_export.cli.common import (
    ALL_OPTION,
    FOLDER,
    INTERFACE_OPTION,
    JSON_OPTION,
    NAME,
    TRUST_OPTION,
    complain,
    progress_bar,
    refuse_alone,
    say,
    show,
    write_json,
)
from elit_export.cli.tools import naming_the_extra
from elit_export.errors import ElitExportError, InputError

if TYPE_CHECKING:
    from elit_export.bundle.manifest import PlanSet
    from elit_export.bundle.reading import Bundle
    from elit_export.verify.compare import Comparison


@click.command()
@click.argument("bundle", type=FOLDER)
@click.option("--checkpoint", type=NAME, help="Compare with PyTorch live instead of with its stored reference outputs.")
@INTERFACE_OPTION
@click.option("--target", help="Needed if the bundle has several.")
@click.option("--precision", help="Needed if the target has several.")
@TRUST_OPTION
@ALL_OPTION
@click.option("--bisect", is_flag=True, help="After a miss, find where: plan, optimiser, node or graph (needs onnx).")
@click.option(
    "--polygraphy",
    "polygraphy_folder",
    type=FOLDER,
    metavar="DIR",
    help="Write the cases for NVIDIA Polygraphy and print the lines that run them, in place of comparing.",
)
@JSON_OPTION
def verify(
    bundle: Path,
    checkpoint: str | None,
    interface: Path | None,
    target: str | None,
    precision: str | None,
    trust: bool,
    every: bool,
    bisect: bool,
    polygraphy_folder: Path | None,
    json_to: str | None,
) -> None:
    """Compare BUNDLE's engines with PyTorch: every profile at its corners, and whole trajectories.

    Ends with status 1 if anything misses its tolerance. Without --checkpoint neither torch nor the
    checkpoint is needed.
    """
    from elit_export.bundle.reading import Bundle
    from elit_export.cli.plan_sets import selected_plan_sets

    refuse_alone(interface, checkpoint)
    opened = Bundle.open(bundle, trust=trust)
    if polygraphy_folder:
        from elit_export.runtime.opening import select_plan_set

        refuse_beside_polygraphy({"--checkpoint": checkpoint, "--bisect": bisect or None, "--all": every or None})
        plan_set = select_plan_set(opened.manifest.plan_sets, target, precision)
        write_for_polygraphy(opened, plan_set, polygraphy_folder, json_to)
        return
    facts = {}
    plan_sets, skipped = selected_plan_sets(opened, target, precision, every=every)
    for name, reason in skipped.items():
        say(f"{name} not verified: {reason}", json_to=json_to)
    for plan_set in plan_sets:
        comparisons = verified(opened, plan_set, checkpoint, interface, bisect=bisect, json_to=json_to)
        facts[plan_set.name] = [asdict(comparison) | {"passed": comparison.passed} for comparison in comparisons]
    write_json({"plan_sets": facts} if every else next(iter(facts.values())), json_to)
    if not all(comparison["passed"] for comparisons in facts.values() for comparison in comparisons):
        raise SystemExit(1)


def verified(
    opened: Bundle,
    asked: PlanSet,
    checkpoint: str | None,
    interface: Path | None,
    *,
    bisect: bool,
    json_to: str | None,
) -> list[Comparison]:
    """Compare one plan set, and show and say what came of it; a first success is recorded in the bundle."""
    from elit_export.cli.opened import on_current
    from elit_export.cli.tables.inspect import parity_tables
    from elit_export.verify.check import check_success_recordable, record_success, verify_plan_set
    from elit_export.verify.compare import verdict_of
    from elit_export.verify.parity import comparison_count

    def compared(bundle: Bundle, plan_set: PlanSet) -> tuple[Bundle, PlanSet, list[Comparison]]:
        progress.reset(task, total=comparison_count(plan_set))
        check_success_recordable(bundle, plan_set)
        comparisons = verify_plan_set(
            bundle,
            plan_set,
            checkpoint=checkpoint,
            interface=interface,
            on_comparison=lambda _: progress.advance(task),
        )
        return bundle, plan_set, comparisons

    with progress_bar() as progress:
        task = progress.add_task(f"verifying {asked.name}", total=None)
        bundle, plan_set, comparisons = on_current(opened, asked, compared)
    show(*parity_tables(comparisons), json_to=json_to)
    missed = [comparison for comparison in comparisons if not comparison.passed]
    if any(not comparison.met for comparison in comparisons) and plan_set.accepted:
        say(f"below tolerance, accepted by the recipe: {plan_set.accepted}", json_to=json_to)
    for comparison in missed:
        complain(comparison.verdict)
    if missed and bisect:
        say_first_departure(bundle, plan_set, missed[0])
    if not missed and record_success(bundle, plan_set, comparisons):
        say(f"recorded in {bundle.folder}: target {plan_set.target} may be opened on this device", json_to=json_to)
    say(f"{plan_set.name}: {verdict_of(comparisons)}", json_to=json_to)
    return comparisons


def say_first_departure(bundle: Bundle, plan_set: PlanSet, missed: Comparison) -> None:
    """Bisect at the case that missed, or for a trajectory at the first case. A miss stays one if that fails."""
    try:
        with naming_the_extra("this"):
            from elit_export.verify.bisect import bisect

            complain(str(bisect(bundle, plan_set, case=missed.case or 0)))
    except (ElitExportError, OSError) as error:
        complain(f"cannot bisect: {error}")


def refuse_beside_polygraphy(options: Mapping[str, object]) -> None:
    """Raise InputError for options of a comparison that is not made."""
    if meant := [name for name, value in options.items() if value is not None]:
        raise InputError(
            f"{meant[0]}: --polygraphy writes the reference outputs and compares nothing", "leave one of them out"
        )


def write_for_polygraphy(bundle: Bundle, plan_set: PlanSet, folder: Path, json_to: str | None) -> None:
    """Write the cases, and print each line on its own, so that it can be copied."""
    from elit_export.verify.polygraphy import COMMANDS, write_polygraphy

    commands = write_polygraphy(bundle, plan_set, folder)
    for command in commands:
        say(f"# {command.about}", json_to=json_to)
        say(command.line, json_to=json_to)
    write_json([asdict(command) for command in commands], json_to)
    say(f"wrote {folder}; next: sh {shlex.quote(str(folder / COMMANDS))}", json_to=json_to)

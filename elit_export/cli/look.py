"""Commands that show what is there and whether it holds: inspect, verify, bench, doctor."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click
from rich.markup import escape

from elit_export.bundle import Bundle
from elit_export.cli.common import FOLDER, JSON_OPTION, architecture_options, console, progress_bar, write_json
from elit_export.report.tables import inspection_tables, parity_tables, table
from elit_export.runtime.pipeline import Pipeline, chosen_plan_set


@click.command()
@click.argument("path")
@architecture_options
@JSON_OPTION
def inspect(path: str, json_to: str | None, **numbers: int | None) -> None:
    """Show what a checkpoint or a bundle holds: shapes, budgets with FLOPs, profiles, plans, versions."""
    from elit_export.report.inspection import inspect_path

    facts = inspect_path(path, **numbers)
    if json_to == "-":
        write_json(facts, json_to)
        return
    for made in inspection_tables(facts):
        console.print(made)
    if json_to:
        write_json(facts, json_to)


# ---------------------------------------------------------------- verify


@click.command()
@click.argument("bundle", type=FOLDER)
@click.option("--checkpoint", help="Compare with PyTorch live instead of with its stored answers.")
@click.option("--target", help="Needed if the bundle has several.")
@click.option("--precision", help="Needed if the target has several.")
@JSON_OPTION
def verify(
    bundle: Path, checkpoint: str | None, target: str | None, precision: str | None, json_to: str | None
) -> None:
    """Compare BUNDLE's engines with PyTorch: every profile at its corners, and whole trajectories.

    Ends with status 1 if anything misses its tolerance. Without --checkpoint neither torch nor the
    checkpoint is needed.
    """
    from elit_export.verify.check import record_success, verify_plan_set
    from elit_export.verify.parity import comparisons_of

    opened = Bundle.open(bundle)
    plan_set = chosen_plan_set(opened.manifest.plan_sets, target, precision)
    with progress_bar() as progress:
        task = progress.add_task("verifying", total=comparisons_of(plan_set))
        found = verify_plan_set(opened, plan_set, checkpoint=checkpoint, on_comparison=lambda _: progress.advance(task))
    if json_to:
        write_json([asdict(comparison) | {"passed": comparison.passed} for comparison in found], json_to)
    if json_to != "-":
        for made in parity_tables(found):
            console.print(made)
    missed = [comparison for comparison in found if not comparison.passed]
    for comparison in missed:
        click.echo(comparison.verdict, err=True)
    if missed:
        raise SystemExit(1)
    if record_success(opened, plan_set, found):
        console.print(f"recorded in {bundle}: target {plan_set.target} may be opened on this device")


# ---------------------------------------------------------------- bench


@click.command()
@click.argument("bundle", type=FOLDER)
@click.option("--images", default=20, show_default=True, help="How many, over all classes in turn.")
@click.option("--schedule", default="full", show_default=True)
@click.option("--guidance", default="none", show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--target", help="Needed if the bundle has several.")
@JSON_OPTION
def bench(
    bundle: Path, images: int, schedule: str, guidance: str, seed: int, target: str | None, json_to: str | None
) -> None:
    """Measure how far each sampler is from the exact solution of BUNDLE's model, at equal numbers of calls."""
    from elit_export.verify.solvers import COMPARED, FINE_STEPS, solver_errors

    with Pipeline.load(bundle, target=target) as pipeline, progress_bar() as progress:
        labels = [image % pipeline.spec.num_classes for image in range(images)]
        errors = solver_errors(pipeline, labels, schedule=schedule, guidance=guidance, seed=seed)
        found = list(progress.track(errors, total=len(COMPARED), description="sampling"))
    console.print(
        table(
            f"{images} samples, schedule {schedule}, guidance {guidance}, against Heun at {FINE_STEPS} steps",
            ("sampler", "steps", "calls", "SQNR dB"),
            [(error.sampler, str(error.steps), str(error.calls), f"{error.sqnr_db:.1f}") for error in found],
        )
    )
    if json_to:
        write_json([asdict(error) for error in found], json_to)


# ---------------------------------------------------------------- doctor


@click.command()
@JSON_OPTION
def doctor(json_to: str | None) -> None:
    """Show which backends and tools work on this machine, which do not, why, and what to type."""
    from elit_export.doctor import findings

    found = list(findings())
    if json_to:
        write_json([asdict(finding) | {"works": finding.works} for finding in found], json_to)
    if json_to != "-":
        rows = [(f.what, f.detail, "works" if f.works else f.problem, escape(f.remedy)) for f in found]
        console.print(table("this machine", ("what", "detail", "state", "what to do"), rows))

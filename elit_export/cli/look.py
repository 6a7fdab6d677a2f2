"""Commands that show what is there: inspect, bench."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from elit_export.cli.common import FOLDER, JSON_OPTION, architecture_options, console, progress_bar, write_json
from elit_export.report.tables import inspection_tables, table
from elit_export.runtime.pipeline import Pipeline


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

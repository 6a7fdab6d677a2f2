"""Commands that measure a bundle's engines for what later runs and builds decide by: calibrate."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from elit_export.cli.calibrate_solver import solver
from elit_export.cli.common import (
    FILE,
    FOLDER,
    JSON_OPTION,
    OUTPUT,
    TRUST_OPTION,
    Count,
    progress_bar,
    say,
    show,
    write_json,
)
from elit_export.cli.opened import opened_once
from elit_export.cli.prompts import EMBEDDED, prompts_in
from elit_export.errors import BundleError
from elit_export.runtime.options import SamplingOptions
from elit_export.spec import QUANTIZED, STEP, Precision, limits

if TYPE_CHECKING:
    from elit_export.bundle.manifest import CacheCalibration
    from elit_export.bundle.reading import Bundle


@click.group()
def calibrate() -> None:
    """Measure a bundle's engines along real trajectories: for solvers, the step cache and quantization."""


@calibrate.command("cache")
@click.argument("bundle", type=FOLDER)
@click.option(
    "--images",
    type=Count(limits.TRAJECTORIES),
    default=64,
    show_default=True,
    help="Seeds, each with a label of its own.",
)
@click.option(
    "--steps", type=Count(limits.STEPS), multiple=True, default=(10, 25, 60), show_default=True, help="May be repeated."
)
@click.option("--budget", "budgets", multiple=True, help="May be repeated.  [default: the named ones that are covered]")
@click.option("--guidance", multiple=True, default=("cfg:2",), show_default=True, help="none or cfg; may be repeated.")
@click.option("--seed", default=SamplingOptions.seed, show_default=True)
@click.option("--rows", type=Count(limits.ROWS), default=4, show_default=True, help="At most so many images at once.")
@click.option("--plot", type=OUTPUT, help="Draw the pairs and the fit into a PNG.")
@click.option("--target", help="Needed if the bundle has several.")
@click.option("--precision", help="Needed if the target has several.")
@TRUST_OPTION
@JSON_OPTION
def calibrate_cache(
    bundle: Path,
    images: int,
    steps: tuple[int, ...],
    budgets: tuple[str, ...],
    guidance: tuple[str, ...],
    seed: int,
    rows: int,
    plot: Path | None,
    target: str | None,
    precision: str | None,
    trust: bool,
    json_to: str | None,
) -> None:
    """Fit how far the change of the input tells the change of the residual, for the cache policy teacache."""
    from elit_export.bundle.store import check_recordable
    from elit_export.calibrate.step_cache import (
        Trajectories,
        batch_count,
        joined,
        make_calibration,
        record,
        sample_pairs,
    )
    from elit_export.cli.advice import sample_command
    from elit_export.cli.tables.inspect import calibration_table

    if plot is not None:  # before anything is measured, as it needs matplotlib
        from elit_export.report.plots import check_format, plot_calibration

        check_format(plot)
    opened = opened_once(bundle, target, precision, trust=trust)
    with opened.pipeline as pipeline, progress_bar() as progress:
        check_recordable(opened.bundle.folder)
        covered = [budget for budget in pipeline.spec.named_budgets.values() if budget in pipeline.coverage.covered]
        selected = tuple(pipeline.spec.budget(budget) for budget in budgets) or tuple(covered)
        trajectories = Trajectories(images, steps, selected, guidance, seed, rows)
        total = batch_count(pipeline, trajectories)
        parts = progress.track(sample_pairs(pipeline, trajectories), total=total, description="trajectories")
        pairs = joined(list(parts))
    calibration = make_calibration(pairs, trajectories, opened.bundle.manifest.model.checkpoint_sha256)
    record(opened.bundle, calibration)
    if plot is not None:
        plot_calibration(pairs, calibration, plot)
    show(calibration_table(calibration), json_to=json_to)
    write_json(calibration.model_dump(mode="json"), json_to)
    policy, reason = advised(calibration)
    if reason:
        say(reason, json_to=json_to)
    advice = sample_command(bundle, opened.bundle.manifest, opened.plan_set, "--cache", policy)
    say(f"wrote it into {bundle}; next: {advice}", json_to=json_to)


def advised(calibration: CacheCalibration) -> tuple[str, str]:
    """A policy to try, and why not `teacache`: at equal steps the residual may change less where inputs do more."""
    if min(fit.rank_same_steps for fit in calibration.fits) > 0:
        return "teacache:0.2", ""
    return "static:every@2", "teacache would reuse where the blocks change most: see rank"


@calibrate.command("samples")
@click.argument("bundle", type=FOLDER)
@click.option("--recipe", type=FILE, help="Which trajectories, and how many samples of them; calibration/ has some.")
@click.option(
    "--rows", type=Count(limits.ROWS), help="At most so many images at once.  [default: the recipe's, 5 without one]"
)
@EMBEDDED
@click.option("--out", type=OUTPUT, required=True, help="Where to write them, as .npz.")
@click.option("--target", help="Needed if the bundle has several.")
@click.option("--precision", help="Needed if the target has several.")
@TRUST_OPTION
@JSON_OPTION
def calibrate_samples(
    bundle: Path,
    recipe: Path | None,
    rows: int | None,
    file: Path | None,
    out: Path,
    target: str | None,
    precision: str | None,
    trust: bool,
    json_to: str | None,
) -> None:
    """Take inputs of the engines along trajectories, on which int8 and fp8 builds are calibrated.

    A model that takes text is shown the prompts of a file, one after another, as others are their classes.
    """
    from elit_export.bundle.calibration_inputs import save_inputs
    from elit_export.calibrate.inputs import (
        DEFAULT_RECIPE,
        batch_count,
        load_sample_recipe,
        recorded_rows,
        select_samples,
    )
    from elit_export.cli.tables.calibration import samples_facts, samples_table

    sample_recipe = load_sample_recipe(recipe) if recipe else DEFAULT_RECIPE
    sample_recipe = sample_recipe.model_copy(update={"rows": rows}) if rows else sample_recipe
    opened = opened_once(bundle, target, precision, trust=trust)
    model = opened.bundle.manifest.model
    with opened.pipeline as pipeline, progress_bar() as progress:
        prompts = prompts_in(file, model.spec)
        total = batch_count(pipeline, sample_recipe, prompts)
        recorded = recorded_rows(pipeline, sample_recipe, prompts)
        parts = list(progress.track(recorded, total=total, description="trajectories"))
        selected = select_samples(parts, pipeline, sample_recipe, model.checkpoint_sha256)
    save_inputs(selected.samples, out)
    show(samples_table(selected), json_to=json_to)
    write_json(samples_facts(selected), json_to)
    advice = f"elit-export build RECIPE --target TARGET --samples {shlex.quote(str(out))}"
    say(f"wrote {out}; next: {advice}", json_to=json_to)


@calibrate.command("sensitivity")
@click.argument("bundle", type=FOLDER)
@click.option("--samples", "samples_file", type=FILE, required=True, help="Made by `calibrate samples`.")
@EMBEDDED
@click.option("--precision", type=click.Choice([precision.value for precision in QUANTIZED]), required=True)
@JSON_OPTION
def calibrate_sensitivity(
    bundle: Path, samples_file: Path, file: Path | None, precision: str, json_to: str | None
) -> None:
    """Quantize one kind of layer at a time for TensorRT, and compare with float32 on other trajectories.

    Those of a model that takes text show the prompts of a file.
    """
    from elit_export.bundle.calibration_inputs import load_inputs
    from elit_export.bundle.reading import Bundle
    from elit_export.cli.tables.calibration import sensitivity_facts, sensitivity_table

    opened = Bundle.open(bundle)
    model, graph = opened.manifest.model, stored_graph(opened)
    prompts, samples = prompts_in(file, model.spec), load_inputs(samples_file, model.spec, model.checkpoint_sha256)
    from elit_export.calibrate.sensitivity import sensitivities, sensitivity_count  # torch, when the files are right

    with progress_bar() as progress:
        measured = sensitivities(graph, model.spec, model.data, Precision(precision), samples, prompts)
        total = sensitivity_count(model.spec)
        rows = list(progress.track(measured, total=total, description=f"layers in {precision}"))
    show(sensitivity_table(rows, precision), json_to=json_to)
    write_json(sensitivity_facts(rows, precision, samples.sha256), json_to)


def stored_graph(bundle: Bundle) -> Path:
    """The float32 graph `step` of a bundle; raises BundleError if it is not there."""
    name = f"{STEP}-{Precision.FP32.value}"
    graph = bundle.manifest.graphs.get(name)
    if graph is None:
        raise BundleError(
            f"{bundle.folder} has no graph {name}",
            f"build a target with precision fp32 into it: "
            f"elit-export build RECIPE --target TARGET --out {bundle.folder}",
        )
    return bundle.verified(graph.artifact) / graph.file


calibrate.add_command(solver)

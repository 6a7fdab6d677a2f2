"""Draws plots of results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from elit_export.bench.cache import CONTROLS, REFERENCE, SweepResult
from elit_export.bench.engines import BenchResult
from elit_export.bundle.atomic import atomic_write
from elit_export.bundle.manifest import CacheCalibration
from elit_export.calibrate.step_cache import Pairs
from elit_export.errors import InputError
from elit_export.spec import SolverError
from elit_export.tune.result import FOUND, TunedRow, TuneResult

MAX_POINTS = 4000  # of a scatter plot: more would hide each other


def plot_bench(result: BenchResult, path: Path) -> None:
    """Plot latency and error against budget, side by side."""
    largest = result.budgets[0].name
    with_samples = [budget for budget in result.budgets if budget.sample_sqnr_db is not None]
    figure = Figure(figsize=(9 if with_samples else 4.5, 3.6), layout="constrained")
    latency, *rest = figure.subplots(1, 2 if with_samples else 1, squeeze=False)[0]
    shares = [budget.flops_over_largest for budget in result.budgets]
    for name in result.budgets[0].timings:
        medians = [budget.timings[name].median_ms / result.rows for budget in result.budgets]
        latency.plot(shares, medians, marker="o", label=name)
    latency.set(xlabel=f"FLOPs of one forward pass, {largest} = 1", ylabel="ms per image", ylim=(0, None))
    latency.set_title(f"one call of {result.rows} rows")
    latency.legend()
    for error in rest:
        points = [(share, budget.sample_sqnr_db) for share, budget in zip(shares, result.budgets, strict=True)]
        error.plot(*zip(*points, strict=True), marker="o", color="tab:red")
        error.set(xlabel=f"FLOPs of one forward pass, {largest} = 1", ylabel="SQNR in dB")
        error.set_title(f"final images against the reference solution at {largest}")
        for point, budget in zip(points, result.budgets, strict=True):
            error.annotate(budget.budget, point, textcoords="offset points", xytext=(4, 4))
    _save(figure, path)


def plot_sweep(result: SweepResult, path: Path) -> None:
    """Plot error against engine time; controls are lines."""
    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    axes = figure.subplots()
    (reference,) = (row for row in result.rows if row.family == REFERENCE)
    for family in dict.fromkeys(row.family for row in result.rows):
        rows = [row for row in result.rows if row.family == family]
        points = sorted((row.engine_ms_per_image / reference.engine_ms_per_image, row.sqnr_db) for row in rows)
        line, marker = ("-", ".") if family in CONTROLS else ("", "x")
        axes.plot(*zip(*points, strict=True), linestyle=line, marker=marker, label=family)
    axes.set(xscale="log", xlabel="engine time, 50 Euler steps = 1", ylabel="SQNR in dB")
    axes.set_title(f"{result.schedule}, guidance {result.guidance}")
    axes.legend(fontsize="small")
    _save(figure, path)


def plot_calibration(pairs: Pairs, calibration: CacheCalibration, path: Path) -> None:
    """Plot the change of the residual against the distance of the signal, and the fits over their ranges."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for steps in calibration.steps:
        selected = pairs.where(pairs.steps == steps)
        subset = np.random.default_rng(0).permutation(len(selected))[:MAX_POINTS]
        axes.scatter(selected.distance[subset], selected.change[subset], s=2, alpha=0.3, label=f"{steps} steps")
    for facts in calibration.fits:
        fit, label = facts.fit, "fit" if facts.kept is None else f"fit of budget {facts.kept}"
        distance = np.linspace(fit.low, fit.high, 200)
        axes.plot(distance, np.polynomial.polynomial.polyval(distance, fit.coefficients), color="black", label=label)
    axes.set(xlabel="distance measured by the probe", ylabel="relative change of the residual", xlim=(0, None))
    axes.legend(markerscale=4)
    _save(figure, path)


def plot_solvers(solvers: Sequence[SolverError], compared: Sequence[SolverError], path: Path) -> None:
    """Plot the error of all images and of the worst against calls, of tables and of samplers without calibration."""
    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    axes = figure.subplots()
    *others, euler = compared
    lines = {"solver tables": list(solvers)} | {name: [] for name in dict.fromkeys(each.sampler for each in others)}
    for error in others:
        lines[error.sampler].append(error)
    for number, (name, errors) in enumerate(lines.items()):
        points = sorted((error.calls, error.pooled_db, error.worst_db) for error in errors)
        calls, pooled, worst = zip(*points, strict=True)
        axes.plot(calls, pooled, marker=".", color=f"C{number}", label=name)
        axes.plot(calls, worst, marker=".", color=f"C{number}", linestyle=":")
    axes.axhline(euler.pooled_db, color="black", linewidth=0.8, label=f"euler, {euler.calls} calls")
    axes.axhline(euler.worst_db, color="black", linewidth=0.8, linestyle=":")
    axes.set(xlabel="calls", ylabel="SQNR in dB; dotted: the worst image", title="images that nothing was fitted to")
    axes.legend(fontsize="small")
    _save(figure, path)


def plot_tune(result: TuneResult, path: Path) -> None:
    """Plot quality against time: controls are lines by family, what a search found is crosses, presets have names."""
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    rows = [(row, value) for row in result.found if (value := _quality(row, result)) is not None]
    for family in dict.fromkeys(row.family for row, _ in rows):
        points = sorted((row.ms, value) for row, value in rows if row.family == family)
        line, marker = ("", "x") if family == FOUND else ("-", ".")
        axes.plot(*zip(*points, strict=True), linestyle=line, marker=marker, label=family)
    front = [(row.ms, value) for row, value in rows if row.on_front]
    axes.plot(*zip(*front, strict=True), linestyle=":", color="black", label="Pareto front")
    for row, value in rows:
        names = [preset.name for preset in result.presets if (preset.row, preset.plan_set) == (row.name, row.plan_set)]
        axes.annotate(", ".join(names), (row.ms, value), textcoords="offset points", xytext=(4, 6))
    quality = "Fréchet distance, less is better" if result.evaluator else "dB to the reference solution"
    axes.set(xscale="log", xlabel=f"ms of one sampling, {result.rows} images at once", ylabel=quality)
    axes.set_title(f"target: {result.target}; guidance {result.guidance}")
    axes.legend(fontsize="small")
    _save(figure, path)


def _quality(row: TunedRow, result: TuneResult) -> float | None:
    return row.distance if result.evaluator else row.sqnr_db


def check_format(path: Path) -> None:
    """Raise InputError for a suffix that names no format, before what is to be drawn is measured."""
    known = Figure().canvas.get_supported_filetypes()
    if _format(path) not in known:
        raise InputError(f"--plot {path}: no pictures are written as {path.suffix}", "use .png, .svg or .pdf")


def _save(figure: Figure, path: Path) -> None:
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        figure.savefig(file, dpi=110, format=_format(path))


def _format(path: Path) -> str:
    """Return the format that the suffix names, PNG for a name without one."""
    return path.suffix[1:].lower() or "png"

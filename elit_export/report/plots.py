"""Results → pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from elit_export.bench.cache import CONTROLS, REFERENCE, SweepResult
from elit_export.bench.engines import BenchResult
from elit_export.bundle.atomic import atomic_write
from elit_export.bundle.manifest import CacheCalibration
from elit_export.calibrate.step_cache import Pairs


def plot_bench(result: BenchResult, path: Path) -> None:
    """Latency and error against budget, side by side."""
    largest = result.budgets[0].name
    sampled = [budget for budget in result.budgets if budget.sample_sqnr_db is not None]
    figure = Figure(figsize=(9 if sampled else 4.5, 3.6), layout="constrained")
    latency, *rest = figure.subplots(1, 2 if sampled else 1, squeeze=False)[0]
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
        error.set_title(f"final images against a fine solution at {largest}")
        for point, budget in zip(points, result.budgets, strict=True):
            error.annotate(budget.budget, point, textcoords="offset points", xytext=(4, 4))
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=110)


def plot_sweep(result: SweepResult, path: Path) -> None:
    """Error against engine time; controls are lines."""
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
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=110)


POINTS = 4000  # of a scatter: more of them hide each other


def plot_calibration(pairs: Pairs, calibration: CacheCalibration, path: Path) -> None:
    """Change of the residual against distance of the signal, and the fits over their ranges."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for steps in calibration.steps:
        chosen = pairs.where(pairs.steps == steps)
        thin = np.random.default_rng(0).permutation(len(chosen))[:POINTS]
        axes.scatter(chosen.distance[thin], chosen.change[thin], s=2, alpha=0.3, label=f"{steps} steps")
    for facts in calibration.fits:
        reach = np.linspace(facts.fit.low, facts.fit.high, 200)
        label = "fit" if facts.kept is None else f"fit of budget {facts.kept}"
        axes.plot(reach, np.polynomial.polynomial.polyval(reach, facts.fit.coefficients), color="black", label=label)
    axes.set(xlabel="distance that the probe measures", ylabel="relative change of the residual", xlim=(0, None))
    axes.legend(markerscale=4)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=110)

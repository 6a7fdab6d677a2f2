"""Results → pictures.

Takes: bench results.  Gives: PNG files.  May touch: the file it is told to write.
Needs matplotlib, from the first line on: import this before measuring for minutes what it is to draw.
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from elit_export.files import written_whole
from elit_export.verify.bench import BenchResult


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
    with written_whole(path) as temporary:
        figure.savefig(temporary, dpi=110)

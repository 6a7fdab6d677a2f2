"""Results → pictures.

Takes: bench results.  Gives: PNG files.  May touch: the file it is told to write.
"""

from __future__ import annotations

from pathlib import Path

from elit_export.files import written_whole
from elit_export.verify.bench import ENGINE, BenchResult


def plot_bench(result: BenchResult, path: Path) -> None:
    """Latency and error against budget, side by side; needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    latency, error = figure.subplots(1, 2)
    shares = [budget.cost.total / result.budgets[0].cost.total for budget in result.budgets]
    for name in result.budgets[0].timings:
        medians = [budget.timings[name].median_ms / result.rows for budget in result.budgets]
        latency.plot(shares, medians, marker="o", label=name)
    latency.set(xlabel="FLOPs of one forward pass, full = 1", ylabel="ms per image", ylim=(0, None))
    latency.set_title(f"one call of {result.rows} rows")
    latency.legend()
    error.plot(shares, [budget.sample_sqnr_db for budget in result.budgets], marker="o", color="tab:red")
    error.set(xlabel="FLOPs of one forward pass, full = 1", ylabel="SQNR in dB")
    error.set_title("final images against a fine solution at full")
    for share, budget in zip(shares, result.budgets, strict=True):
        error.annotate(budget.budget, (share, budget.sample_sqnr_db), textcoords="offset points", xytext=(4, 4))
    assert ENGINE in result.budgets[0].timings
    with written_whole(path) as temporary:
        figure.savefig(temporary, dpi=110)

"""Facts → tables for people.

Takes: plain facts.  Gives: rich tables.  May touch: nothing; prints nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Table

from elit_export.verify.parity import Comparison

Facts = dict[str, Any]
UNITS = ("B", "kB", "MB", "GB")


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """First column to the left, the others to the right."""
    made = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        made.add_row(*row)
    return made


def size(size_bytes: float) -> str:
    for unit in UNITS[:-1]:
        if size_bytes < 1000:
            return f"{size_bytes:.3g} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.3g} {UNITS[-1]}"


def inspection_tables(facts: Facts) -> Iterator[Table]:
    """All tables of `inspect`."""
    yield table("model", ("fact", "value"), list(_model_rows(facts)))
    yield table(
        "budgets (one forward pass of one image)",
        ("name", "budget", "GFLOP", "of full"),
        [_budget_row(budget) for budget in facts["budgets"]],
    )
    for plan_set in facts.get("plan_sets", ()):
        yield _plan_set_table(plan_set)


def _model_rows(facts: Facts) -> Iterator[tuple[str, str]]:
    for name in ("kind", "name", "file", "parameters", "package_version", "checkpoint_sha256"):
        if name in facts:
            yield name, str(facts[name])
    if "size_bytes" in facts:
        yield "size", size(facts["size_bytes"])
    for name, size_bytes in facts.get("graphs", {}).items():
        yield f"graph {name}", size(size_bytes)
    for group in ("spec", "shapes"):
        for name, value in facts[group].items():
            yield name, str(value)
    data = facts["data"]
    yield "data", f"pixels {data['low']:g}..{data['high']:g}" if data["kind"] == "pixels" else f"VAE {data['vae']}"


def _budget_row(budget: Facts) -> tuple[str, str, str, str]:
    return budget["name"], budget["budget"], f"{budget['flops'] / 1e9:.4g}", f"{budget['share_of_full']:.1%}"


def _plan_set_table(plan_set: Facts) -> Table:
    libraries = ", ".join(f"{name} {version}" for name, version in plan_set["versions"].items())
    plans = ", ".join(f"{name} {size(size_bytes)}" for name, size_bytes in plan_set["plans"].items())
    made = table(
        f"target {plan_set['target']}: {plan_set['backend']} on {plan_set['device']}, {plan_set['precision']}, "
        f"budgets {plan_set['covered']}",
        ("profile", "latents", "rows", "parity with PyTorch"),
        [
            (profile["name"], profile["latents"], profile["rows"], parity_text(profile["parity"]))
            for profile in plan_set["profiles"]
        ],
    )
    made.caption = f"built with {libraries}; plans: {plans}"
    return made


def parity_text(parity: Facts) -> str:
    if parity["status"] != "passed":
        return f"{parity['status']} ({parity['reason']})"
    return f"{parity['sqnr_db']:.0f} dB, max error {parity['max_relative']:.1e}"


# ---------------------------------------------------------------- parity


def parity_tables(found: Sequence[Comparison]) -> Iterator[Table]:
    """Single steps in one table, trajectories in another."""
    steps = [comparison for comparison in found if comparison.part.startswith("profile")]
    states = [comparison for comparison in found if comparison.part.startswith("trajectory")]
    for title, rows in (("one step against PyTorch", steps), ("trajectories against PyTorch", states)):
        columns = ("part", "point", "max abs", "relative", "cosine", "SQNR dB", "needed", "margin")
        yield table(title, columns, [_parity_row(comparison) for comparison in rows])


def _parity_row(comparison: Comparison) -> tuple[str, ...]:
    found = comparison.found
    return (
        comparison.part,
        comparison.point,
        f"{found.max_abs:.1e}",
        f"{found.max_relative:.1e}",
        f"{found.cosine:.9f}",
        f"{found.sqnr_db:.1f}",
        f"{comparison.least_db:g}",
        f"{comparison.margin_db:+.1f}" if comparison.passed else f"[red]{comparison.margin_db:+.1f}[/red]",
    )

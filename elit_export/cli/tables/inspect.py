"""What a bundle or a checkpoint holds → tables for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from elit_export.cli.tables.layout import Table, size, table
from elit_export.cli.tables.presets import preset_tables, solver_tables
from elit_export.spec import by_channel_text

if TYPE_CHECKING:
    from elit_export.bundle.manifest import CacheCalibration
    from elit_export.verify.compare import Comparison

Facts = dict[str, Any]


def inspection_tables(facts: Facts) -> Iterator[Table]:
    """All tables of `inspect`."""
    if "spec" not in facts:
        yield from file_tables(facts)
        return
    yield table("model", ("fact", "value"), list(_model_rows(facts)))
    text = f" and {facts['text_tokens']} text tokens" if facts["text_tokens"] else ""
    yield table(
        f"budgets (one forward pass of one image{text})",
        ("name", "budget", "GFLOP", "of full"),
        [_budget_row(budget) for budget in facts["budgets"]],
        [f"without Read and Write: {facts['flops_without_interface'] / 1e9:.4g} GFLOP"],
    )
    for plan_set in facts.get("plan_sets", ()):
        yield from plan_set_tables(plan_set)
    if calibration := facts.get("cache_calibration"):
        from elit_export.bundle.manifest import CacheCalibration

        yield calibration_table(CacheCalibration.model_validate(calibration))
    yield from solver_tables(facts.get("solvers", ()))
    yield from preset_tables(facts.get("presets", ()))


def file_tables(facts: Facts) -> Iterator[Table]:
    """Show what is not a model: its facts, a table for each list of rows in them, and a model that lies beside it."""
    lists = {name: value for name, value in facts.items() if isinstance(value, list) and value}
    plain = {name: value for name, value in facts.items() if not isinstance(value, list | dict)}
    yield table(facts["kind"], ("fact", "value"), list(_fact_rows(plain)))
    if about := list(_fact_rows(facts.get("about", {}))):
        yield table("what the file says of itself", ("fact", "value"), about)
    for name, rows in lists.items():
        columns = list(rows[0]) if isinstance(rows[0], dict) else [name]
        cells = [[str(row[column]) for column in columns] if isinstance(row, dict) else [str(row)] for row in rows]
        yield table(name.replace("_", " "), columns, cells)
    if model := facts.get("model"):
        yield from inspection_tables(model)


def _fact_rows(facts: Facts) -> Iterator[tuple[str, str]]:
    """Leave out facts that are not there; a zero is there, as that of a seed."""
    for name, value in facts.items():
        if value is not None and value != "":
            yield name, size(value) if name == "size_bytes" and isinstance(value, int) else str(value)


def plan_set_tables(plan_set: Facts) -> Iterator[Table]:
    yield _plan_set_table(plan_set)
    if decoder := plan_set["decoder"]:
        yield _decoder_table(plan_set["target"], decoder)


def _model_rows(facts: Facts) -> Iterator[tuple[str, str]]:
    for name in ("kind", "name", "file", "parameters", "package_version", "checkpoint_sha256"):
        if name in facts:
            yield name, str(facts[name])
    if "size_bytes" in facts:
        yield "size", size(facts["size_bytes"])
    for name, graph in facts.get("graphs", {}).items():
        error = "" if graph["sqnr_db"] is None else f", {graph['sqnr_db']:.0f} dB to PyTorch in ONNX Runtime"
        yield f"graph {name}", f"{size(graph['size_bytes'])}{error}"
    for group in ("spec", "shapes"):
        for name, value in facts[group].items():
            if value:  # what a model has none of needs no row
                yield name, str(value)
    data = facts["data"]
    yield "data", f"pixels {data['low']:g}..{data['high']:g}" if data["kind"] == "pixels" else f"VAE {data['vae']}"


def _budget_row(budget: Facts) -> tuple[str, str, str, str]:
    return budget["name"], budget["budget"], f"{budget['flops'] / 1e9:.4g}", f"{budget['share_of_full']:.1%}"


def _plan_set_table(plan_set: Facts) -> Table:
    built = plan_set["plans"].values()
    libraries = sorted({f"{name} {version}" for plan in built for name, version in plan["versions"].items()})
    plans = ", ".join(f"{name} {size(plan['size_bytes'])}" for name, plan in plan_set["plans"].items())
    notes = [f"built with {', '.join(libraries)}", f"plans: {plans}"]
    if plan_set["samples"]:
        notes.append(f"calibrated on {plan_set['samples']['samples']} real inputs")
    if plan_set["accepted_miss"]:
        notes.append(f"below tolerance, accepted: {plan_set['accepted_miss']}")
    ranges = ("latents", "rows", *(["text"] if any(profile["text"] for profile in plan_set["profiles"]) else []))
    return table(
        f"target {plan_set['target']}: {plan_set['backend']} on {plan_set['device']}, {plan_set['precision']}, "
        f"budgets {plan_set['covered']}",
        ("profile", *ranges, "parity with PyTorch"),
        [
            (profile["name"], *(profile[name] for name in ranges), parity_text(profile["parity"]))
            for profile in plan_set["profiles"]
        ],
        notes,
    )


def _decoder_table(target: str, decoder: Facts) -> Table:
    side, pixels = decoder["side"], decoder["side"] * decoder["factor"]
    scale, shift = (by_channel_text(tuple(decoder[name])) for name in ("scale", "shift"))
    return table(
        f"decoder of target {target}",
        ("fact", "value"),
        [
            ("class", decoder["class_name"]),
            ("takes", f"latents / {scale} + {shift}, {decoder['channels']} channels"),
            ("one call", f"{side}×{side} latents → {pixels}×{pixels} pixels, rows {decoder['rows']}"),
            ("parity with diffusers", parity_text(decoder["parity"])),
            ("sha256", decoder["sha256"]),
        ],
    )


def parity_text(parity: Facts) -> str:
    if parity["sqnr_db"] is None:
        return f"{parity['status']} ({parity['reason']})"
    found = f"{parity['sqnr_db']:.0f} dB, max error {parity['max_relative']:.1e}"
    return found if parity["status"] == "passed" else f"{found}; below tolerance, accepted: {parity['reason']}"


# ---------------------------------------------------------------- calibration


def calibration_table(calibration: CacheCalibration) -> Table:
    """Each fit, with what it explains on images that it was not fitted to."""
    steps = ", ".join(str(count) for count in calibration.steps)
    return table(
        f"change of the residual by distance of the signal, {calibration.images} images at {steps} steps, "
        f"guidance {', '.join(calibration.guidance)}",
        (
            "budget",
            "polynomial, lowest power first",
            "distances",
            "pairs",
            "RMS error",
            "R²",
            "R² at equal steps",
            "rank",
        ),
        [
            (
                "all" if fit.kept is None else str(fit.kept),
                " ".join(f"{coefficient:.4g}" for coefficient in fit.fit.coefficients),
                f"{fit.fit.low:.3g}..{fit.fit.high:.3g}",
                str(fit.pairs),
                f"{fit.held_out_error:.2g}",
                f"{fit.r2:.2f}",
                f"{fit.r2_same_steps:.2f}",
                f"{fit.rank_same_steps:+.2f}",
            )
            for fit in calibration.fits
        ],
        [
            "error, R² and rank are of held-out images; at equal steps: what the distance tells beyond the steps' size",
            "rank: how change and distance rise together at equal steps, from -1 to 1",
        ],
    )


# ---------------------------------------------------------------- parity


def parity_tables(found: Sequence[Comparison]) -> Iterator[Table]:
    """Single steps in one table, trajectories in another."""
    steps = [comparison for comparison in found if not comparison.part.startswith("trajectory")]
    states = [comparison for comparison in found if comparison.part.startswith("trajectory")]
    for title, rows in (("one step against PyTorch", steps), ("trajectories against PyTorch", states)):
        columns = ("part", "point", "max abs", "relative", "SQNR dB", "needed", "margin")
        yield table(title, columns, [_parity_row(comparison) for comparison in rows])


def _parity_row(comparison: Comparison) -> tuple[str, ...]:
    found = comparison.found
    return (
        comparison.part,
        comparison.point,
        f"{found.max_abs:.1e}",
        f"{found.max_relative:.1e}",
        f"{found.sqnr_db:.1f}",
        f"{comparison.least_db:g}",
        _margin(comparison),
    )


def _margin(comparison: Comparison) -> str:
    if comparison.met:
        return f"{comparison.margin_db:+.1f}"
    by = f"by {-comparison.margin_db:.1f}" if comparison.margin_db < 0 else f"{comparison.most_relative:.0e} relative"
    return f"MISSES {by}" + (", accepted" if comparison.passed else "")

"""Calibration inputs, and what 8 bits cost by kind of layer → tables for people."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from elit_export.calibrate.inputs import SelectedSamples
from elit_export.cli.tables.inspect import Facts
from elit_export.cli.tables.layout import Table, table
from elit_export.spec import TEXT

if TYPE_CHECKING:
    from elit_export.calibrate.sensitivity import Sensitivity
    from elit_export.calibrate.solver_budgets import Screened
    from elit_export.spec import SolverError, SolverFacts


def samples_facts(selected: SelectedSamples) -> Facts:
    """Return the origin of samples and the share of each budget, largest first."""
    kept = selected.samples.kept
    each = [_facts_of_budget(selected, budget) for budget in sorted(set(kept.tolist()), reverse=True)]
    return {**selected.samples.facts.model_dump(mode="json"), "sha256": selected.samples.sha256, "budgets": each}


def _facts_of_budget(selected: SelectedSamples, kept: int) -> Facts:
    here = selected.samples.kept == kept
    t, conditional = selected.samples.t[here], here & ~selected.null
    conditioning = next(iter(selected.samples.conditioning.values()))[conditional]
    return {
        "kept": kept,
        "samples": int(here.sum()),
        "t": [float(t.min()), float(t.max())],
        "guided": int((here & selected.guided).sum()),
        "null": int((here & selected.null).sum()),
        "subjects": len({row.tobytes() for row in conditioning}),
    }


def samples_table(selected: SelectedSamples) -> Table:
    """Show the selected samples by budget."""
    facts = samples_facts(selected)
    rows = [
        (
            str(budget["kept"]),
            str(budget["samples"]),
            "{:.3g}..{:.3g}".format(*budget["t"]),
            str(budget["samples"] - budget["guided"]),
            str(budget["guided"]),
            str(budget["null"]),
            str(budget["subjects"]),
        )
        for budget in facts["budgets"]
    ]
    unconditional = (
        ("of these negative", "prompts") if TEXT in selected.samples.conditioning else ("of these no class", "classes")
    )
    return table(
        f"{facts['samples']} samples of {facts['images']} images at {facts['steps']} steps of {facts['sampler']}, "
        f"guidance {', '.join(facts['guidance'])}",
        ("latents kept", "samples", "t", "unguided", "guided", *unconditional),
        rows,
        [f"checkpoint {facts['checkpoint_sha256'][:12]}, samples {facts['sha256'][:12]}"],
    )


def sensitivity_facts(rows: Sequence[Sensitivity], precision: str, samples_sha256: str) -> Facts:
    each = [
        {
            "layers": row.layers,
            "flops_share": row.flops_share,
            "velocity_db": {kept: difference.sqnr_db for kept, difference in row.velocity.items()},
            "residual_db": {kept: difference.sqnr_db for kept, difference in row.residual.items()},
        }
        for row in rows
    ]
    return {"precision": precision, "samples_sha256": samples_sha256, "rows": each}


def sensitivity_table(rows: Sequence[Sensitivity], precision: str) -> Table:
    """A few budgets, lowest first, and the worst of all."""
    every = list(rows[0].velocity)
    shown = sorted({every[0], every[len(every) // 3], every[2 * len(every) // 3], every[-1]})
    columns = ("in 8 bits", *(f"FLOPs at {kept}" for kept in (every[0], every[-1])))
    return table(
        f"{precision} against float32, SQNR of velocity / residual in dB by latents kept",
        (*columns, *(f"at {kept}" for kept in shown), "worst"),
        [_sensitivity_cells(row, every, shown) for row in rows],
        ["one kind of layer at a time", "FLOPs are shares of a whole step", "– : no product was quantized"],
    )


def _sensitivity_cells(row: Sensitivity, every: Sequence[int], shown: Sequence[int]) -> tuple[str, ...]:
    pairs = {kept: (row.velocity[kept].sqnr_db, row.residual[kept].sqnr_db) for kept in every}
    worst = tuple(min(pair[which] for pair in pairs.values()) for which in (0, 1))
    shares = (f"{row.flops_share[kept]:.0%}" for kept in (every[0], every[-1]))
    return row.layers, *shares, *(_db_pair(*pairs[kept]) for kept in shown), _db_pair(*worst)


def _db_pair(velocity_db: float, residual_db: float) -> str:
    return "–" if math.isinf(velocity_db) and velocity_db > 0 else f"{velocity_db:.1f} / {residual_db:.1f}"


# ---------------------------------------------------------------- solvers


def solver_facts(
    solvers: Sequence[SolverFacts], compared: Sequence[SolverError], screened: Mapping[int, Sequence[Screened]]
) -> Facts:
    """Return all that a calibration measured; `budgets` has what was tried in the time of so many full calls."""
    budgets = {str(calls): [_screened_facts(each) for each in tried] for calls, tried in screened.items()}
    return {
        "solvers": [asdict(facts) for facts in solvers],
        "compared": [asdict(error) for error in compared],
        "budgets": budgets,
    }


def _screened_facts(each: Screened) -> Facts:
    pattern = each.pattern
    return {"name": pattern.name, "calls": pattern.calls, "time": pattern.share, "start_db": each.progress.best_db}


def solvers_tables(
    solvers: Sequence[SolverFacts], compared: Sequence[SolverError], screened: Mapping[int, Sequence[Screened]]
) -> list[Table]:
    """Show the error of every table and sampler, and the patterns of budgets that were tried."""
    return [_solvers_table(solvers, compared), *(_screened_table(calls, tried) for calls, tried in screened.items())]


def _screened_table(calls: int, tried: Sequence[Screened]) -> Table:
    rows = [
        (each.pattern.name, str(each.pattern.calls), f"{each.pattern.share:.2f}", f"{each.progress.best_db:.1f}")
        for each in sorted(tried, key=lambda each: -each.progress.best_db)
    ]
    title = f"budgets in the time of {calls} full calls, by their start: dB, mean of median and all images"
    return table(title, ("cheaper calls", "calls", "time", "dB"), rows)


def _solvers_table(solvers: Sequence[SolverFacts], compared: Sequence[SolverError]) -> Table:
    """Show the error of each table and of samplers without calibration, by their calls."""
    first = solvers[0]
    errors = sorted((*(facts.error for facts in solvers), *compared), key=lambda error: (error.calls, error.sampler))
    rows = [
        (error.sampler, str(error.calls), f"{error.median_db:.1f}", f"{error.pooled_db:.1f}", f"{error.worst_db:.1f}")
        for error in errors
    ]
    title = (
        f"dB to the reference solution on {first.held_out_images} images that nothing was fitted to; "
        f"guidance {first.guidance}, budget {first.schedule}"
    )
    return table(title, ("sampler", "calls", "median image", "all images", "worst image"), rows)

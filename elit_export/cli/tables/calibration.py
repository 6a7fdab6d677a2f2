"""Calibration inputs, and what 8 bits cost by kind of layer → tables for people."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from elit_export.calibrate.inputs import Taken
from elit_export.cli.tables.inspect import Facts, table
from elit_export.spec import TEXT

if TYPE_CHECKING:
    from elit_export.calibrate.sensitivity import Sensitivity


def samples_facts(taken: Taken) -> Facts:
    """Where the samples are from, and what each budget has of them, largest first."""
    kept = taken.samples.kept
    each = [_facts_of_budget(taken, budget) for budget in sorted(set(kept.tolist()), reverse=True)]
    return {**taken.samples.facts.model_dump(mode="json"), "sha256": taken.samples.sha256, "budgets": each}


def _facts_of_budget(taken: Taken, kept: int) -> Facts:
    here = taken.samples.kept == kept
    t, told = taken.samples.t[here], here & ~taken.null
    subjects = next(iter(taken.samples.conditioning.values()))[told]
    return {
        "kept": kept,
        "samples": int(here.sum()),
        "t": [float(t.min()), float(t.max())],
        "guided": int((here & taken.guided).sum()),
        "null": int((here & taken.null).sum()),
        "subjects": len({subject.tobytes() for subject in subjects}),
    }


def samples_table(taken: Taken) -> Table:
    """What was taken, by budget."""
    facts = samples_facts(taken)
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
    told = ("of these negative", "prompts") if TEXT in taken.samples.conditioning else ("of these no class", "classes")
    made = table(
        f"{facts['samples']} samples of {facts['images']} images at {facts['steps']} steps of {facts['sampler']}, "
        f"guidance {', '.join(facts['guidance'])}",
        ("latents kept", "samples", "t", "unguided", "guided", *told),
        rows,
    )
    made.caption = f"checkpoint {facts['checkpoint_sha256'][:12]}, samples {facts['sha256'][:12]}"
    return made


def sensitivity_facts(rows: Sequence[Sensitivity], precision: str, samples_sha256: str) -> Facts:
    each = [
        {
            "layers": row.layers,
            "flops_share": row.flops_share,
            "velocity_db": {kept: found.sqnr_db for kept, found in row.velocity.items()},
            "residual_db": {kept: found.sqnr_db for kept, found in row.residual.items()},
        }
        for row in rows
    ]
    return {"precision": precision, "samples_sha256": samples_sha256, "rows": each}


def sensitivity_table(rows: Sequence[Sensitivity], precision: str) -> Table:
    """A few budgets, lowest first, and the worst of all."""
    every = list(rows[0].velocity)
    shown = sorted({every[0], every[len(every) // 3], every[2 * len(every) // 3], every[-1]})
    columns = ("in 8 bits", *(f"FLOPs at {kept}" for kept in (every[0], every[-1])))
    made = table(
        f"{precision} against float32, SQNR of velocity / residual in dB by latents kept",
        (*columns, *(f"at {kept}" for kept in shown), "worst"),
        [_sensitivity_cells(row, every, shown) for row in rows],
    )
    made.caption = "one kind of layer at a time; FLOPs are shares of a whole step; – : no product was quantized"
    return made


def _sensitivity_cells(row: Sensitivity, every: Sequence[int], shown: Sequence[int]) -> tuple[str, ...]:
    pairs = {kept: (row.velocity[kept].sqnr_db, row.residual[kept].sqnr_db) for kept in every}
    worst = tuple(min(pair[which] for pair in pairs.values()) for which in (0, 1))
    shares = (f"{row.flops_share[kept]:.0%}" for kept in (every[0], every[-1]))
    return row.layers, *shares, *(_db_pair(*pairs[kept]) for kept in shown), _db_pair(*worst)


def _db_pair(velocity_db: float, residual_db: float) -> str:
    return "–" if math.isinf(velocity_db) and velocity_db > 0 else f"{velocity_db:.1f} / {residual_db:.1f}"

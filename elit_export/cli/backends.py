"""What `bench --backends` does: time every plan set that can run here, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from elit_export.backends import BACKENDS
from elit_export.bundle import Bundle
from elit_export.cli.common import progress_bar
from elit_export.cli.quality import able_plan_sets
from elit_export.errors import BackendUnavailable
from elit_export.report.measures import backends_tables
from elit_export.runtime.pipeline import Pipeline
from elit_export.spec import Precision
from elit_export.verify.backends import EAGER, Competitor, common_budgets, compare_backends
from elit_export.verify.parity import accepted_miss


def bench_backends(
    folder: Path,
    *,
    target: str | None,
    precision: str | None,
    checkpoint: str | None,
    interface: Path | None,
    rows: int,
    rounds: int,
) -> tuple[list[Table], dict[str, Any]]:
    """With `checkpoint`, beside PyTorch eager in fp32 and as a share of the matrix-product peak."""
    from elit_export.verify.memory import bank_bytes

    bundle = Bundle.open(folder)
    plan_sets, skipped = able_plan_sets(bundle, target, precision)
    baseline, peaks = _pytorch(bundle, checkpoint, interface) if checkpoint else ({}, {})
    with ExitStack() as stack, progress_bar() as progress:
        task = progress.add_task("memory", total=len(plan_sets))
        competitors = []
        for plan_set in plan_sets:
            held = bank_bytes(folder, plan_set)
            opened = Pipeline.load(folder, target=plan_set.target, precision=plan_set.precision.value)
            miss = accepted_miss(plan_set, bundle.manifest.graphs)
            competitors.append(Competitor(plan_set, stack.enter_context(opened), miss, held))
            progress.advance(task)
        progress.reset(task, total=len(common_budgets(competitors)))
        result = compare_backends(
            competitors,
            baseline,
            rows=rows,
            rounds=rounds,
            peaks=peaks,
            skipped={**skipped, **_without_plans(bundle)},
            on_budget=lambda budget: progress.update(task, description=budget, advance=1),
        )
    return list(backends_tables(result)), {"backends": asdict(result)}


def _pytorch(
    bundle: Bundle, checkpoint: str, interface: Path | None
) -> tuple[Mapping[str, Any], Mapping[Precision, float]]:
    from elit_export.models.widening import widened_whole
    from elit_export.verify.check import model_of
    from elit_export.verify.reference import matmul_peaks_gflops, torch_engine

    return {EAGER: torch_engine(widened_whole(model_of(bundle, checkpoint, interface)))}, matmul_peaks_gflops()


def _without_plans(bundle: Bundle) -> dict[str, str]:
    """Backends that are installed and have a device here, of which the bundle has no plans."""
    present = {plan_set.backend for plan_set in bundle.manifest.plan_sets}
    return {
        name: "no plans of it in this bundle: elit-export build RECIPE --target TARGET"
        for name in BACKENDS
        if name not in present and _works(name)
    }


def _works(name: str) -> bool:
    backend = BACKENDS[name]
    try:
        return any(backend.device_problem(device) == ("", "") for device in backend.devices)
    except BackendUnavailable:
        return False

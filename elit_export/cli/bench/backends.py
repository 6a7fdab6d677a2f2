"""bench backends: time plan sets side by side."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from elit_export.cli.bench.options import (
    BUNDLE,
    CHECKPOINT_OPTION,
    ROUNDS_OPTION,
    ROWS_OPTION,
    advancing,
    torch_runners,
)
from elit_export.cli.common import (
    CHECK_OPTION,
    INTERFACE_OPTION,
    JSON_OPTION,
    TRUST_OPTION,
    conclude,
    limits_in,
    progress_bar,
    refuse_alone,
    say,
)
from elit_export.errors import BackendUnavailable

if TYPE_CHECKING:
    from elit_export.bench.backends import BackendsResult
    from elit_export.bundle.manifest import PlanSet
    from elit_export.bundle.reading import Bundle
    from elit_export.spec import Precision

PYTORCHS = dict.fromkeys(("peaks", "share_of_peak"), "give --checkpoint FILE, they are measured beside PyTorch")


@click.command()
@BUNDLE
@CHECKPOINT_OPTION
@INTERFACE_OPTION
@ROWS_OPTION
@ROUNDS_OPTION
@CHECK_OPTION
@click.option("--target", help="Only this one.  [default: all that can run here]")
@click.option("--precision", help="Only this one.  [default: all]")
@TRUST_OPTION
@JSON_OPTION
def backends(
    bundle: Path,
    checkpoint: str | None,
    interface: Path | None,
    rows: int,
    rounds: int,
    check: Path | None,
    target: str | None,
    precision: str | None,
    trust: bool,
    json_to: str | None,
) -> None:
    """All plan sets that run here, side by side."""
    from elit_export.bench.backends import BackendsResult, compare_backends, compared_budgets
    from elit_export.bundle.reading import Bundle
    from elit_export.cli.plan_sets import verified_plan_sets
    from elit_export.cli.tables.bench import backends_tables
    from elit_export.runtime.opening import unopened

    refuse_alone(interface, checkpoint)
    limits = limits_in(check, {"backends": BackendsResult}, {} if checkpoint else PYTORCHS)
    opened = Bundle.open(bundle, trust=trust)
    plan_sets, skipped = verified_plan_sets(opened, target, precision)
    compared_budgets([unopened(opened, plan_set) for plan_set in plan_sets], rows)  # before any of them is opened
    baseline, peaks = _pytorch(opened, checkpoint, interface) if checkpoint else ({}, {})
    with ExitStack() as stack, progress_bar() as progress:
        competitors = [
            _competitor(stack, opened, plan_set) for plan_set in progress.track(plan_sets, description="memory")
        ]
        result = compare_backends(
            competitors,
            baseline,
            rows=rows,
            rounds=rounds,
            peaks=peaks,
            skipped={**skipped, **_without_plans(opened)},
            on_budget=advancing(progress, progress.add_task("", total=None)),
        )
    for line in verdict(result).split("\n"):
        say(line, json_to=json_to)
    conclude(list(backends_tables(result)), {"backends": asdict(result)}, limits, json_to)


def verdict(result: BackendsResult) -> str:
    """Which is fastest, if one is beyond the noise."""
    from elit_export.bench.backends import MIN_ROUNDS

    if result.fastest_recipe:
        return f"the fastest, in a recipe:\n{result.fastest_recipe}"
    if result.rounds < MIN_ROUNDS:
        return f"none is called the fastest: so few rounds do not show the noise; --rounds {MIN_ROUNDS} or more do"
    return (
        f"none is fastest beyond the noise: the 10-90 % ranges of {', '.join(result.fastest)} overlap; choose "
        f"by memory, or measure again on a quiet machine with more --rounds"
    )


def _competitor(stack: ExitStack, bundle: Bundle, plan_set: PlanSet) -> Any:
    from elit_export.bench.backends import Competitor
    from elit_export.bench.memory import bank_bytes
    from elit_export.runtime.pipeline import Pipeline
    from elit_export.verify.parity import accepted_miss

    held = bank_bytes(bundle, plan_set)
    opened = stack.enter_context(Pipeline.of(bundle, plan_set))
    return Competitor(plan_set, opened, accepted_miss(plan_set, bundle.manifest.graphs), held)


def _pytorch(
    bundle: Bundle, checkpoint: str, interface: Path | None
) -> tuple[Mapping[str, Any], Mapping[Precision, float]]:
    """PyTorch eager in fp32, and the matrix-product peaks that times are a share of."""
    from elit_export.bench.backends import EAGER
    from elit_export.bench.peaks import matmul_peaks_gflops

    runners = torch_runners(bundle, checkpoint, interface, compiled=False)
    return {EAGER: runners["eager"]}, matmul_peaks_gflops()


def _without_plans(bundle: Bundle) -> dict[str, str]:
    """Backends that are installed and have a device here, of which the bundle has no plans."""
    from elit_export.backends import BACKENDS

    present = {plan_set.backend for plan_set in bundle.manifest.plan_sets}
    return {
        name: "no plans of it in this bundle: elit-export build RECIPE --target TARGET"
        for name in BACKENDS
        if name not in present and _works(name)
    }


def _works(name: str) -> bool:
    from elit_export.backends import BACKENDS

    backend = BACKENDS[name]
    try:
        loader = backend.loader()
        return any(loader.device_problem(device) == ("", "") for device in backend.devices)
    except BackendUnavailable:
        return False

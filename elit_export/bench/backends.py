"""Every plan set of a bundle side by side: time per budget, memory, bytes on disk, distance from PyTorch.

All are called in turn in one process, with a pause before each, because the threads of some libraries spin on for
a moment after a call. Times are comparable within one result only.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from elit_export.bench.engines import Runner, bench_inputs, check_rows, engine_runner, measured_budgets
from elit_export.bench.samplings import Budgets
from elit_export.bench.stages import OnStage
from elit_export.bench.timing import Timing, timed_in_turn
from elit_export.bundle.manifest import PlanSet
from elit_export.cost.flops import flops
from elit_export.errors import InputError
from elit_export.runtime.pipeline import Pipeline
from elit_export.spec import ModelSpec, Precision

EAGER = "PyTorch eager"
PAUSE_S = 0.02


@dataclass(frozen=True)
class Competitor:
    """An opened plan set and what it takes of the machine."""

    plan_set: PlanSet
    pipeline: Pipeline
    accepted_miss: str  # the reason, where it is below its tolerance
    held_bytes: int | None  # resident memory of its engines alone, None where the system does not tell

    @property
    def name(self) -> str:
        return f"{self.plan_set.target} {self.plan_set.precision.value}"


@dataclass(frozen=True)
class BackendTime:
    """One call at one budget. `speedup` is the baseline's time at that budget over this one's, `time_over_flops` the
    time over that of the largest budget, over the same ratio of FLOPs: 1 where time follows FLOPs."""

    budget: str
    timing: Timing
    gflops_per_s: float
    share_of_peak: float | None
    speedup: float
    time_over_flops: float


@dataclass(frozen=True)
class BackendRow:
    """One plan set. `recipe` is what a recipe says to get it; `parity_db` the worst of its profiles."""

    name: str
    backend: str
    precision: str
    recipe: str
    parity_db: float | None
    accepted_miss: str
    plan_bytes: int
    held_bytes: int | None
    times: dict[str, BackendTime]


@dataclass(frozen=True)
class BackendsResult:
    """`baseline` is what speed-ups are over. `peaks` are matrix-product rates by precision, in GFLOP/s.

    `fastest` names the row with the least time at the largest budget; `skipped` says of others why they did not run.
    """

    rows: int
    baseline: str
    peaks: dict[str, float]
    backends: list[BackendRow]
    fastest: str
    fastest_recipe: str
    skipped: dict[str, str]


def compare_backends(
    competitors: Sequence[Competitor],
    baseline: Mapping[str, Runner],
    *,
    rows: int,
    rounds: int,
    peaks: Mapping[Precision, float],
    skipped: Mapping[str, str],
    on_budget: OnStage,
) -> BackendsResult:
    """Time every competitor at every budget that all cover; `baseline` holds one runner, or none for the first one.

    Raises InputError before measuring if they share no budget or a profile does not take the rows.
    """
    spec = competitors[0].pipeline.spec
    budgets = common_budgets(competitors)
    for competitor in competitors:
        check_rows(competitor.pipeline, budgets, rows)
    timed = {}
    for name in budgets:
        on_budget(name, len(budgets))
        timed[name] = _timed(competitors, baseline, budgets, name, rows=rows, rounds=rounds)
    over = next(iter(baseline), competitors[0].name)
    made = [_row(competitor, spec, budgets, timed, over, peaks, rows) for competitor in competitors]
    largest = next(iter(budgets))
    fastest = min(made, key=lambda row: row.times[largest].timing.median_ms)
    return BackendsResult(
        rows=rows,
        baseline=over,
        peaks={precision.value: peak for precision, peak in peaks.items()},
        backends=made,
        fastest=fastest.name,
        fastest_recipe=fastest.recipe,
        skipped=dict(skipped),
    )


def common_budgets(competitors: Sequence[Competitor]) -> Budgets:
    """Those that a bench would measure of the first, as far as all cover them."""
    found = {
        name: budget
        for name, budget in measured_budgets(competitors[0].pipeline).items()
        if all(budget in competitor.pipeline.coverage.covered for competitor in competitors)
    }
    if not found:
        raise InputError("these plan sets cover no budget in common", "choose one with --target")
    return found


def _timed(
    competitors: Sequence[Competitor],
    baseline: Mapping[str, Runner],
    budgets: Budgets,
    name: str,
    *,
    rows: int,
    rounds: int,
) -> dict[str, Timing]:
    inputs = bench_inputs(competitors[0].pipeline, budgets[name], rows)
    engines = {one.name: engine_runner(one.pipeline, budgets[name]) for one in competitors}
    runners = {key: partial(run, inputs) for key, run in {**baseline, **engines}.items()}
    return timed_in_turn(runners, rounds=rounds, before=lambda: time.sleep(PAUSE_S))


def _row(
    competitor: Competitor,
    spec: ModelSpec,
    budgets: Budgets,
    timed: Mapping[str, Mapping[str, Timing]],
    over: str,
    peaks: Mapping[Precision, float],
    rows: int,
) -> BackendRow:
    largest, *_ = budgets
    plan_set, name = competitor.plan_set, competitor.name
    peak, text = peaks.get(plan_set.precision), competitor.pipeline.coverage.tokens

    def time_of(budget: str) -> BackendTime:
        timing, cost = timed[budget][name], flops(spec, budgets[budget], text=text).total
        gflops = cost * rows / timing.median_ms / 1e6
        relative = timing.median_ms / timed[largest][name].median_ms
        return BackendTime(
            budget=str(budgets[budget]),
            timing=timing,
            gflops_per_s=gflops,
            share_of_peak=gflops / peak if peak else None,
            speedup=timed[budget][over].median_ms / timing.median_ms,
            time_over_flops=relative / (cost / flops(spec, budgets[largest], text=text).total),
        )

    return BackendRow(
        name=name,
        backend=plan_set.backend,
        precision=plan_set.precision.value,
        recipe=recipe_of(plan_set),
        parity_db=parity_db(plan_set),
        accepted_miss=competitor.accepted_miss,
        plan_bytes=plan_set.model_bytes,
        held_bytes=competitor.held_bytes,
        times={budget: time_of(budget) for budget in budgets},
    )


def parity_db(plan_set: PlanSet) -> float | None:
    """The worst of the profiles that were compared with PyTorch."""
    found = [facts.parity.sqnr_db for facts in plan_set.profiles if facts.parity.sqnr_db is not None]
    return min(found) if found else None


def recipe_of(plan_set: PlanSet) -> str:
    """The table of a recipe that builds these plans."""
    choices = {"backend": plan_set.backend, "device": plan_set.device, "precision": plan_set.precision.value}
    more = {"fused": True if plan_set.fused else None, "accept_below_tolerance": plan_set.accepted}
    lines = [
        f"{key} = {json.dumps(value)}"
        for key, value in {**choices, **plan_set.options, **more}.items()
        if value is not None
    ]
    return "\n".join([f"[targets.{plan_set.target}]", *lines])

"""Compares the plan sets of a bundle: time per budget, memory, bytes on disk, SQNR against PyTorch.

The plan sets run in turn in one process. A pause precedes each call, because the threads of some libraries keep
spinning for a moment after one. Times are comparable within one result only.
"""

from __future__ import annotations

import json
import math
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
from elit_export.runtime.request import Samplable
from elit_export.spec import ModelSpec, Precision

EAGER = "PyTorch eager"
PAUSE_S = 0.02  # before each call
MIN_ROUNDS = 5  # with fewer, the spread of times says nothing about the noise


@dataclass(frozen=True)
class Competitor:
    """An opened plan set and the memory that it uses."""

    plan_set: PlanSet
    pipeline: Pipeline
    accepted_miss: str  # the recipe's reason, where the plan set is below its tolerance
    held_bytes: int | None  # resident memory of its engines alone, None where the system does not report it

    @property
    def name(self) -> str:
        return f"{self.plan_set.target} {self.plan_set.precision.value}"


@dataclass(frozen=True)
class BackendTime:
    """Time of one call at one budget.

    `speedup` is the baseline's time at that budget over this one's. `time_over_flops` is the time over that of the
    largest budget, divided by the same ratio of FLOPs: 1 where time is proportional to FLOPs.
    """

    budget: str
    timing: Timing
    gflops_per_s: float
    share_of_peak: float | None
    speedup: float
    time_over_flops: float


@dataclass(frozen=True)
class BackendRow:
    """The results of one plan set.

    `recipe` is the table of a recipe that builds it, `parity_db` the lowest SQNR of its profiles.
    """

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
    """The results of all plan sets.

    `baseline` names the runner that speedups are relative to. `peaks` are matrix-product rates by precision, in
    GFLOP/s. `fastest` names the row with the lowest time at the largest budget, and with it all that are not slower
    beyond the noise: their 10th percentile is not above its 90th, or `rounds` are fewer than MIN_ROUNDS.
    `fastest_recipe` is empty where these are several.
    `skipped` holds, for the plan sets that did not run, the reason.
    """

    rows: int
    rounds: int
    baseline: str
    peaks: dict[str, float]
    backends: list[BackendRow]
    fastest: list[str]
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
    """Time every competitor at every budget that all of them cover.

    `baseline` holds one runner, or none: then the first competitor is the baseline. Raises InputError before measuring
    if they share no budget or a profile does not take the rows.
    """
    spec = competitors[0].pipeline.spec
    budgets = compared_budgets([competitor.pipeline for competitor in competitors], rows)
    timings = {}
    for name in budgets:
        on_budget(name, len(budgets))
        timings[name] = _timed(competitors, baseline, budgets, name, rows=rows, rounds=rounds)
    baseline_name = next(iter(baseline), competitors[0].name)
    backend_rows = [_row(competitor, spec, budgets, timings, baseline_name, peaks, rows) for competitor in competitors]
    fastest = not_slower(backend_rows, next(iter(budgets)))
    return BackendsResult(
        rows=rows,
        rounds=rounds,
        baseline=baseline_name,
        peaks={precision.value: peak for precision, peak in peaks.items()},
        backends=backend_rows,
        fastest=[row.name for row in fastest],
        fastest_recipe=fastest[0].recipe if len(fastest) == 1 else "",
        skipped=dict(skipped),
    )


def not_slower(rows: Sequence[BackendRow], budget: str) -> list[BackendRow]:
    """The row with the least time, then those whose spread of times meets its own: all, if the rounds were few."""
    in_order = sorted(rows, key=lambda row: row.times[budget].timing.median_ms)
    least = in_order[0].times[budget].timing
    limit_ms = least.high_ms if least.runs >= MIN_ROUNDS else math.inf
    return [row for row in in_order if row is in_order[0] or row.times[budget].timing.low_ms <= limit_ms]


def compared_budgets(plan_sets: Sequence[Samplable], rows: int) -> Budgets:
    """The budgets measured for the first plan set, as far as all of them cover these; needs no engines.

    Raises InputError if there is none, or if a profile does not take the rows.
    """
    common = {
        name: budget
        for name, budget in measured_budgets(plan_sets[0]).items()
        if all(budget in plan_set.coverage.covered for plan_set in plan_sets)
    }
    if not common:
        raise InputError("these plan sets cover no budget in common", "choose one with --target")
    for plan_set in plan_sets:
        check_rows(plan_set, common, rows)
    return common


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
    engines = {competitor.name: engine_runner(competitor.pipeline, budgets[name]) for competitor in competitors}
    runners = {key: partial(run, inputs) for key, run in {**baseline, **engines}.items()}
    return timed_in_turn(runners, rounds=rounds, before=lambda: time.sleep(PAUSE_S))


def _row(
    competitor: Competitor,
    spec: ModelSpec,
    budgets: Budgets,
    timings: Mapping[str, Mapping[str, Timing]],
    baseline_name: str,
    peaks: Mapping[Precision, float],
    rows: int,
) -> BackendRow:
    largest, *_ = budgets
    plan_set, name = competitor.plan_set, competitor.name
    peak, text = peaks.get(plan_set.precision), competitor.pipeline.coverage.tokens

    def time_of(budget: str) -> BackendTime:
        timing, cost = timings[budget][name], flops(spec, budgets[budget], text=text).total
        gflops = cost * rows / timing.median_ms / 1e6
        relative = timing.median_ms / timings[largest][name].median_ms
        return BackendTime(
            budget=str(budgets[budget]),
            timing=timing,
            gflops_per_s=gflops,
            share_of_peak=gflops / peak if peak else None,
            speedup=timings[budget][baseline_name].median_ms / timing.median_ms,
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
    """The lowest SQNR of the profiles that were compared with PyTorch."""
    measured = [facts.parity.sqnr_db for facts in plan_set.profiles if facts.parity.sqnr_db is not None]
    return min(measured) if measured else None


def recipe_of(plan_set: PlanSet) -> str:
    """Write the table of a recipe that builds these plans."""
    fixed = {"backend": plan_set.backend, "device": plan_set.device, "precision": plan_set.precision.value}
    extra = {"fused": True if plan_set.fused else None, "accept_below_tolerance": plan_set.accepted}
    lines = [
        f"{key} = {json.dumps(value)}"
        for key, value in {**fixed, **plan_set.options, **extra}.items()
        if value is not None
    ]
    return "\n".join([f"[targets.{plan_set.target}]", *lines])

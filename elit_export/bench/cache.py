"""What step caching is worth: error against time of many cached samplings, beside what else the time could buy.

Errors are of the final images against a fine solution with the same schedule and guidance. Three controls stand
beside every cached way, at equal engine time: fewer Euler steps, a multistep sampler with fewer steps, and 50 Euler
steps at a smaller budget. Times are comparable within one result only.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from elit_export.arrays import HostArray
from elit_export.bench.stages import OnStage, run_stages
from elit_export.bench.timing import timed_in_turn
from elit_export.runtime.conditioning import numbered, random_rows
from elit_export.runtime.guidance import Guidance
from elit_export.runtime.options import SamplingOptions, resolve
from elit_export.runtime.pipeline import Pipeline, Sample
from elit_export.runtime.sampling import Call
from elit_export.runtime.step_cache import bench_policies
from elit_export.verify.metrics import difference

REFERENCE_STEPS = 50  # Euler's, of the way that all others are compared with
PART_ROUNDS = 7
FEWER, MULTISTEP, SMALLER = CONTROLS = ("fewer steps", "ab3", "smaller budget")
FINE = "reference solution"
REFERENCE, CACHED, COMBINED, GUIDED = "euler 50", "cached", "cached ab3", "cheaper guidance"
EULER_STEPS = (8, 12, 16, 20, 25, 33, 40)
MULTISTEP_STEPS = (6, 8, 10, 14, 20, 30)
COMBINED_STEPS = (14, 20, 30)
# Of the error of 50 Euler steps, in dB: the levels at which the cheapest way is named.
LEVELS_DB = (-10.0, 0.0, 6.0)


@dataclass(frozen=True)
class Way:
    """One way to sample, and the group it belongs to."""

    name: str
    family: str
    options: SamplingOptions


@dataclass(frozen=True)
class SweepRow:
    """How a way did.

    `speedup` is the wall-clock time of 50 Euler steps over this one's. `over_parts` is its time over the time of its
    calls measured one by one: 1 where a cached run costs no more than what it runs. `control_db` is the error that each
    control has at this engine time, None where its measured times do not reach.
    """

    name: str
    family: str
    options: dict[str, str | float]
    computed: int
    reused: int
    probes: int
    ms_per_image: float
    engine_ms_per_image: float
    over_parts: float
    speedup: float
    sqnr_db: float
    control_db: dict[str, float | None]


@dataclass(frozen=True)
class SweepResult:
    """All ways with one schedule and guidance. `best` names the cheapest within each of LEVELS_DB of 50 Euler steps.

    `reuse_over_step` and `probe_over_step` are the times of the small graphs over that of a step of as many
    rows; `worst_over_parts` is the most of what is cached, `best_speedup` that of the cheapest way with no more error
    than 50 Euler steps.
    """

    schedule: str
    guidance: str
    images: int
    fine_steps: int
    reuse_over_step: float
    probe_over_step: float
    worst_over_parts: float
    best_speedup: float
    rows: list[SweepRow]
    best: dict[str, str]


def sweep(
    pipeline: Pipeline,
    *,
    schedule: str,
    guidance: str,
    images: int,
    rounds: int,
    fine_steps: int,
    on_way: OnStage,
) -> SweepResult:
    """Sample every way `rounds` times, in turn, from the same noise; raises CalibrationError before anything runs."""
    conditioning = numbered(pipeline.spec, range(images), pipeline.coverage.text)
    chosen = list(ways(pipeline, schedule, guidance))
    for way in chosen:
        pipeline.prepared(conditioning, way.options)
    fine = SamplingOptions(steps=fine_steps, sampler="heun", schedule=schedule, guidance=guidance)
    wanted = [(FINE, fine), *((way.name, way.options) for _ in range(rounds) for way in chosen)]
    taken: dict[str, list[Sample]] = {name: [] for name, _ in wanted}
    parts, measured = Parts(pipeline), list[SweepRow]()

    def take(name: str, options: SamplingOptions) -> None:
        taken[name].append(pipeline.sampled(conditioning, options))

    def measure() -> None:
        exact = taken[FINE][0].latents
        measured.extend(_row(way, taken[way.name], taken[REFERENCE], exact, parts) for way in chosen)

    stages = [(name, partial(take, name, options)) for name, options in wanted]
    run_stages([*stages, ("parts", measure)], on_way)
    rows = [_with_controls(row, measured) for row in measured]
    first = taken[REFERENCE][0].records[0].calls[0]
    step = parts.of(first)
    best = best_ways(rows)
    return SweepResult(
        schedule=schedule,
        guidance=guidance,
        images=images,
        fine_steps=fine_steps,
        reuse_over_step=parts.graph("reuse", first) / step,
        probe_over_step=parts.graph("probe", first) / step,
        worst_over_parts=max(row.over_parts for row in rows if row.reused),
        best_speedup=next(row.speedup for row in rows if row.name == best["+0 dB"]),
        rows=rows,
        best=best,
    )


# ---------------------------------------------------------------- ways


def ways(pipeline: Pipeline, schedule: str, guidance: str) -> Iterator[Way]:
    """The reference first, then the controls, then what is cached."""

    common = SamplingOptions(steps=REFERENCE_STEPS, sampler="euler", schedule=schedule, guidance=guidance)

    def way(name: str, family: str, **more: Any) -> Way:
        return Way(name, family, replace(common, **more))

    yield way(REFERENCE, REFERENCE)
    for steps in EULER_STEPS:
        yield way(f"euler {steps}", FEWER, steps=steps)
    for steps in MULTISTEP_STEPS:
        yield way(f"ab3 {steps}", MULTISTEP, steps=steps, sampler="ab3")
    for name in smaller_budgets(pipeline, schedule):
        yield way(f"euler 50, all at {name}", SMALLER, schedule=name)
    for policy in bench_policies():
        for order in (0, 1):
            cache = f"{policy},order={order}"
            yield way(cache.removeprefix("static:"), CACHED, cache=cache)
    for steps in COMBINED_STEPS:
        yield way(f"ab3 {steps}, every@2", COMBINED, steps=steps, sampler="ab3", cache="static:every@2")
    chosen = Guidance.parse(guidance, pipeline.spec)
    if chosen.guides and chosen.one_budget:
        for weak in smaller_budgets(pipeline, schedule):
            cheaper = str(chosen.with_weak(pipeline.spec.budget(weak)))
            cheap: dict[str, Any] = {"sampler": "ab3", "guidance": cheaper}
            yield way(f"ab3 14, weak at {weak}", GUIDED, steps=14, **cheap)
            yield way(f"ab3 30, weak at {weak}, every@2", GUIDED, steps=30, cache="static:every@2", **cheap)


def smaller_budgets(pipeline: Pipeline, schedule: str) -> list[str]:
    """The named budgets below the least of the schedule."""
    budget = min(resolve(pipeline.spec, SamplingOptions(schedule=schedule)).schedule)
    covered = pipeline.coverage.covered
    named = pipeline.spec.named_budgets.items()
    return [name for name, smaller in named if smaller.kept < budget.kept and smaller in covered]


# ---------------------------------------------------------------- one way


class Parts:
    """Times in ms of single engine calls of a pipeline, each measured once."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._known: dict[tuple[str, int, int, int], float] = {}

    def of(self, call: Call) -> float:
        """What a call should take."""
        probed = self.graph("probe", call) if call.cached.probed else 0.0
        return probed + (self.graph("reuse", call) if call.reused else self.step(call))

    def step(self, call: Call) -> float:
        """Of all blocks, at the budget of a call with as many rows and as long a text."""
        bank, inputs = self._pipeline.bank, self._inputs(call.rows, call.text)
        return self._timed(("step", call.budget.kept, call.rows, call.text), lambda: bank(call.budget, inputs))

    def graph(self, name: str, call: Call) -> float:
        """Time `reuse` or `probe`. Only the rows of the call count: these graphs read no text and run no block."""
        spec, bank = self._pipeline.spec, self._pipeline.bank
        inputs = self._inputs(call.rows, call.text)
        tokens = np.ones((call.rows, spec.tokens, spec.hidden_size), np.float32)
        run = {
            "probe": lambda: bank.probe(inputs, tokens),
            "reuse": lambda: bank.reuse(call.budget, inputs, tokens, tokens, 1.0),
        }
        return self._timed((name, 0, call.rows, 0), run[name])

    def _timed(self, key: tuple[str, int, int, int], run: Callable[[], object]) -> float:
        if key not in self._known:
            self._known[key] = timed_in_turn({"it": run}, rounds=PART_ROUNDS)["it"].median_ms
        return self._known[key]

    def _inputs(self, rows: int, text: int) -> Mapping[str, HostArray]:
        spec = self._pipeline.spec
        moment = {"x": np.ones((rows, *spec.sample_shape), np.float32), "t": np.full(rows, 0.5, np.float32)}
        return moment | random_rows(spec, rows, text, np.random.default_rng(0))


def _row(way: Way, samples: Sequence[Sample], reference: Sequence[Sample], exact: HostArray, parts: Parts) -> SweepRow:
    calls = [call for record in samples[0].records for call in record.calls]
    images = len(samples[0].latents)
    engine_ms = statistics.median(sample.timings.engines_s for sample in samples) * 1e3
    wall_ms = statistics.median(sample.timings.total_s for sample in samples) * 1e3
    reference_ms = statistics.median(sample.timings.total_s for sample in reference) * 1e3
    return SweepRow(
        name=way.name,
        family=way.family,
        options=way.options.scalars,
        computed=sum(not call.reused for call in calls),
        reused=sum(call.reused for call in calls),
        probes=sum(call.cached.probed for call in calls),
        ms_per_image=wall_ms / images,
        engine_ms_per_image=engine_ms / images,
        over_parts=engine_ms / sum(parts.of(call) for call in calls),
        speedup=reference_ms / wall_ms,
        sqnr_db=difference(samples[0].latents, exact).sqnr_db,
        control_db={},
    )


# ---------------------------------------------------------------- all ways together


def _with_controls(row: SweepRow, rows: Sequence[SweepRow]) -> SweepRow:
    if row.family not in (CACHED, COMBINED):
        return row
    found = {control: error_at(row.engine_ms_per_image, control, rows) for control in CONTROLS}
    return replace(row, control_db=found)


def error_at(engine_ms: float, control: str, rows: Sequence[SweepRow]) -> float | None:
    """The dB of a control at an engine time, linear in its logarithm between what was measured."""
    families = (control,) if control == MULTISTEP else (control, REFERENCE)  # the others end at 50 full Euler steps
    points = sorted((row.engine_ms_per_image, row.sqnr_db) for row in rows if row.family in families)
    if not points or not points[0][0] <= engine_ms <= points[-1][0]:
        return None
    times, errors = zip(*points, strict=True)
    return float(np.interp(math.log(engine_ms), np.log(times), errors))


def best_ways(rows: Sequence[SweepRow]) -> dict[str, str]:
    """For each level, the way with the least engine time whose error is no more."""
    reference = next(row for row in rows if row.family == REFERENCE)
    found = {}
    for level in LEVELS_DB:
        good = [row for row in rows if row.sqnr_db >= reference.sqnr_db + level]
        if good:  # the reference alone reaches level 0
            found[f"{level:+g} dB"] = min(good, key=lambda row: row.engine_ms_per_image).name
    return found

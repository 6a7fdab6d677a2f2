"""Measures what step caching gains: error against time of many sampling configs, cached and not.

Errors are those of the final images against a reference solution with the same schedule and guidance. Every cached
config is compared with three controls at equal engine time: fewer Euler steps, a multistep sampler with fewer steps,
and 50 Euler steps at a smaller budget. Times are comparable within one result only.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from elit_export.arrays import HostArray
from elit_export.bench.stages import OnStage, run_stages
from elit_export.bench.timing import timed_in_turn
from elit_export.runtime.conditioning import numbered, random_rows
from elit_export.runtime.guidance import Guidance
from elit_export.runtime.options import SamplingOptions, resolve
from elit_export.runtime.pipeline import Pipeline
from elit_export.runtime.request import Samplable, prepared
from elit_export.runtime.sample import Sample
from elit_export.runtime.sampling import Call
from elit_export.runtime.step_cache import bench_policies
from elit_export.verify.metrics import difference

REFERENCE_STEPS = 50  # of Euler: the config that all others are compared with
CALL_ROUNDS = 7
FEWER_STEPS, MULTISTEP, SMALLER_BUDGET = CONTROLS = ("fewer steps", "ab3", "smaller budget")
SOLUTION = "reference solution"
REFERENCE, CACHED, COMBINED, GUIDED = "euler 50", "cached", "cached ab3", "cheaper guidance"
EULER_STEPS = (8, 12, 16, 20, 25, 33, 40)
MULTISTEP_STEPS = (6, 8, 10, 14, 20, 30)
COMBINED_STEPS = (14, 20, 30)
# SQNR relative to 50 Euler steps, in dB: for each level the cheapest config is named.
LEVELS_DB = (-10.0, 0.0, 6.0)


@dataclass(frozen=True)
class SamplingConfig:
    """The options of one sampling, with a name and the group it belongs to."""

    name: str
    family: str
    options: SamplingOptions


@dataclass(frozen=True)
class SweepRow:
    """The results of one sampling config.

    `speedup` is the wall-clock time of 50 Euler steps over this one's. `over_parts` is its engine time over the sum of
    its calls measured one by one: 1 where caching adds no cost of its own. `control_db` is the SQNR of each control at
    this engine time, None outside the range of times that was measured for the control.
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
    """The results of all sampling configs with one schedule and guidance.

    `best` names the cheapest config within each of LEVELS_DB of 50 Euler steps. `reuse_over_step` and
    `probe_over_step` are the times of these graphs over that of a step with as many rows. `worst_over_parts` is the
    maximum over the cached configs. `best_speedup` is the speedup of the cheapest config with no more error than 50
    Euler steps.
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
    """Run every sampling config `rounds` times, in turn, from the same noise.

    Raises CalibrationError before anything runs.
    """
    conditioning = numbered(pipeline.spec, range(images), pipeline.coverage.text)
    configs = list(sampling_configs(pipeline, schedule, guidance))
    check_sweep(pipeline, schedule=schedule, guidance=guidance, images=images, fine_steps=fine_steps)
    solution = SamplingOptions(steps=fine_steps, sampler="heun", schedule=schedule, guidance=guidance)
    runs = [(SOLUTION, solution), *((config.name, config.options) for _ in range(rounds) for config in configs)]
    samples: dict[str, list[Sample]] = {name: [] for name, _ in runs}
    call_times, measured = CallTimes(pipeline), list[SweepRow]()

    def sample(name: str, options: SamplingOptions) -> None:
        samples[name].append(pipeline.sampled(conditioning, options))

    def measure() -> None:
        expected = samples[SOLUTION][0].latents
        measured.extend(
            _row(config, samples[config.name], samples[REFERENCE], expected, call_times) for config in configs
        )

    stages = [(name, partial(sample, name, options)) for name, options in runs]
    run_stages([*stages, ("single calls", measure)], on_way)
    rows = [_with_controls(row, measured) for row in measured]
    first = samples[REFERENCE][0].records[0].calls[0]
    step = call_times.of(first)
    best = best_configs(rows)
    return SweepResult(
        schedule=schedule,
        guidance=guidance,
        images=images,
        fine_steps=fine_steps,
        reuse_over_step=call_times.graph("reuse", first) / step,
        probe_over_step=call_times.graph("probe", first) / step,
        worst_over_parts=max(row.over_parts for row in rows if row.reused),
        best_speedup=next(row.speedup for row in rows if row.name == best["+0 dB"]),
        rows=rows,
        best=best,
    )


def check_sweep(on: Samplable, *, schedule: str, guidance: str, images: int, fine_steps: int) -> None:
    """Raise InputError or CalibrationError where one of the samplings cannot run; needs no engines."""
    conditioning = numbered(on.spec, range(images), on.coverage.text)
    reference = SamplingOptions(steps=fine_steps, sampler="heun", schedule=schedule, guidance=guidance)
    for options in (reference, *(config.options for config in sampling_configs(on, schedule, guidance))):
        prepared(on, conditioning, options)


# ---------------------------------------------------------------- sampling configs


def sampling_configs(on: Samplable, schedule: str, guidance: str) -> Iterator[SamplingConfig]:
    """Yield the reference config first, then the controls, then the cached ones."""
    common = SamplingOptions(steps=REFERENCE_STEPS, sampler="euler", schedule=schedule, guidance=guidance)

    def config(name: str, family: str, **changes: Any) -> SamplingConfig:
        return SamplingConfig(name, family, replace(common, **changes))

    yield config(REFERENCE, REFERENCE)
    for steps in EULER_STEPS:
        yield config(f"euler {steps}", FEWER_STEPS, steps=steps)
    for steps in MULTISTEP_STEPS:
        yield config(f"ab3 {steps}", MULTISTEP, steps=steps, sampler="ab3")
    for name in smaller_budgets(on, schedule):
        yield config(f"euler 50, all at {name}", SMALLER_BUDGET, schedule=name)
    for policy in bench_policies():
        for order in (0, 1):
            cache = f"{policy},order={order}"
            yield config(cache.removeprefix("static:"), CACHED, cache=cache)
    for steps in COMBINED_STEPS:
        yield config(f"ab3 {steps}, every@2", COMBINED, steps=steps, sampler="ab3", cache="static:every@2")
    parsed = Guidance.parse(guidance, on.spec)
    if parsed.guides and parsed.one_budget:
        for weak in smaller_budgets(on, schedule):
            cheap_guidance = str(parsed.with_weak(on.spec.budget(weak)))
            cheap: dict[str, Any] = {"sampler": "ab3", "guidance": cheap_guidance}
            yield config(f"ab3 14, weak at {weak}", GUIDED, steps=14, **cheap)
            yield config(f"ab3 30, weak at {weak}, every@2", GUIDED, steps=30, cache="static:every@2", **cheap)


def smaller_budgets(on: Samplable, schedule: str) -> list[str]:
    """List the named budgets below the smallest one of the schedule."""
    budget = min(resolve(on.spec, SamplingOptions(schedule=schedule)).schedule)
    covered = on.coverage.covered
    named = on.spec.named_budgets.items()
    return [name for name, smaller in named if smaller.kept < budget.kept and smaller in covered]


# ---------------------------------------------------------------- one sampling config


class CallKey(NamedTuple):
    """What the time of a graph depends on; budget and text are 0 for graphs that run no block."""

    graph: str
    kept: int
    rows: int
    text: int


def _graphs(call: Call) -> list[str]:
    """The graphs that a call runs."""
    return [*(["probe"] if call.cached.probed else []), "reuse" if call.reused else "step"]


def _key(graph: str, call: Call) -> CallKey:
    has_blocks = graph == "step"
    return CallKey(graph, call.budget.kept * has_blocks, call.rows, call.text * has_blocks)


class CallTimes:
    """The times in ms of single engine calls of a pipeline, each measured once."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._times_ms: dict[CallKey, float] = {}

    def of(self, call: Call) -> float:
        """The expected time of a call: that of the graphs it runs."""
        return sum(self.graph(name, call) for name in _graphs(call))

    def step(self, call: Call) -> float:
        """The time of `step` at the budget, rows and text length of a call."""
        return self.graph("step", call)

    def graph(self, name: str, call: Call) -> float:
        """The time of a graph at the size of a call. `reuse` and `probe` read no text and run no block."""
        key = _key(name, call)
        if key not in self._times_ms:
            self._time({key: self._runner(name, call)})
        return self._times_ms[key]

    def measure_in_turn(self, calls: Iterable[Call]) -> None:
        """Measure all the graphs that calls run, one after another in every round."""
        names = [(name, call) for call in calls for name in _graphs(call)]
        self._time({_key(name, call): self._runner(name, call) for name, call in names})

    def _time(self, runs: Mapping[CallKey, Callable[[], object]]) -> None:
        timed = timed_in_turn({repr(key): run for key, run in runs.items()}, rounds=CALL_ROUNDS)
        self._times_ms |= {key: timed[repr(key)].median_ms for key in runs}

    def _runner(self, name: str, call: Call) -> Callable[[], object]:
        spec, bank = self._pipeline.spec, self._pipeline.bank
        inputs = self._inputs(call.rows, call.text)
        if name == "step":
            return lambda: bank(call.budget, inputs)
        tokens = np.ones((call.rows, spec.tokens, spec.hidden_size), np.float32)
        if name == "probe":
            return lambda: bank.probe(inputs, tokens)
        return lambda: bank.reuse(call.budget, inputs, tokens, tokens, 1.0)

    def _inputs(self, rows: int, text: int) -> Mapping[str, HostArray]:
        spec = self._pipeline.spec
        state = {"x": np.ones((rows, *spec.sample_shape), np.float32), "t": np.full(rows, 0.5, np.float32)}
        return state | random_rows(spec, rows, text, np.random.default_rng(0))


def _row(
    config: SamplingConfig,
    samples: Sequence[Sample],
    reference: Sequence[Sample],
    expected: HostArray,
    call_times: CallTimes,
) -> SweepRow:
    calls = [call for record in samples[0].records for call in record.calls]
    images = len(samples[0].latents)
    engine_ms = statistics.median(sample.timings.engines_s for sample in samples) * 1e3
    wall_ms = statistics.median(sample.timings.total_s for sample in samples) * 1e3
    reference_ms = statistics.median(sample.timings.total_s for sample in reference) * 1e3
    return SweepRow(
        name=config.name,
        family=config.family,
        options=config.options.scalars,
        computed=sum(not call.reused for call in calls),
        reused=sum(call.reused for call in calls),
        probes=sum(call.cached.probed for call in calls),
        ms_per_image=wall_ms / images,
        engine_ms_per_image=engine_ms / images,
        over_parts=engine_ms / sum(call_times.of(call) for call in calls),
        speedup=reference_ms / wall_ms,
        sqnr_db=difference(samples[0].latents, expected).sqnr_db,
        control_db={},
    )


# ---------------------------------------------------------------- all sampling configs together


def _with_controls(row: SweepRow, rows: Sequence[SweepRow]) -> SweepRow:
    if row.family not in (CACHED, COMBINED):
        return row
    return replace(row, control_db={control: error_at(row.engine_ms_per_image, control, rows) for control in CONTROLS})


def error_at(engine_ms: float, control: str, rows: Sequence[SweepRow]) -> float | None:
    """The SQNR in dB of a control at an engine time, interpolated linearly in the logarithm of the measured times."""
    families = (control,) if control == MULTISTEP else (control, REFERENCE)  # the other controls end at 50 Euler steps
    points = sorted((row.engine_ms_per_image, row.sqnr_db) for row in rows if row.family in families)
    if not points or not points[0][0] <= engine_ms <= points[-1][0]:
        return None
    times, sqnr_db = zip(*points, strict=True)
    return float(np.interp(math.log(engine_ms), np.log(times), sqnr_db))


def best_configs(rows: Sequence[SweepRow]) -> dict[str, str]:
    """Return for each level the config with the lowest engine time whose SQNR reaches it."""
    reference = next(row for row in rows if row.family == REFERENCE)
    best = {}
    for level in LEVELS_DB:
        good = [row for row in rows if row.sqnr_db >= reference.sqnr_db + level]
        if good:  # the reference alone reaches level 0
            best[f"{level:+g} dB"] = min(good, key=lambda row: row.engine_ms_per_image).name
    return best

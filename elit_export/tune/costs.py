"""Predicts the time of a sampling from the measured times of its engine calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from elit_export.arrays import Arrays
from elit_export.backends.protocols import FunctionEngine
from elit_export.bench.cache import CallTimes
from elit_export.bench.timing import timed_in_turn
from elit_export.errors import CalibrationError, InputError
from elit_export.runtime.bank import EngineBank, Slot
from elit_export.runtime.conditioning import numbered
from elit_export.runtime.pipeline import Pipeline
from elit_export.runtime.request import Request, Samplable, prepared
from elit_export.runtime.sampling import Call, sampling_steps
from elit_export.spec import REUSE, STEP, Precision
from elit_export.tune.space import Config, Space, sampling_options

CALL_ROUNDS = 9
FEW_STEPS, MANY_STEPS = 3, 13


@dataclass(frozen=True)
class Overhead:
    """Holds the time that a sampling takes beside its engine calls: once, for each call, and for the decoder."""

    sampling_ms: float
    call_ms: float
    decode_ms: float


def predicted_ms(calls: Sequence[Call], call_ms: Callable[[Call], float], overhead: Overhead) -> float:
    """Add up the times of the calls and what surrounds them."""
    inside = sum(call_ms(call) for call in calls)
    return inside + len(calls) * overhead.call_ms + overhead.sampling_ms + overhead.decode_ms


# ---------------------------------------------------------------- the calls of a sampling


def rehearsed(on: Samplable, request: Request) -> list[Call]:
    """List the engine calls that a sampling makes, by the loop itself with engines that compute nothing."""
    return [call for record in sampling_steps(_idle_bank(on), request) for call in record.calls]


def _idle_bank(on: Samplable) -> EngineBank:
    """Return a bank with the profiles of a plan set, whose velocities are all ones.

    The step cache only reuses or not.
    """
    graphs = {name: on.spec.graph(name) for name in (STEP, REUSE)}
    step = FunctionEngine(_ones, graphs[STEP])
    reuse = FunctionEngine(lambda inputs: {"velocity": np.ones_like(inputs["x"])}, graphs[REUSE])
    slots = [Slot(profile, step) for profile in on.coverage.profiles]
    return EngineBank(slots, on.coverage.budgets, Precision.FP32, {REUSE: reuse})


def _ones(inputs: Arrays) -> Arrays:
    residual = np.zeros((len(inputs["x"]), 1, 1), np.float32)  # nothing reads it
    return {"velocity": np.ones_like(inputs["x"]), "residual": residual}


# ---------------------------------------------------------------- the times of a plan set


class Costs:
    """Measures the times of engine calls of a plan set and of what surrounds them, for samplings of `rows` images."""

    def __init__(self, pipeline: Pipeline, rows: int) -> None:
        self._pipeline, self._rows = pipeline, rows
        self._conditioning = numbered(pipeline.spec, range(rows), pipeline.coverage.text)
        self._call_times = CallTimes(pipeline)
        self._overhead = Overhead(0.0, 0.0, 0.0)

    def measure(self, plan_set: str, space: Space) -> None:
        """Time in turn every call that configs of a space make, and then samplings with few and with many steps."""
        budgets = [space.config(plan_set, "euler", 3, schedule=budget, cache=cache) for budget, cache in _probes(space)]
        unguided = [space.config(plan_set, "euler", 1, schedule=b, guidance="none") for b in space.budgets]
        probes = self.runnable([*budgets, *unguided])
        self._call_times.measure_in_turn(call for config in probes for call in self.calls(config))
        few, many = (space.config(plan_set, "euler", steps) for steps in (FEW_STEPS, MANY_STEPS))
        runs = {"few": self._run(few), "many": self._run(many), "decoder": self._decode}
        timed = timed_in_turn(runs, rounds=CALL_ROUNDS)
        medians = {name: timing.median_ms for name, timing in timed.items()}
        few_ms, many_ms = (sum(map(self._call_times.of, self.calls(config))) for config in (few, many))
        self._overhead = fitted_overhead(few_ms, many_ms, medians, few_calls=len(self.calls(few)))

    def calls(self, config: Config) -> list[Call]:
        """List the engine calls of one sampling; raises InputError where no profile takes one."""
        request = prepared(self._pipeline, self._conditioning, sampling_options(config.options))
        return rehearsed(self._pipeline, request)

    def runnable(self, configs: Iterable[Config]) -> list[Config]:
        """List the configs that the plan set can run, in their order."""
        return [config for config in configs if self._can_run(config)]

    def _can_run(self, config: Config) -> bool:
        try:
            self.calls(config)
        except (InputError, CalibrationError):  # no profile takes it
            return False
        return True

    def predicted_ms(self, config: Config) -> float:
        return predicted_ms(self.calls(config), self._call_times.of, self._overhead)

    def timed(self, configs: Mapping[str, Config], *, rounds: int) -> dict[str, float]:
        """Measure whole samplings in turn, each with its decoder: the median wall time in ms of each."""
        runs = {name: self._run(config) for name, config in configs.items()}
        return {name: each.median_ms for name, each in timed_in_turn(runs, rounds=rounds, warmup=1).items()}

    def _run(self, config: Config) -> Callable[[], object]:
        options, pipeline = sampling_options(config.options), self._pipeline

        def run() -> None:
            sample = pipeline.sampled(self._conditioning, options)
            if pipeline.makes_pictures:
                pipeline.decode(sample.latents)

        return run

    def _decode(self) -> None:
        if self._pipeline.makes_pictures:
            self._pipeline.decode(np.zeros((self._rows, *self._pipeline.spec.sample_shape)))


def fitted_overhead(few_ms: float, many_ms: float, timed_ms: Mapping[str, float], *, few_calls: int) -> Overhead:
    """Solve for the time beside calls from two samplings by Euler, whose calls alone take `few_ms` and `many_ms`.

    `few_calls` is their number in the first. `timed_ms` are the whole times of `few`, `many` and `decoder`. The time
    beside a call may be below zero, where calls in a sampling take less than alone.
    """
    decode_ms = timed_ms["decoder"]
    beside_few, beside_many = timed_ms["few"] - few_ms - decode_ms, timed_ms["many"] - many_ms - decode_ms
    share = many_ms / few_ms  # of calls in the two, as all of them are alike
    per_few = (beside_many - beside_few) / (share - 1)  # beside the calls of `few`
    return Overhead(max(0.0, beside_few - per_few), per_few / few_calls, decode_ms)


def _probes(space: Space) -> Iterable[tuple[str, str]]:
    """Samplings that between them make every sort of call: of each budget, and one that reuses."""
    yield from ((budget, "none") for budget in space.budgets)
    if space.caches:
        yield space.largest, "static:every@2"


def rounds_within(total_ms: float, budget_ms: float, *, least: int = 3, most: int = 15) -> int:
    """Return how often samplings that take so long together are repeated."""
    return max(least, min(most, int(budget_ms / max(total_ms, 1e-9))))


def off_by(predicted: float, measured: float) -> float:
    """Return the share by which a prediction misses what was measured."""
    return abs(predicted - measured) / measured

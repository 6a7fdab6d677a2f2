"""Measures what a bundle's engines cost: per budget, when switching, and over whole samplings.

Times are comparable within one result only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from elit_export.arrays import HostArray
from elit_export.bench.memory import BankMemory
from elit_export.bench.samplings import (
    Budgets,
    SamplingResult,
    budget_error,
    check_samplings,
    guided_images,
    reference_solution,
    sampling_results,
)
from elit_export.bench.stages import OnStage, Stage, run_stages
from elit_export.bench.timing import Timing, matmul_peak_gflops, resident_bytes, timed_in_turn
from elit_export.cost.flops import Cost, flops
from elit_export.errors import InputError
from elit_export.runtime.conditioning import LabelsLike, numbered, random_rows
from elit_export.runtime.pipeline import Pipeline
from elit_export.runtime.request import Samplable
from elit_export.spec import LATENTS, Budget, ModelSpec

Inputs = dict[str, HostArray]
Runner = Callable[[Inputs], object]
ENGINE = "engine"
DECODE_ROUNDS = 3


@dataclass(frozen=True)
class BudgetResult:
    """The results of one budget.

    `speedups` are the times of other runners over the engine's, by name; `flops` are for one image. "Largest" is the
    first budget of the result: full, where it is covered. `time_over_flops` is `time_over_largest` over
    `flops_over_largest`: 1 where time is proportional to FLOPs. `forward_passes_per_s` counts each row of a call; an
    image takes as many as its sampling has steps and branches. `sample_sqnr_db` compares whole samplings at this budget
    with the reference solution at the largest one, None if nothing was sampled: it says how close they come, neither
    how good they look nor how well engines match PyTorch.
    """

    name: str
    budget: str
    cost: Cost
    flops: int
    timings: dict[str, Timing]
    forward_passes_per_s: float
    gflops_per_s: float
    share_of_peak: float
    time_over_largest: float
    flops_over_largest: float
    time_over_flops: float
    speedups: dict[str, float]
    sample_sqnr_db: float | None


@dataclass(frozen=True)
class DecodeResult:
    """The time of decoding `images` images in one call, and the size of the decoder's plan on disk."""

    images: int
    ms_per_image: float
    plan_bytes: int


@dataclass(frozen=True)
class BenchResult:
    """The results of a bench.

    `switching` is the time of alternating the first and the last budget over that of running each by itself.
    `bank_bytes` is the memory of the whole bank, `bank_memory_ratio` that memory over the memory of one engine,
    `plan_bytes` the size of the plans on disk. `resident_bytes` is the memory of the whole process at the end, with its
    libraries and all that ran beside the engines. Memory is None where the system does not report it. A decoder is
    measured by itself and counts in none of these; `decode` is None where there is none.
    """

    rows: int
    peak_gflops: float
    budgets: list[BudgetResult]
    switching: float
    samplings: list[SamplingResult]
    plan_bytes: int
    bank_bytes: int | None
    bank_memory_ratio: float | None
    resident_bytes: int | None
    decode: DecodeResult | None


def bench(
    pipeline: Pipeline,
    others: Mapping[str, Runner],
    *,
    rows: int,
    rounds: int,
    sampling: bool,
    plan_bytes: int,
    decoder_bytes: int | None,
    memory: Callable[[], BankMemory | None],
    on_stage: OnStage,
) -> BenchResult:
    """Measure memory, single calls, switching and, with `sampling`, whole samplings.

    `others` are runners that take turns with the engine.
    `decoder_bytes` is the size of a decoder's plan on disk, None where there is none.
    Raises InputError before measuring if the profiles do not take the rows.
    """
    budgets = measured_budgets(pipeline)
    check_rows(pipeline, budgets, rows)
    images = range(guided_images(pipeline.spec, rows))
    conditioning = numbered(pipeline.spec, images, pipeline.coverage.text)
    if sampling:
        check_samplings(pipeline, budgets, conditioning)
    measurements = _Measurements(pipeline, others, budgets, conditioning, rows, rounds)
    stages: list[Stage] = [("memory", lambda: measurements.measure_memory(memory))]
    stages += [("matrix product", measurements.measure_peak)]
    stages += [(name, partial(measurements.time_budget, name)) for name in budgets]
    stages += [("switching", measurements.time_switching)]
    stages += (
        [("reference solution", measurements.solve_reference), ("sampling", measurements.sample)] if sampling else []
    )
    stages += [("decoder", partial(measurements.decode, decoder_bytes))] if decoder_bytes is not None else []
    run_stages(stages, on_stage)
    return measurements.result(plan_bytes)


class _Measurements:
    """The measurements of a bench so far; each method is a stage."""

    def __init__(
        self,
        pipeline: Pipeline,
        others: Mapping[str, Runner],
        budgets: Budgets,
        conditioning: LabelsLike,
        rows: int,
        rounds: int,
    ) -> None:
        self.pipeline, self.others, self.budgets = pipeline, others, budgets
        self.conditioning = conditioning
        self.rows, self.rounds = rows, rounds
        self.bank_memory: BankMemory | None = None
        self.peak_gflops = math.nan
        self.timings: dict[str, dict[str, Timing]] = {}
        self.switching = math.nan
        self.expected: HostArray | None = None
        self.errors: dict[str, float] = {}
        self.samplings: list[SamplingResult] = []
        self.decoding: DecodeResult | None = None
        self.resident: int | None = None

    def measure_memory(self, memory: Callable[[], BankMemory | None]) -> None:
        self.bank_memory = memory()

    def measure_peak(self) -> None:
        self.peak_gflops = matmul_peak_gflops()

    def time_budget(self, name: str) -> None:
        budget = self.budgets[name]
        self.timings[name] = budget_timings(self.pipeline, self.others, budget, rows=self.rows, rounds=self.rounds)
        self.resident = resident_bytes()

    def time_switching(self) -> None:
        budgets = list(self.budgets.values())
        self.switching = switching_ratio(self.pipeline, budgets, rows=self.rows, rounds=self.rounds)

    def solve_reference(self) -> None:
        self.expected = reference_solution(self.pipeline, self.budgets, self.conditioning)

    def sample(self) -> None:
        assert self.expected is not None
        self.errors = {
            name: budget_error(self.pipeline, name, self.conditioning, self.expected) for name in self.budgets
        }
        self.samplings = list(sampling_results(self.pipeline, self.budgets, self.conditioning, self.expected))
        self.resident = resident_bytes()

    def decode(self, plan_bytes: int) -> None:
        images = len(self.conditioning)
        self.decoding = DecodeResult(images, decode_ms(self.pipeline, images), plan_bytes)

    def result(self, plan_bytes: int) -> BenchResult:
        text = self.pipeline.coverage.tokens
        budgets = budget_results(
            self.pipeline.spec, self.budgets, self.timings, rows=self.rows, text=text, peak=self.peak_gflops
        )
        return BenchResult(
            rows=self.rows,
            peak_gflops=self.peak_gflops,
            budgets=[replace(budget, sample_sqnr_db=self.errors.get(budget.name)) for budget in budgets],
            switching=self.switching,
            samplings=self.samplings,
            plan_bytes=plan_bytes,
            bank_bytes=self.bank_memory.whole_bytes if self.bank_memory else None,
            bank_memory_ratio=self.bank_memory.ratio if self.bank_memory else None,
            resident_bytes=self.resident,
            decode=self.decoding,
        )


def measured_budgets(on: Samplable) -> Budgets:
    """List the named budgets that are covered, and the largest covered one."""
    covered = on.coverage.covered
    named = {name: budget for name, budget in on.spec.named_budgets.items() if budget in covered}
    return named if covered[-1] in named.values() else {str(covered[-1]): covered[-1], **named}


def check_rows(on: Samplable, budgets: Budgets, rows: int) -> None:
    """Raise InputError for rows that no profile takes at one of the budgets; needs no engines."""
    try:
        for budget in budgets.values():
            on.coverage.profile_for(budget, rows, on.coverage.tokens)
    except InputError as error:
        raise InputError(
            f"a bench of {rows} rows a call does not fit: {error.problem}", "choose other --rows"
        ) from error


# ---------------------------------------------------------------- one budget


def budget_timings(
    pipeline: Pipeline, others: Mapping[str, Runner], budget: Budget, *, rows: int, rounds: int
) -> dict[str, Timing]:
    inputs = bench_inputs(pipeline, budget, rows)
    runners: dict[str, Runner] = {ENGINE: engine_runner(pipeline, budget), **others}
    return timed_in_turn({name: _bound(runner, inputs) for name, runner in runners.items()}, rounds=rounds)


def budget_results(
    spec: ModelSpec, budgets: Budgets, timings: Mapping[str, dict[str, Timing]], *, rows: int, text: int, peak: float
) -> Iterator[BudgetResult]:
    largest, *_ = budgets
    largest_flops = flops(spec, budgets[largest], text=text).total
    for name, budget in budgets.items():
        cost = flops(spec, budget, text=text)
        engine_ms = timings[name][ENGINE].median_ms
        gflops = cost.total * rows / engine_ms / 1e6
        time_over_largest = engine_ms / timings[largest][ENGINE].median_ms
        flops_over_largest = cost.total / largest_flops
        yield BudgetResult(
            name=name,
            budget=str(budget),
            cost=cost,
            flops=cost.total,
            timings=timings[name],
            forward_passes_per_s=rows / engine_ms * 1e3,
            gflops_per_s=gflops,
            share_of_peak=gflops / peak,
            time_over_largest=time_over_largest,
            flops_over_largest=flops_over_largest,
            time_over_flops=time_over_largest / flops_over_largest,
            speedups={key: timing.median_ms / engine_ms for key, timing in timings[name].items() if key != ENGINE},
            sample_sqnr_db=None,
        )


def _bound(runner: Runner, inputs: Inputs) -> Callable[[], object]:
    return lambda: runner(inputs)


def engine_runner(pipeline: Pipeline, budget: Budget) -> Runner:
    def run(inputs: Inputs) -> object:
        return pipeline.bank(budget, {name: array for name, array in inputs.items() if name != LATENTS})

    return run


def bench_inputs(pipeline: Pipeline, budget: Budget, rows: int) -> Inputs:
    spec = pipeline.spec
    generator = np.random.default_rng(0)
    return {
        "x": generator.standard_normal((rows, *spec.sample_shape)).astype(np.float32),
        "t": np.full(rows, 0.5, np.float32),
        **random_rows(spec, rows, pipeline.coverage.tokens, generator),
        LATENTS: np.arange(budget.kept),
    }


# ---------------------------------------------------------------- decoder


def decode_ms(pipeline: Pipeline, images: int) -> float:
    """The time per image, of few rounds: a decoder may take longer than all steps of a sampling."""
    latents = np.random.default_rng(0).standard_normal((images, *pipeline.spec.sample_shape))
    timing = timed_in_turn({"": lambda: pipeline.decode(latents)}, rounds=DECODE_ROUNDS, warmup=1)[""]
    return timing.median_ms / images


# ---------------------------------------------------------------- switching


def switching_ratio(pipeline: Pipeline, budgets: Sequence[Budget], *, rows: int, rounds: int) -> float:
    """The time of the budgets largest, smallest, largest, smallest over that of largest twice, then smallest twice."""
    large, small = (
        _bound(engine_runner(pipeline, budget), bench_inputs(pipeline, budget, rows))
        for budget in (budgets[0], budgets[-1])
    )

    def run(*order: Callable[[], object]) -> Callable[[], None]:
        def run_all() -> None:
            for call in order:
                call()

        return run_all

    timings = timed_in_turn(
        {"alternating": run(large, small, large, small), "steady": run(large, large, small, small)}, rounds=rounds
    )
    return timings["alternating"].median_ms / timings["steady"].median_ms

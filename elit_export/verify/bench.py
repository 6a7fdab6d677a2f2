"""What a bundle's engines cost: per budget, when switching, and over whole samplings.

Takes: a pipeline, optionally its PyTorch model.  Gives: a BenchResult.  May touch: nothing.
Times are comparable within one result only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from elit_export.models.cost import Cost, flops, flops_per_image
from elit_export.runtime.engine import HostArray
from elit_export.runtime.pipeline import Choices, Pipeline
from elit_export.spec import LATENTS, Budget, ModelSpec
from elit_export.verify.metrics import difference
from elit_export.verify.timing import Timing, matmul_peak_gflops, resident_bytes, timed_in_turn

Inputs = dict[str, HostArray]
Runner = Callable[[Inputs], object]
ENGINE = "engine"
FINE_STEPS = 100
GUIDANCE = "cfg:2"
FAST = Choices(steps=14, sampler="ab3", guidance=GUIDANCE)  # 15 calls


@dataclass(frozen=True)
class BudgetResult:
    """One budget. `speedups` are times of other runners over the engine's, by name.

    `sample_sqnr_db` is the error of whole samplings at this budget against a fine one at the full budget,
    None if nothing was sampled.
    """

    name: str
    budget: str
    cost: Cost
    timings: dict[str, Timing]
    images_per_s: float
    gflops_per_s: float
    share_of_peak: float
    speedups: dict[str, float]
    sample_sqnr_db: float | None


@dataclass(frozen=True)
class SamplingResult:
    """One way to sample; `speedup` is the time of the first way over this one's.

    `sqnr_db` compares the final images with a fine solution at the first way's guidance and budget.
    """

    name: str
    choices: dict[str, str | int]
    ms_per_image: float
    flops_per_image: float
    outside_engines: float
    speedup: float
    sqnr_db: float


@dataclass(frozen=True)
class BenchResult:
    """All of a bench. `switching` is the time of alternating two budgets over that of running each by itself."""

    rows: int
    peak_gflops: float
    budgets: list[BudgetResult]
    switching: float
    samplings: list[SamplingResult]
    resident_bytes: int | None


def bench(
    pipeline: Pipeline,
    others: Mapping[str, Runner],
    *,
    rows: int,
    rounds: int,
    sampling: bool,
    on_stage: Callable[[str], None],
) -> BenchResult:
    """Measure everything, whole samplings only with `sampling`; `others` run in turn with the engine."""
    on_stage("matrix product")
    peak = matmul_peak_gflops()
    budgets = []
    for name, budget in pipeline.spec.named_budgets.items():
        if budget in pipeline.bank.covered:
            on_stage(name)
            timed = budget_timings(pipeline, others, budget, rows=rows, rounds=rounds)
            budgets.append(budget_result(pipeline.spec, name, budget, timed, rows, peak))
    on_stage("switching")
    switching = switching_ratio(pipeline, rows=rows, rounds=rounds)
    if not sampling:
        return BenchResult(rows, peak, budgets, switching, [], resident_bytes())
    on_stage("fine solution")
    labels = [image % pipeline.spec.num_classes for image in range(max(1, rows // 2))]  # cfg doubles the rows
    exact = pipeline.sample(labels, sampler="heun", steps=FINE_STEPS, guidance=GUIDANCE).latents
    on_stage("sampling")
    budgets = [replace(result, sample_sqnr_db=budget_error(pipeline, result, labels, exact)) for result in budgets]
    samplings = list(sampling_results(pipeline, labels, exact))
    return BenchResult(rows, peak, budgets, switching, samplings, resident_bytes())


# ---------------------------------------------------------------- one budget


def budget_timings(
    pipeline: Pipeline, others: Mapping[str, Runner], budget: Budget, *, rows: int, rounds: int
) -> dict[str, Timing]:
    inputs = bench_inputs(pipeline.spec, budget, rows)
    runners: dict[str, Runner] = {ENGINE: engine_runner(pipeline, budget), **others}
    return timed_in_turn({name: _bound(runner, inputs) for name, runner in runners.items()}, rounds=rounds)


def budget_result(
    spec: ModelSpec, name: str, budget: Budget, timings: dict[str, Timing], rows: int, peak: float
) -> BudgetResult:
    cost = flops(spec, budget)
    engine_ms = timings[ENGINE].median_ms
    gflops = cost.total * rows / engine_ms / 1e6
    return BudgetResult(
        name=name,
        budget=str(budget),
        cost=cost,
        timings=timings,
        images_per_s=rows / engine_ms * 1e3,
        gflops_per_s=gflops,
        share_of_peak=gflops / peak,
        speedups={key: timing.median_ms / engine_ms for key, timing in timings.items() if key != ENGINE},
        sample_sqnr_db=None,
    )


def budget_error(pipeline: Pipeline, result: BudgetResult, labels: Sequence[int], exact: HostArray) -> float:
    sampled = pipeline.sample(labels, **Choices(**{**FAST, "schedule": result.budget}))
    return difference(sampled.latents, exact).sqnr_db


def _bound(runner: Runner, inputs: Inputs) -> Callable[[], object]:
    return lambda: runner(inputs)


def engine_runner(pipeline: Pipeline, budget: Budget) -> Runner:
    def run(inputs: Inputs) -> object:
        return pipeline.bank(budget, {name: array for name, array in inputs.items() if name != LATENTS})

    return run


def bench_inputs(spec: ModelSpec, budget: Budget, rows: int) -> Inputs:
    generator = np.random.default_rng(0)
    return {
        "x": generator.standard_normal((rows, *spec.sample_shape)).astype(np.float32),
        "t": np.full(rows, 0.5, np.float32),
        spec.conditioning[0].name: generator.integers(0, spec.num_classes, rows),
        LATENTS: np.arange(budget.kept),
    }


# ---------------------------------------------------------------- switching


def switching_ratio(pipeline: Pipeline, *, rows: int, rounds: int) -> float:
    """Time of largest, smallest, largest, smallest over that of largest twice and smallest twice."""
    budgets = (pipeline.bank.covered[-1], pipeline.bank.covered[0])
    calls = [_bound(engine_runner(pipeline, budget), bench_inputs(pipeline.spec, budget, rows)) for budget in budgets]
    large, small = calls

    def run(*order: Callable[[], object]) -> Callable[[], None]:
        def all_of_them() -> None:
            for call in order:
                call()

        return all_of_them

    timings = timed_in_turn(
        {"alternating": run(large, small, large, small), "steady": run(large, large, small, small)}, rounds=rounds
    )
    return timings["alternating"].median_ms / timings["steady"].median_ms


# ---------------------------------------------------------------- whole samplings


def sampling_ways(spec: ModelSpec) -> Iterator[tuple[str, Choices]]:
    """The reference first: 50 Euler steps with classifier-free guidance at the full budget."""
    lowest = list(spec.named_budgets)[-1]
    middle = "quarter" if "quarter" in spec.named_budgets else lowest
    half = FAST["steps"] // 2
    mixed = f"0-{half - 1}:{middle},{half}-{FAST['steps'] - 1}:full"
    cheap = f"ccfg:2@{lowest}"
    yield "euler 50", Choices(steps=50, sampler="euler", guidance=GUIDANCE)
    yield "ab3 14", FAST
    yield f"ab3 14, weak at {lowest}", Choices(**{**FAST, "guidance": cheap})
    yield f"ab3 14, {middle} then full, weak at {lowest}", Choices(**{**FAST, "guidance": cheap, "schedule": mixed})
    yield f"ab3 14, all at {lowest}", Choices(**{**FAST, "schedule": lowest})


def sampling_results(pipeline: Pipeline, labels: Sequence[int], exact: HostArray) -> Iterator[SamplingResult]:
    """Every way on the same noise and labels."""
    first_ms = 0.0
    for name, choices in sampling_ways(pipeline.spec):
        sample = pipeline.sample(labels, **choices)
        first_ms = first_ms or sample.ms_per_image
        yield SamplingResult(
            name=name,
            choices={key: value for key, value in choices.items() if isinstance(value, str | int)},
            ms_per_image=sample.ms_per_image,
            flops_per_image=flops_per_image(sample, pipeline.spec),
            outside_engines=1 - sample.timings.engines_s / sample.timings.total_s,
            speedup=first_ms / sample.ms_per_image,
            sqnr_db=difference(sample.latents, exact).sqnr_db,
        )

"""What a bundle's engines cost: per budget, when switching, and over whole samplings.

Takes: a pipeline, other functions of a step's inputs to time beside it (PyTorch, say), how to measure its memory.
Gives: a BenchResult.  May touch: nothing.
Times are comparable within one result only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from elit_export.errors import InputError
from elit_export.models.cost import Cost, flops, flops_per_image
from elit_export.runtime.choices import Choices
from elit_export.runtime.engine import HostArray
from elit_export.runtime.pipeline import Pipeline, Subjects
from elit_export.spec import LATENTS, Budget, ModelSpec
from elit_export.verify.memory import BankMemory
from elit_export.verify.metrics import difference
from elit_export.verify.subjects import conditioning_rows, subjects_of, text_of, tokens_of
from elit_export.verify.timing import Timing, matmul_peak_gflops, resident_bytes, timed_in_turn

Inputs = dict[str, HostArray]
Runner = Callable[[Inputs], object]
Budgets = Mapping[str, Budget]  # by the name that a schedule takes, largest first
ENGINE = "engine"
GUIDANCE = "cfg:2"
FAST = Choices(steps=14, sampler="ab3", guidance=GUIDANCE)  # 15 calls
DECODE_ROUNDS = 3
FINE_STEPS = 100  # Heun's, of the solution that ways to sample are compared with


@dataclass(frozen=True)
class BudgetResult:
    """One budget. `speedups` are times of other runners over the engine's, by name; `flops` are of one image.

    "Largest" is the first budget of the result: full, where it is covered. `time_over_flops` is
    `time_over_largest` over `flops_over_largest`, 1 where time follows FLOPs.
    `sample_sqnr_db` is the error of whole samplings at this budget against a fine one at the largest,
    None if nothing was sampled.
    """

    name: str
    budget: str
    cost: Cost
    flops: int
    timings: dict[str, Timing]
    images_per_s: float
    gflops_per_s: float
    share_of_peak: float
    time_over_largest: float
    flops_over_largest: float
    time_over_flops: float
    speedups: dict[str, float]
    sample_sqnr_db: float | None


@dataclass(frozen=True)
class SamplingResult:
    """One way to sample; `speedup` is the time of the first way over this one's.

    `outside_engines` is the share of the time, `outside_ms_per_step` the time of a step that all images share.
    `sqnr_db` compares the final images with a fine solution at the first way's guidance and budget.
    """

    name: str
    choices: dict[str, str | int]
    ms_per_image: float
    flops_per_image: float
    outside_engines: float
    outside_ms_per_step: float
    speedup: float
    sqnr_db: float


@dataclass(frozen=True)
class DecodeResult:
    """Pictures of `images` latents at once by the decoder, and what its plan takes on disk."""

    images: int
    ms_per_image: float
    plan_bytes: int


@dataclass(frozen=True)
class BenchResult:
    """All of a bench.

    `switching` is the time of alternating the first and the last budget over that of running each by itself.
    `bank_bytes` is what the whole bank holds, `bank_memory_ratio` that over what one engine of it does, `plan_bytes`
    what its plans take on disk. `resident_bytes` is the whole process at the end, with its libraries and whatever ran
    beside the engines. Both are None where the system does not tell. None of these counts a decoder, which is measured
    by itself; `decode` is None where there is none.
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
    on_stage: Callable[[str], None],
) -> BenchResult:
    """Measure everything, whole samplings only with `sampling`; `others` run in turn with the engine.

    `decoder_bytes` is what the plan of a decoder takes on disk, None where there is none.
    Raises InputError before measuring if the profiles do not take the rows.
    """
    budgets = measured_budgets(pipeline)
    subjects = subjects_of(pipeline.spec, range(max(1, rows // 2)), text_of(pipeline))  # cfg doubles the rows
    check_rows(pipeline, budgets, rows)
    if sampling:
        check_samplings(pipeline, budgets, subjects)
    on_stage("memory")
    held = memory()
    on_stage("matrix product")
    peak = matmul_peak_gflops()
    timed = {}
    for name, budget in budgets.items():
        on_stage(name)
        timed[name] = budget_timings(pipeline, others, budget, rows=rows, rounds=rounds)
    results = list(budget_results(pipeline.spec, budgets, timed, rows=rows, text=tokens_of(pipeline), peak=peak))
    on_stage("switching")
    switching = switching_ratio(pipeline, list(budgets.values()), rows=rows, rounds=rounds)
    samplings: list[SamplingResult] = []
    if sampling:
        on_stage("fine solution")
        exact = pipeline.sample(subjects, **fine_choices(budgets)).latents
        on_stage("sampling")
        results = [
            replace(result, sample_sqnr_db=budget_error(pipeline, result, subjects, exact)) for result in results
        ]
        samplings = list(sampling_results(pipeline, budgets, subjects, exact))
    resident = resident_bytes()
    decode = None
    if decoder_bytes is not None:
        on_stage("decoder")
        decode = DecodeResult(len(subjects), decode_ms(pipeline, len(subjects)), decoder_bytes)
    return BenchResult(
        rows=rows,
        peak_gflops=peak,
        budgets=results,
        switching=switching,
        samplings=samplings,
        plan_bytes=plan_bytes,
        bank_bytes=held.whole_bytes if held else None,
        bank_memory_ratio=held.ratio if held else None,
        resident_bytes=resident,
        decode=decode,
    )


def measured_budgets(pipeline: Pipeline) -> Budgets:
    """The largest budget that is covered, and the named ones that are."""
    covered = pipeline.bank.covered
    named = {name: budget for name, budget in pipeline.spec.named_budgets.items() if budget in covered}
    return named if covered[-1] in named.values() else {str(covered[-1]): covered[-1], **named}


def check_rows(pipeline: Pipeline, budgets: Budgets, rows: int) -> None:
    try:
        for budget in budgets.values():
            pipeline.bank.slot_for(budget, rows, tokens_of(pipeline))
    except InputError as error:
        raise InputError(f"a bench of {rows} rows a call does not fit: {error}; choose other --rows") from error


def check_samplings(pipeline: Pipeline, budgets: Budgets, subjects: Subjects) -> None:
    ways = [choices for _, choices in sampling_ways(budgets)]
    try:
        for choices in (fine_choices(budgets), *map(fast_choices, budgets), *ways):
            pipeline.steps(subjects, **choices).close()  # checked, not run
    except InputError as error:
        raise InputError(f"whole samplings do not fit: {error}; leave them out with --no-sampling") from error


# ---------------------------------------------------------------- one budget


def budget_timings(
    pipeline: Pipeline, others: Mapping[str, Runner], budget: Budget, *, rows: int, rounds: int
) -> dict[str, Timing]:
    inputs = bench_inputs(pipeline, budget, rows)
    runners: dict[str, Runner] = {ENGINE: engine_runner(pipeline, budget), **others}
    return timed_in_turn({name: _bound(runner, inputs) for name, runner in runners.items()}, rounds=rounds)


def budget_results(
    spec: ModelSpec, budgets: Budgets, timed: Mapping[str, dict[str, Timing]], *, rows: int, text: int, peak: float
) -> Iterator[BudgetResult]:
    largest, *_ = budgets
    most = flops(spec, budgets[largest], text=text).total
    for name, budget in budgets.items():
        cost = flops(spec, budget, text=text)
        engine_ms = timed[name][ENGINE].median_ms
        gflops = cost.total * rows / engine_ms / 1e6
        time_over_largest = engine_ms / timed[largest][ENGINE].median_ms
        flops_over_largest = cost.total / most
        yield BudgetResult(
            name=name,
            budget=str(budget),
            cost=cost,
            flops=cost.total,
            timings=timed[name],
            images_per_s=rows / engine_ms * 1e3,
            gflops_per_s=gflops,
            share_of_peak=gflops / peak,
            time_over_largest=time_over_largest,
            flops_over_largest=flops_over_largest,
            time_over_flops=time_over_largest / flops_over_largest,
            speedups={key: timing.median_ms / engine_ms for key, timing in timed[name].items() if key != ENGINE},
            sample_sqnr_db=None,
        )


def budget_error(pipeline: Pipeline, result: BudgetResult, subjects: Subjects, exact: HostArray) -> float:
    return difference(pipeline.sample(subjects, **fast_choices(result.name)).latents, exact).sqnr_db


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
        **conditioning_rows(spec, rows, tokens_of(pipeline), generator),
        LATENTS: np.arange(budget.kept),
    }


# ---------------------------------------------------------------- decoder


def decode_ms(pipeline: Pipeline, images: int) -> float:
    """Per image; a few rounds, because a decoder may take longer than all steps of a sampling."""
    latents = np.random.default_rng(0).standard_normal((images, *pipeline.spec.sample_shape))
    timing = timed_in_turn({"": lambda: pipeline.decode(latents)}, rounds=DECODE_ROUNDS, warmup=1)[""]
    return timing.median_ms / images


# ---------------------------------------------------------------- switching


def switching_ratio(pipeline: Pipeline, budgets: Sequence[Budget], *, rows: int, rounds: int) -> float:
    """Time of largest, smallest, largest, smallest over that of largest twice and smallest twice."""
    large, small = (
        _bound(engine_runner(pipeline, budget), bench_inputs(pipeline, budget, rows))
        for budget in (budgets[0], budgets[-1])
    )

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


def fast_choices(schedule: str) -> Choices:
    return Choices(**{**FAST, "schedule": schedule})


def fine_choices(budgets: Budgets) -> Choices:
    """What all ways to sample are compared with."""
    largest, *_ = budgets
    return Choices(steps=FINE_STEPS, sampler="heun", guidance=GUIDANCE, schedule=largest)


def sampling_ways(budgets: Budgets) -> Iterator[tuple[str, Choices]]:
    """The reference first: 50 Euler steps with classifier-free guidance at the largest budget."""
    largest, *smaller = budgets
    yield "euler 50", Choices(steps=50, sampler="euler", guidance=GUIDANCE, schedule=largest)
    yield "ab3 14", fast_choices(largest)
    if not smaller:
        return
    lowest = smaller[-1]
    middle = "quarter" if "quarter" in smaller else lowest
    half = FAST["steps"] // 2
    mixed = f"0-{half - 1}:{middle},{half}-{FAST['steps'] - 1}:{largest}"
    cheap = f"ccfg:2@{lowest}"
    yield f"ab3 14, weak at {lowest}", Choices(**{**fast_choices(largest), "guidance": cheap})
    yield f"ab3 14, {middle} then {largest}, weak at {lowest}", Choices(**{**fast_choices(mixed), "guidance": cheap})
    yield f"ab3 14, all at {lowest}", fast_choices(lowest)


def sampling_results(
    pipeline: Pipeline, budgets: Budgets, subjects: Subjects, exact: HostArray
) -> Iterator[SamplingResult]:
    """Every way on the same noise, labels or prompts."""
    first_ms = 0.0
    for name, choices in sampling_ways(budgets):
        sample = pipeline.sample(subjects, **choices)
        first_ms = first_ms or sample.ms_per_image
        outside_s = sample.timings.total_s - sample.timings.engines_s
        yield SamplingResult(
            name=name,
            choices={key: value for key, value in choices.items() if isinstance(value, str | int)},
            ms_per_image=sample.ms_per_image,
            flops_per_image=flops_per_image(sample, pipeline.spec),
            outside_engines=outside_s / sample.timings.total_s,
            outside_ms_per_step=outside_s * 1e3 / len(sample.records),
            speedup=first_ms / sample.ms_per_image,
            sqnr_db=difference(sample.latents, exact).sqnr_db,
        )

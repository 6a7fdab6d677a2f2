"""What whole samplings cost, and how far they are from a fine solution."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from elit_export.arrays import HostArray
from elit_export.cost.flops import flops_per_image
from elit_export.errors import InputError
from elit_export.runtime.choices import Choices
from elit_export.runtime.pipeline import Pipeline, Subjects
from elit_export.spec import Budget
from elit_export.verify.metrics import difference

Budgets = Mapping[str, Budget]  # by the name that a schedule takes, largest first
GUIDANCE = "cfg:2"
FAST = Choices(steps=14, sampler="ab3", guidance=GUIDANCE)  # 15 calls
FINE_STEPS = 100  # Heun's, of the solution that ways to sample are compared with


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


def check_samplings(pipeline: Pipeline, budgets: Budgets, subjects: Subjects) -> None:
    ways = [choices for _, choices in sampling_ways(budgets)]
    try:
        for choices in (fine_choices(budgets), *map(fast_choices, budgets), *ways):
            pipeline.steps(subjects, **choices).close()  # checked, not run
    except InputError as error:
        raise InputError(f"whole samplings do not fit: {error}; leave them out with --no-sampling") from error


def budget_error(pipeline: Pipeline, name: str, subjects: Subjects, exact: HostArray) -> float:
    return difference(pipeline.sample(subjects, **fast_choices(name)).latents, exact).sqnr_db


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

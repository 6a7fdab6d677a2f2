"""Measures what whole samplings cost, and their error against a reference solution."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from elit_export.arrays import HostArray
from elit_export.cost.flops import flops_per_image
from elit_export.errors import InputError
from elit_export.runtime.conditioning import LabelsLike
from elit_export.runtime.guidance import Guidance
from elit_export.runtime.options import SamplingOptions
from elit_export.runtime.pipeline import Pipeline
from elit_export.spec import Budget, ModelSpec
from elit_export.verify.metrics import difference

Budgets = Mapping[str, Budget]  # by the name that a schedule takes, largest first
GUIDANCE = "cfg:2"
FAST_STEPS = 14
FAST = SamplingOptions(steps=FAST_STEPS, sampler="ab3", guidance=GUIDANCE)
REFERENCE_STEPS = 100  # of Heun: the solution that sampling configs are compared with


@dataclass(frozen=True)
class SamplingResult:
    """The results of one sampling config; `speedup` is the time of the first config over this one's.

    `outside_engines` is the share of the time spent outside engines, `outside_ms_per_step` that time for one step of
    all images. `sqnr_db` compares the final images with the reference solution at the first config's guidance and
    budget.
    """

    name: str
    options: dict[str, str | float]
    ms_per_image: float
    flops_per_image: float
    outside_engines: float
    outside_ms_per_step: float
    speedup: float
    sqnr_db: float


def guided_images(spec: ModelSpec, rows: int) -> int:
    """The number of images of a guided sampling whose calls have so many rows."""
    return max(1, rows // Guidance.parse(GUIDANCE, spec).rows_per_image(spec.full))


def check_samplings(pipeline: Pipeline, budgets: Budgets, conditioning: LabelsLike) -> None:
    configs = [options for _, options in sampling_configs(budgets)]
    try:
        for options in (reference_options(budgets), *map(fast_options, budgets), *configs):
            pipeline.prepared(conditioning, options)
    except InputError as error:
        raise InputError(f"whole samplings do not fit: {error.problem}", "leave them out with --no-sampling") from error


def reference_solution(pipeline: Pipeline, budgets: Budgets, conditioning: LabelsLike) -> HostArray:
    """Sample with the reference options; returns latents."""
    return pipeline.sampled(conditioning, reference_options(budgets)).latents


def budget_error(pipeline: Pipeline, name: str, conditioning: LabelsLike, expected: HostArray) -> float:
    return difference(pipeline.sampled(conditioning, fast_options(name)).latents, expected).sqnr_db


def fast_options(schedule: str) -> SamplingOptions:
    return replace(FAST, schedule=schedule)


def reference_options(budgets: Budgets) -> SamplingOptions:
    """The options of the reference solution, which all sampling configs are compared with."""
    largest, *_ = budgets
    return SamplingOptions(steps=REFERENCE_STEPS, sampler="heun", guidance=GUIDANCE, schedule=largest)


def sampling_configs(budgets: Budgets) -> Iterator[tuple[str, SamplingOptions]]:
    """Yield names and options; first 50 Euler steps with classifier-free guidance at the largest budget."""
    largest, *smaller = budgets
    yield "euler 50", SamplingOptions(steps=50, sampler="euler", guidance=GUIDANCE, schedule=largest)
    yield "ab3 14", fast_options(largest)
    if not smaller:
        return
    lowest = smaller[-1]
    middle = "quarter" if "quarter" in smaller else lowest
    half = FAST_STEPS // 2
    mixed = f"0-{half - 1}:{middle},{half}-{FAST_STEPS - 1}:{largest}"
    cheap = f"ccfg:2@{lowest}"
    yield f"ab3 14, weak at {lowest}", replace(fast_options(largest), guidance=cheap)
    yield f"ab3 14, {middle} then {largest}, weak at {lowest}", replace(fast_options(mixed), guidance=cheap)
    yield f"ab3 14, all at {lowest}", fast_options(lowest)


def sampling_results(
    pipeline: Pipeline, budgets: Budgets, conditioning: LabelsLike, expected: HostArray
) -> Iterator[SamplingResult]:
    """Run every sampling config on the same noise, labels or prompts."""
    first_ms = 0.0
    for name, options in sampling_configs(budgets):
        sample = pipeline.sampled(conditioning, options)
        first_ms = first_ms or sample.ms_per_image
        outside_s = sample.timings.total_s - sample.timings.engines_s
        yield SamplingResult(
            name=name,
            options=options.scalars,
            ms_per_image=sample.ms_per_image,
            flops_per_image=flops_per_image(sample, pipeline.spec),
            outside_engines=outside_s / sample.timings.total_s,
            outside_ms_per_step=outside_s * 1e3 / len(sample.records),
            speedup=first_ms / sample.ms_per_image,
            sqnr_db=difference(sample.latents, expected).sqnr_db,
        )

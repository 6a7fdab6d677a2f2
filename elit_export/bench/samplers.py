"""Measures the error of each sampler against a reference solution of the model's ODE.

The reference solution is Heun's with many steps from the same noise; errors are those of the final sample.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from elit_export.runtime.conditioning import LabelsLike
from elit_export.runtime.options import SamplingOptions
from elit_export.runtime.pipeline import Pipeline
from elit_export.runtime.samplers import SAMPLERS
from elit_export.verify.metrics import difference

REFERENCE_STEPS = 200  # of Heun
EULER_STEPS = 50
MAX_CALLS = (15, 20, 25)  # of each block
# (sampler, steps): 50 Euler steps, then in each block the samplers that draw no noise.
COMPARED = (
    ("euler", EULER_STEPS),
    *(
        (sampler.name, steps)
        for calls in MAX_CALLS
        for sampler in SAMPLERS.values()
        if not sampler.uses_noise and (steps := sampler.steps_within(calls))
    ),
)


@dataclass(frozen=True)
class SamplerError:
    """The error of a sampler's final sample; `calls` counts velocity evaluations."""

    sampler: str
    steps: int
    calls: int
    sqnr_db: float


def sampler_errors(
    pipeline: Pipeline, conditioning: LabelsLike, *, schedule: str, guidance: str, seed: int
) -> Iterator[SamplerError]:
    """Compare all samplers on the same noise."""
    reference = SamplingOptions(sampler="heun", steps=REFERENCE_STEPS, schedule=schedule, guidance=guidance, seed=seed)
    expected = pipeline.sampled(conditioning, reference).latents
    for sampler, steps in COMPARED:
        options = replace(reference, sampler=sampler, steps=steps)
        sample = pipeline.sampled(conditioning, options)
        calls = SAMPLERS[sampler].calls(steps)
        yield SamplerError(sampler, steps, calls, difference(sample.latents, expected).sqnr_db)

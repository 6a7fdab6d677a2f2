"""How far each sampler is from the exact solution of the model's ODE.

The exact solution is Heun's with many steps from the same noise; errors are of the final sample.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from elit_export.runtime.conditioning import LabelsLike
from elit_export.runtime.options import SamplingOptions
from elit_export.runtime.pipeline import Pipeline
from elit_export.runtime.samplers import SAMPLERS
from elit_export.verify.metrics import difference

EXACT_STEPS = 200  # Heun's, of the solution that samplers are measured against
EULER_STEPS = 50
CALLS = (15, 20, 25)  # the most of each block
# (sampler, steps): after the reference of 50 Euler steps, in each block those that draw no noise.
COMPARED = (
    ("euler", EULER_STEPS),
    *(
        (sampler.name, steps)
        for calls in CALLS
        for sampler in SAMPLERS.values()
        if not sampler.uses_noise and (steps := sampler.steps_within(calls))
    ),
)


@dataclass(frozen=True)
class SolverError:
    """Error of the final sample; `calls` counts velocity evaluations."""

    sampler: str
    steps: int
    calls: int
    sqnr_db: float


def solver_errors(
    pipeline: Pipeline, conditioning: LabelsLike, *, schedule: str, guidance: str, seed: int
) -> Iterator[SolverError]:
    """Compare all samplers on the same noise."""
    exact = SamplingOptions(sampler="heun", steps=EXACT_STEPS, schedule=schedule, guidance=guidance, seed=seed)
    expected = pipeline.sampled(conditioning, exact).latents
    for sampler, steps in COMPARED:
        options = replace(exact, sampler=sampler, steps=steps)
        sample = pipeline.sampled(conditioning, options)
        calls = SAMPLERS[sampler].calls(steps)
        yield SolverError(sampler, steps, calls, difference(sample.latents, expected).sqnr_db)

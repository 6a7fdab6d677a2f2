"""How far each sampler is from the exact solution of the model's ODE.

The exact solution is Heun's with many steps from the same noise; errors are of the final sample.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from elit_export.runtime.pipeline import Pipeline, Subjects
from elit_export.runtime.samplers import SAMPLERS
from elit_export.verify.metrics import difference

EXACT_STEPS = 200  # Heun's, of the solution that samplers are measured against
EULER_STEPS = 50
# (sampler, steps): about as many calls in each block, after the reference of 50 Euler steps.
COMPARED = (
    ("euler", EULER_STEPS),
    *(("euler", 15), ("heun", 8), ("ab2", 15), ("ab3", 14)),
    *(("euler", 20), ("heun", 10), ("ab2", 20), ("ab3", 19)),
    *(("euler", 25), ("heun", 13), ("ab2", 25), ("ab3", 24)),
)


@dataclass(frozen=True)
class SolverError:
    """Error of the final sample; `calls` counts velocity evaluations."""

    sampler: str
    steps: int
    calls: int
    sqnr_db: float


def solver_errors(
    pipeline: Pipeline, subjects: Subjects, *, schedule: str, guidance: str, seed: int
) -> Iterator[SolverError]:
    """Compare all samplers on the same noise."""
    exact = pipeline.sample(
        subjects, sampler="heun", steps=EXACT_STEPS, schedule=schedule, guidance=guidance, seed=seed
    ).latents
    for sampler, steps in COMPARED:
        found = pipeline.sample(subjects, sampler=sampler, steps=steps, schedule=schedule, guidance=guidance, seed=seed)
        calls = SAMPLERS[sampler].calls(steps)
        yield SolverError(sampler, steps, calls, difference(found.latents, exact).sqnr_db)

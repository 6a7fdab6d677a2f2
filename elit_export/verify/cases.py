"""Which inputs engines are compared on: single steps at every profile's corners, and short trajectories.

Takes: profiles.  Gives: cases and their inputs.  May touch: nothing; needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from elit_export.bundle import ReferenceCase, ReferenceTrajectory
from elit_export.runtime.pipeline import Pipeline
from elit_export.spec import ModelSpec, Profile

Arrays = dict[str, npt.NDArray[Any]]
REFERENCE_FILE = "reference.npz"
INPUT_SEED = 20261122
TRAJECTORY_STEPS = 4


# ---------------------------------------------------------------- single steps


def reference_cases(profiles: Sequence[Profile]) -> tuple[ReferenceCase, ...]:
    """Every profile at its min, opt and max of K and rows together."""
    return tuple(
        ReferenceCase(profile=profile.name, kept=kept, rows=rows)
        for profile in profiles
        for kept, rows in zip(profile.latents.corners(), profile.rows.corners(), strict=True)
    )


def case_inputs(case: ReferenceCase, index: int, spec: ModelSpec) -> Arrays:
    """Noise-like x, t over (0, 1) and labels over all classes and "no class"; a function of `index` alone."""
    generator = np.random.default_rng((INPUT_SEED, index))
    return {
        "x": generator.standard_normal((case.rows, *spec.sample_shape)).astype(np.float32),
        "t": generator.uniform(0.02, 1.0, case.rows).astype(np.float32),
        spec.conditioning[0].name: generator.integers(0, spec.null_class + 1, case.rows),
    }


# ---------------------------------------------------------------- trajectories


def reference_trajectories(profiles: Sequence[Profile], spec: ModelSpec) -> tuple[ReferenceTrajectory, ...]:
    """Four short samplings, so that plain, guided, mixed and multistep runs are all compared step by step."""
    lowest = min(profile.latents.min for profile in profiles)
    highest = max(profile.latents.max for profile in profiles)
    half = TRAJECTORY_STEPS // 2
    mixed = f"0-{half - 1}:{lowest},{half}-{TRAJECTORY_STEPS - 1}:{highest}"

    def trajectory(name: str, schedule: str, guidance: str, sampler: str) -> ReferenceTrajectory:
        return ReferenceTrajectory(
            name=name,
            labels=(0, spec.num_classes - 1),
            steps=TRAJECTORY_STEPS,
            schedule=schedule,
            guidance=guidance,
            sampler=sampler,
        )

    return (
        trajectory("plain", str(highest), "none", "euler"),
        trajectory("guided", str(highest), "cfg:2", "heun"),
        trajectory("mixed", mixed, f"ccfg:2@{lowest}", "euler"),
        trajectory("multistep", mixed, f"ccfg:2@{lowest}", "ab3"),
    )


def trajectory_states(pipeline: Pipeline, trajectory: ReferenceTrajectory) -> list[npt.NDArray[np.float64]]:
    """The state after each step, from any engines."""
    steps = pipeline.steps(
        trajectory.labels,
        steps=trajectory.steps,
        schedule=trajectory.schedule,
        guidance=trajectory.guidance,
        sampler=trajectory.sampler,
        seed=INPUT_SEED,
    )
    return [record.x for record in steps]

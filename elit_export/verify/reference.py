"""What PyTorch says: reference cases and a reference trajectory for a plan set.

Takes: a model, profiles.  Gives: arrays for the bundle's reference file.  May touch: nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from elit_export.bundle import ReferenceCase, ReferenceTrajectory
from elit_export.models.sit import ElitSiT
from elit_export.runtime.bank import EngineBank, Slot
from elit_export.runtime.engine import FunctionEngine
from elit_export.runtime.pipeline import Pipeline
from elit_export.spec import LATENTS, ModelSpec, Precision, Profile, Range

Arrays = dict[str, npt.NDArray[Any]]
INPUT_SEED = 20261122
TRAJECTORY_STEPS = 4


def torch_engine(model: ElitSiT) -> FunctionEngine:
    """The model itself as an engine for the `step` graph."""

    @torch.inference_mode()
    def step(inputs: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        tensors = (torch.from_numpy(inputs[tensor.name]) for tensor in model.spec.step_inputs)
        velocity, residual = model.step(*tensors)
        return {"velocity": velocity.numpy(), "residual": residual.numpy()}

    return FunctionEngine(step)


def torch_pipeline(model: ElitSiT, *, max_rows: int = 4096) -> Pipeline:
    """The runtime with PyTorch in place of engines, at every budget."""
    every = Profile("torch", Range(1, model.spec.latents, model.spec.latents), Range(1, 1, max_rows))
    bank = EngineBank([Slot(every, torch_engine(model))], model.spec.budgets, Precision.FP32)
    return Pipeline(bank, model.spec, model.data)


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


@dataclass(frozen=True)
class SolvedCase:
    """Arrays of one case by name, without its index."""

    index: int
    case: ReferenceCase
    arrays: Arrays


def solved_cases(model: ElitSiT, cases: Sequence[ReferenceCase]) -> Iterator[SolvedCase]:
    engine = torch_engine(model)
    for index, case in enumerate(cases):
        inputs = case_inputs(case, index, model.spec)
        outputs = engine({**inputs, LATENTS: np.arange(case.kept)})
        arrays = {name: array if isinstance(array, np.ndarray) else array.numpy() for name, array in outputs.items()}
        yield SolvedCase(index, case, inputs | arrays)


# ---------------------------------------------------------------- a trajectory


def reference_trajectory(profiles: Sequence[Profile], spec: ModelSpec) -> ReferenceTrajectory:
    """Four steps that change budget half-way, guided at the lowest one: few numbers that touch everything."""
    lowest = min(profile.latents.min for profile in profiles)
    highest = max(profile.latents.max for profile in profiles)
    half = TRAJECTORY_STEPS // 2
    return ReferenceTrajectory(
        labels=(0, spec.num_classes - 1),
        steps=TRAJECTORY_STEPS,
        schedule=f"0-{half - 1}:{lowest},{half}-{TRAJECTORY_STEPS - 1}:{highest}",
        guidance=f"ccfg:2@{lowest}",
        sampler="ab2",
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

"""Do the engines of a bundle say what PyTorch said?

Takes: a bundle with its reference file, or a draft of one.  Gives: Parity per profile, or ParityError.
May touch: the bundle (reading).  Needs neither torch nor the checkpoint.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from elit_export.bundle import Bundle, Parity, PlanSet, Reference
from elit_export.errors import BundleError, ParityError
from elit_export.runtime.bank import EngineBank
from elit_export.runtime.engine import to_host
from elit_export.runtime.pipeline import Pipeline
from elit_export.spec import LATENTS, ModelSpec
from elit_export.verify.cases import REFERENCE_FILE, trajectory_states
from elit_export.verify.metrics import Difference, difference, worst
from elit_export.verify.tolerances import TOLERANCES, shortfall

Arrays = dict[str, npt.NDArray[Any]]


def checked_profiles(bundle: Bundle, plan_set: PlanSet, bank: EngineBank) -> Iterator[tuple[str, Parity]]:
    """Run every reference case, then the trajectory; one (profile, Parity) each, as they pass.

    Raises ParityError naming the profile, what was found and what would have passed.
    """
    spec = bundle.manifest.model.spec
    arrays = load_reference(bundle, plan_set.reference)
    tolerance = TOLERANCES[plan_set.precision]
    cases = defaultdict(list)
    for index, case in enumerate(plan_set.reference.cases):
        cases[case.profile].append((index, case.kept))
    for profile, indexed in cases.items():
        found = worst([_step_difference(bank, profile, index, kept, arrays, spec) for index, kept in indexed])
        if problem := shortfall(found, tolerance.step_db):
            raise ParityError(f"profile {profile} of target {plan_set.target}: {problem}")
        yield profile, Parity(status="passed", sqnr_db=_finite(found.sqnr_db), max_relative=found.max_relative)
    _check_trajectory(bundle, plan_set, bank, arrays, tolerance.trajectory_db)


def _finite(sqnr_db: float) -> float:
    """JSON has no infinity; identical results count as 999 dB."""
    return min(sqnr_db, 999.0)


def load_reference(bundle: Bundle, reference: Reference) -> Arrays:
    path = bundle.verified(reference.artifact) / REFERENCE_FILE
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except (OSError, ValueError) as error:
        raise BundleError(f"{path}: unreadable: {error}") from error


def _step_difference(
    bank: EngineBank, profile: str, index: int, kept: int, arrays: Arrays, spec: ModelSpec
) -> Difference:
    """The worst of velocity and residual, from the engine of this very profile."""
    engine = next(slot.engine for slot in bank.slots if slot.profile.name == profile)
    names = [tensor.name for tensor in spec.step_inputs if tensor.name != LATENTS]
    inputs = {name: arrays[f"{index}/{name}"] for name in names} | {LATENTS: np.arange(kept)}
    outputs = engine(inputs)
    return worst(
        [difference(to_host(outputs[tensor.name]), arrays[f"{index}/{tensor.name}"]) for tensor in spec.step_outputs]
    )


def _check_trajectory(bundle: Bundle, plan_set: PlanSet, bank: EngineBank, arrays: Arrays, least_db: float) -> None:
    model = bundle.manifest.model
    states = trajectory_states(Pipeline(bank, model.spec, model.data), plan_set.reference.trajectory)
    for step, state in enumerate(states):
        if problem := shortfall(difference(state, arrays[f"trajectory/{step}"]), least_db):
            raise ParityError(f"trajectory of target {plan_set.target}, step {step}: {problem}")

"""Do the engines of a bundle say what PyTorch said?

Takes: a bundle (or a draft of one), its engines, the answers of PyTorch.  Gives: Comparisons.
May touch: the bundle (reading).  Needs neither torch nor the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from elit_export.bundle import Bundle, Parity, PlanSet, Reference, ReferenceCase
from elit_export.errors import BundleError, ParityError
from elit_export.runtime.bank import EngineBank
from elit_export.runtime.engine import to_host
from elit_export.runtime.pipeline import Pipeline
from elit_export.spec import LATENTS, ModelSpec
from elit_export.verify.cases import REFERENCE_FILE, Arrays, trajectory_states
from elit_export.verify.metrics import Difference, difference, worst
from elit_export.verify.tolerances import TOLERANCES

IDENTICAL_DB = 999.0  # JSON has no infinity


@dataclass(frozen=True)
class Comparison:
    """One output at one point. `part` is `profile NAME` or `trajectory NAME`, `point` where in it."""

    part: str
    point: str
    found: Difference
    least_db: float

    @property
    def passed(self) -> bool:
        return self.found.sqnr_db >= self.least_db

    @property
    def margin_db(self) -> float:
        return self.found.sqnr_db - self.least_db

    @property
    def verdict(self) -> str:
        """What was found, and for a miss the tolerance that would have passed."""
        told = f"{self.part}, {self.point}: SQNR {self.found.sqnr_db:.1f} dB"
        if self.passed:
            return f"{told}, {self.margin_db:.1f} dB better than needed"
        return (
            f"{told} (max error {self.found.max_relative:.1e} of the largest value) misses {self.least_db:g} dB; "
            f"a tolerance of {np.floor(self.found.sqnr_db):g} dB would have passed"
        )


def compared(bundle: Bundle, plan_set: PlanSet, bank: EngineBank, arrays: Arrays) -> Iterator[Comparison]:
    """Every profile at its corners with its own engine, then whole trajectories step by step."""
    model = bundle.manifest.model
    tolerance = TOLERANCES[plan_set.precision]
    for index, case in enumerate(plan_set.reference.cases):
        for name, found in _step_differences(bank, index, case, arrays, model.spec):
            point = f"K={case.kept} rows={case.rows} {name}"
            yield Comparison(f"profile {case.profile}", point, found, tolerance.step_db)
    pipeline = Pipeline(bank, model.spec, model.data)
    for trajectory in plan_set.reference.trajectories:
        for step, state in enumerate(trajectory_states(pipeline, trajectory)):
            found = difference(state, arrays[f"{trajectory.name}/{step}"])
            yield Comparison(f"trajectory {trajectory.name}", f"step {step}", found, tolerance.trajectory_db)


def comparisons_of(plan_set: PlanSet) -> int:
    """How many Comparisons a plan set has."""
    reference = plan_set.reference
    return 2 * len(reference.cases) + sum(trajectory.steps for trajectory in reference.trajectories)


def require(comparison: Comparison) -> Comparison:
    """Give it back if it passed, else raise ParityError."""
    if not comparison.passed:
        raise ParityError(comparison.verdict)
    return comparison


def parity_of(profile: str, found: Sequence[Comparison]) -> Parity:
    """The worst that a profile showed, for the manifest."""
    measured = worst([comparison.found for comparison in found if comparison.part == f"profile {profile}"])
    return Parity(status="passed", sqnr_db=min(measured.sqnr_db, IDENTICAL_DB), max_relative=measured.max_relative)


def load_reference(bundle: Bundle, reference: Reference) -> Arrays:
    """PyTorch's answers as the build stored them; raises BundleError."""
    path = bundle.verified(reference.artifact) / REFERENCE_FILE
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except (OSError, ValueError) as error:
        raise BundleError(f"{path}: unreadable: {error}") from error


def _step_differences(
    bank: EngineBank, index: int, case: ReferenceCase, arrays: Arrays, spec: ModelSpec
) -> Iterator[tuple[str, Difference]]:
    """Velocity and residual, from the engine of this very profile."""
    engine = next(slot.engine for slot in bank.slots if slot.profile.name == case.profile)
    names = [tensor.name for tensor in spec.step_inputs if tensor.name != LATENTS]
    outputs = engine({name: arrays[f"{index}/{name}"] for name in names} | {LATENTS: np.arange(case.kept)})
    for tensor in spec.step_outputs:
        yield tensor.name, difference(to_host(outputs[tensor.name]), arrays[f"{index}/{tensor.name}"])

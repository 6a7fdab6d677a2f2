"""Measures how much memory engines hold: each bank is opened in a process of its own.

Only Linux reports it. The processes are spawned, so a script that calls this needs `if __name__ == "__main__":`.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from elit_export.arrays import HostArray
from elit_export.bench.processes import in_own_process
from elit_export.bench.timing import resident_bytes
from elit_export.bundle.manifest import PlanSet, ProfileFacts, ReferenceCase
from elit_export.bundle.reading import Bundle
from elit_export.errors import EngineError
from elit_export.runtime.opening import open_bank
from elit_export.spec import LATENTS, ModelSpec, Profile
from elit_export.verify.cases import case_inputs


@dataclass(frozen=True)
class BankMemory:
    """The memory of a whole bank, and of the engine of its largest budgets alone."""

    whole_bytes: int
    one_bytes: int

    @property
    def ratio(self) -> float:
        return self.whole_bytes / self.one_bytes


def bank_memory(bundle: Bundle, plan_set: PlanSet) -> BankMemory | None:
    """Measure a bank; None where the system does not report memory, and for a device that has its own.

    Raises EngineError if a process dies, as one does that runs out of memory.
    """
    if not _is_reported(plan_set):
        return None
    largest = max(plan_set.profiles, key=lambda facts: facts.profile.latents.max)
    whole, one = (_measure_in_own_process(bundle, plan_set, profiles) for profiles in (plan_set.profiles, (largest,)))
    return BankMemory(whole, one)


def bank_bytes(bundle: Bundle, plan_set: PlanSet) -> int | None:
    """Measure the whole bank alone, as bank_memory does."""
    return _measure_in_own_process(bundle, plan_set, plan_set.profiles) if _is_reported(plan_set) else None


def _is_reported(plan_set: PlanSet) -> bool:
    return resident_bytes() is not None and plan_set.device == "cpu"


def _measure_in_own_process(bundle: Bundle, plan_set: PlanSet, profiles: Sequence[ProfileFacts]) -> int:
    part = plan_set.model_copy(update={"profiles": tuple(profiles)})
    try:
        return in_own_process(held_bytes, bundle.folder, part, trust=bundle.trust)
    except BrokenProcessPool as error:
        raise EngineError(
            f"a process that opened the engines of {bundle.folder} to measure their memory died",
            "free memory for a second copy of them",
        ) from error


def held_bytes(folder: Path, plan_set: PlanSet, *, trust: bool) -> int:
    """Measure how much this process grows by opening a plan set's bank and calling every profile once at its opt."""
    bundle = Bundle.open(folder, trust=trust)
    empty = plan_set.model_copy(update={"profiles": ()})
    open_bank(bundle, empty).close()  # loads the library, whose memory is not the bank's
    before = _resident()
    with open_bank(bundle, plan_set) as bank:
        for slot in bank.slots:
            slot.engine(_inputs_at_opt(slot.profile, bundle.manifest.model.spec))
        return _resident() - before


def _resident() -> int:
    resident = resident_bytes()
    assert resident is not None
    return resident


def _inputs_at_opt(profile: Profile, spec: ModelSpec) -> dict[str, HostArray]:
    text = profile.text.opt if profile.text else 0
    case = ReferenceCase(profile=profile.name, kept=profile.latents.opt, rows=profile.rows.opt, text=text)
    return case_inputs(case, 0, spec) | {LATENTS: np.arange(case.kept)}

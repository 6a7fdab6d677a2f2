"""A bank that held a copy of the model for every profile would be seen."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from elit_export.bench import memory as module
from elit_export.bench.memory import bank_bytes, bank_memory
from elit_export.bench.timing import resident_bytes
from elit_export.bundle.manifest import PlanSet
from elit_export.bundle.reading import Bundle
from elit_export.errors import EngineError


def test_profiles_that_share_an_engine_cost_nothing_more(fashion_bundle: Bundle) -> None:
    if resident_bytes() is None:
        pytest.skip("only Linux tells its memory")
    found = bank_memory(fashion_bundle, fashion_bundle.manifest.plan_sets[0])
    assert found
    assert found.ratio == pytest.approx(1.0, abs=0.1)
    assert found.whole_bytes > 13_000_000  # its weights


def test_an_engine_for_every_profile_shows(fashion_bundle: Bundle, tmp_path: Path) -> None:
    if resident_bytes() is None:
        pytest.skip("only Linux tells its memory")
    folder = Path(shutil.copytree(fashion_bundle.folder, tmp_path / "copied"))
    found = bank_memory(Bundle.open(folder), with_own_plans(folder, fashion_bundle.manifest.plan_sets[0]))
    assert found
    assert found.ratio > 1.5


def with_own_plans(folder: Path, plan_set: PlanSet) -> PlanSet:
    """Every profile with a plan of its own: the same one under another name."""
    profiles = []
    for facts in plan_set.profiles:
        old = facts.plan.artifact
        own = old.model_copy(update={"name": f"{facts.name}-{old.name}"})
        shutil.copytree(folder / own.kind / old.name, folder / own.kind / own.name)
        plan = facts.plan.model_copy(update={"artifact": own})
        profiles.append(facts.model_copy(update={"plan": plan}))
    return plan_set.model_copy(update={"profiles": tuple(profiles)})


def test_a_system_that_does_not_tell_starts_no_process(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "resident_bytes", lambda: None)
    monkeypatch.delattr(module, "in_own_process")
    plan_set = tiny_bundle.manifest.plan_sets[0]
    assert bank_memory(tiny_bundle, plan_set) is bank_bytes(tiny_bundle, plan_set) is None


def test_a_process_that_dies_is_a_clear_error(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "resident_bytes", lambda: 1)
    monkeypatch.setattr(module, "held_bytes", kill_own_process)
    with pytest.raises(EngineError, match="measure their memory died; free memory for a second copy"):
        bank_memory(tiny_bundle, tiny_bundle.manifest.plan_sets[0])


def kill_own_process(_folder: Path, _plan_set: PlanSet, *, trust: bool) -> int:
    """As the kernel does where memory runs out."""
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)
    return 0

"""Plans below tolerance: refused, or kept for a reason that every report shows."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from elit_export import Pipeline, compile_bundle
from elit_export.backends.onnxruntime.engine import OnnxRuntimeEngine
from elit_export.backends.protocols import Array
from elit_export.bundle.reading import MANIFEST, Bundle
from elit_export.bundle.recipe import Recipe, recipe_from_values
from elit_export.cli import main
from elit_export.errors import ParityError
from elit_export.verify import parity
from elit_export.verify.compare import Comparison, require
from elit_export.verify.metrics import Difference
from elit_export.verify.parity import NO_OUTPUT, parity_of
from elit_export.verify.tolerances import Tolerance
from tests.conftest import recipe_values

REASON = "sums in another order: [measured] elsewhere"


def recipe(checkpoint: Path, **changes: Any) -> Recipe:
    values: Any = recipe_values(checkpoint)
    values["targets"]["cpu"] |= changes
    return recipe_from_values(values, "test")


@pytest.fixture
def copied(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle.folder, tmp_path / "copied"))


def need(monkeypatch: pytest.MonkeyPatch, step_db: float) -> None:
    wanted = dict.fromkeys(parity.TOLERANCES, Tolerance(step_db=step_db, trajectory_db=step_db))
    monkeypatch.setattr(parity, "TOLERANCES", wanted)


@pytest.fixture
def accepted(copied: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle whose plans miss 300 dB, which nothing reaches."""
    need(monkeypatch, 300.0)
    compile_bundle(recipe(tiny_checkpoint, accept_below_tolerance=REASON), "cpu", out=copied)
    return copied


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def said(result: Result) -> str:
    return " ".join(result.output.replace("│", " ").split())


# ---------------------------------------------------------------- builds


def test_a_miss_is_refused_with_the_tolerance_that_would_have_passed(
    copied: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (copied / MANIFEST).read_bytes()
    need(monkeypatch, 300.0)
    with pytest.raises(ParityError, match=r"profile full, .* misses 300 dB; a tolerance of 1\d\d dB would have passed"):
        compile_bundle(recipe(tiny_checkpoint, threads=1), "cpu", out=copied)
    assert (copied / MANIFEST).read_bytes() == before


def test_a_reason_keeps_it_and_is_written_down(accepted: Path) -> None:
    (plan_set,) = Bundle.open(accepted).manifest.plan_sets
    assert plan_set.accepted == REASON
    for facts in plan_set.profiles:
        assert (facts.parity.status, facts.parity.reason, facts.parity.ran) == ("accepted", REASON, True)
        assert facts.parity.sqnr_db is not None
        assert 115 < facts.parity.sqnr_db < 300
    Pipeline.load(accepted).close()


def test_a_reason_that_is_not_needed_leaves_the_plans_passed(copied: Path, tiny_checkpoint: Path) -> None:
    compile_bundle(recipe(tiny_checkpoint, accept_below_tolerance=REASON), "cpu", out=copied)
    (plan_set,) = Bundle.open(copied).manifest.plan_sets
    assert {(facts.parity.status, facts.parity.reason) for facts in plan_set.profiles} == {("passed", "")}


def test_taking_the_reason_back_compares_again(accepted: Path, tiny_checkpoint: Path) -> None:
    before = (accepted / MANIFEST).read_bytes()
    with pytest.raises(ParityError, match="misses 300 dB"):
        compile_bundle(recipe(tiny_checkpoint), "cpu", out=accepted)
    assert (accepted / MANIFEST).read_bytes() == before


def test_an_answer_that_is_not_finite_is_never_accepted(
    copied: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = OnnxRuntimeEngine.__call__

    def not_finite(self: OnnxRuntimeEngine, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        outputs = dict(real(self, inputs))
        return outputs | {"velocity": np.full_like(outputs["velocity"], np.nan)} if "latents" in inputs else outputs

    before = (copied / MANIFEST).read_bytes()
    monkeypatch.setattr(OnnxRuntimeEngine, "__call__", not_finite)
    with pytest.raises(ParityError, match="no tolerance would have passed"):
        compile_bundle(recipe(tiny_checkpoint, accept_below_tolerance=REASON), "cpu", out=copied)
    assert (copied / MANIFEST).read_bytes() == before
    assert run("verify", copied).exit_code == 1


# ---------------------------------------------------------------- reports


def test_inspect_shows_the_reason(accepted: Path) -> None:
    shown = run("inspect", accepted)
    assert shown.exit_code == 0
    assert "below tolerance, accepted:" in said(shown)
    facts = json.loads(run("inspect", accepted, "--json", "-").stdout)["plan_sets"][0]
    assert facts["accepted_miss"] == REASON
    assert facts["samples"] is None
    assert facts["profiles"][0]["parity"]["reason"] == REASON


def test_verify_ends_well_and_shows_the_reason(accepted: Path) -> None:
    done = run("verify", accepted)
    assert done.exit_code == 0, done.output
    assert f"below tolerance, accepted by the recipe: {REASON}" in said(done)
    assert ", accepted" in said(done)
    found = json.loads(run("verify", accepted, "--json", "-").stdout)
    assert {one["accepted"] for one in found if not one["part"].startswith("graph ")} == {REASON}
    assert {one["accepted"] for one in found if one["part"].startswith("graph ")} == {""}
    assert all(one["passed"] for one in found)


def test_a_plan_that_passes_says_nothing_of_it(tiny_bundle: Bundle) -> None:
    done = run("verify", tiny_bundle.folder)
    assert done.exit_code == 0
    assert "accepted" not in said(done)


# ---------------------------------------------------------------- one comparison


def comparison(sqnr_db: float, part: str = "profile full", accepted: str = REASON, **more: Any) -> Comparison:
    return Comparison(part, "K=1", Difference(0.1, 0.1, sqnr_db, 0.9), 25.0, accepted=accepted, **more)


@pytest.mark.parametrize(
    ("found", "met", "passed"),
    [
        (comparison(25.0), True, True),
        (comparison(24.9), False, True),
        (comparison(0.1), False, True),
        (comparison(-3.0), False, False),  # an error larger than the values
        (comparison(24.9, accepted_from_db=24.8), False, True),
        (comparison(24.9, accepted_from_db=24.95), False, False),
        (comparison(24.9, accepted=""), False, False),
        (comparison(math.inf), True, True),
        (comparison(-math.inf), False, False),
        (comparison(math.nan), False, False),
        (Comparison("profile full", "K=1", NO_OUTPUT, 25.0, problem="failed", accepted=REASON), False, False),
    ],
)
def test_what_may_be_accepted(found: Comparison, met: bool, passed: bool) -> None:
    assert (found.met, found.passed) == (met, passed)
    if passed:
        assert require(found) is found
    else:
        with pytest.raises(ParityError):
            require(found)


@pytest.mark.parametrize(
    ("missed", "statuses"),
    [
        (comparison(3.0, "profile full"), ("accepted", "passed")),
        (comparison(3.0, "trajectory plain", profiles=("half",)), ("passed", "accepted")),
        (comparison(3.0, "graph probe"), ("accepted", "accepted")),
    ],
)
def test_a_miss_counts_for_the_profiles_that_it_concerns(missed: Comparison, statuses: tuple[str, str]) -> None:
    """A graph of the cache serves them all."""
    found = [comparison(50.0, f"profile {name}") for name in ("full", "half")] + [missed]
    assert tuple(parity_of(name, found).status for name in ("full", "half")) == statuses
    assert {parity_of(name, found).reason for name in ("full", "half")} <= {"", REASON}

"""ONNX Runtime engines against the reference implementation: single forwards and whole trajectories."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elit_export import Pipeline, compile_bundle
from elit_export.backends.protocols import to_host
from elit_export.bundle.reading import Bundle
from elit_export.bundle.recipe import recipe_from_values
from elit_export.checkpoints.native import save_checkpoint
from elit_export.runtime.samplers.base import even_times
from tests.conftest import recipe_values
from tests.helpers import Array, Golden, golden, max_relative


@pytest.fixture(scope="module")
def pipeline(golden_g4_bundle: Bundle) -> Iterator[Pipeline]:
    with Pipeline.load(golden_g4_bundle.folder) as opened:
        yield opened


@pytest.fixture(scope="module")
def numbers(golden_g4: Golden) -> dict[str, Array]:
    return golden_g4.arrays("sampler")


CASES = golden("tiny_g4").facts["sampler_cases"]


def guidance_of(case: dict[str, Any]) -> str:
    if "cfg_scale" not in case:
        return "none"
    if "weak_budget" not in case:
        return f"cfg:{case['cfg_scale']}"
    kind = "autoguidance" if case.get("autoguidance") else "ccfg"
    return f"{kind}:{case['cfg_scale']}@{case['weak_budget']}"


def choices_of(name: str, numbers: dict[str, Array]) -> dict[str, Any]:
    case = CASES[name]
    sampler = "heun" if case.get("heun") else "euler-maruyama" if case.get("sde") else "euler"
    choices: dict[str, Any] = {
        "steps": case["num_steps"],
        "schedule": str(case["budget"]),
        "sampler": sampler,
        "guidance": guidance_of(case),
        "guidance_interval": (case.get("guidance_low", 0.0), case.get("guidance_high", 1.0)),
        "noise": numbers["z"],
    }
    if case.get("sde"):
        choices["step_noise"] = numbers[f"{name}__noise"]
    return choices


@pytest.mark.parametrize("name", CASES)
def test_trajectory_equals_the_reference(name: str, pipeline: Pipeline, numbers: dict[str, Array]) -> None:
    labels = [int(label) for label in numbers["y"]]
    sample = pipeline.sample(labels, **choices_of(name, numbers))
    assert sample.latents.dtype == np.float64
    assert max_relative(sample.latents, numbers[name]) <= 1e-5


def test_budgets_of_a_trajectory_are_those_asked_for(pipeline: Pipeline, numbers: dict[str, Array]) -> None:
    """The golden cases would not notice a wrong record."""
    labels = [int(label) for label in numbers["y"]]
    name = "heun8_ccfg2_full_k4_interval"
    records = list(pipeline.steps(labels, **choices_of(name, numbers)))
    called = {call.budget.kept for record in records for call in record.calls}
    assert called == {16, 4}
    assert [len(record.calls) for record in records] == [2, 2, 3, 4, 4, 3, 2, 1]


@pytest.mark.parametrize("kept", golden("tiny_g4").budgets)
def test_forward_equals_the_reference(kept: int, pipeline: Pipeline, golden_g4: Golden) -> None:
    check_forward(pipeline, golden_g4, kept)


def test_forward_with_qk_norm_equals_the_reference(tmp_path: Path) -> None:
    facts = golden("tiny_g2_qknorm")
    save_checkpoint(tmp_path / "g2.safetensors", facts.load(tmp_path))
    recipe = recipe_from_values(recipe_values(tmp_path / "g2.safetensors"), "test")
    bundle = compile_bundle(recipe, "cpu", out=tmp_path / "bundle")
    with Pipeline.load(bundle.folder) as pipeline:
        for kept in facts.budgets:
            check_forward(pipeline, facts, kept)


def check_forward(pipeline: Pipeline, facts: Golden, kept: int) -> None:
    arrays = facts.arrays("forward")
    inputs = {name: arrays[name] for name in ("x", "t", "y")}
    found = to_host(pipeline.bank(pipeline.spec.budget(kept), inputs).outputs["velocity"])
    assert max_relative(found, arrays[f"v_k{kept}"]) <= 5e-6


def test_alternating_budgets_equal_engines_called_by_hand(pipeline: Pipeline) -> None:
    """Switching engines between steps leaves nothing behind in them."""
    steps, labels = 6, [3, 999]
    budgets = [pipeline.spec.budget(kept) for kept in (16, 1, 8, 2, 16, 1)]
    records = list(pipeline.steps(labels, steps=steps, schedule=budgets, sampler="euler", seed=5))
    x = pipeline.request(labels, seed=5).start
    times = even_times(steps)
    for step, budget in enumerate(budgets):
        inputs = {
            "x": x.astype(np.float32),
            "t": np.full(2, times[step], np.float32),
            "y": np.array(labels),
        }
        velocity = to_host(pipeline.bank(budget, inputs).outputs["velocity"]).astype(np.float64)
        x = x + (times[step + 1] - times[step]) * velocity
        np.testing.assert_array_equal(records[step].x, x)

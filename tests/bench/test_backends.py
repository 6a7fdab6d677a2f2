"""All plan sets of a bundle side by side."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from elit_export import Pipeline, compile_bundle
from elit_export.arrays import HostArray
from elit_export.backends.protocols import FunctionEngine
from elit_export.bench.backends import BackendRow, BackendsResult, Competitor, compare_backends, not_slower, recipe_of
from elit_export.bench.timing import Timing
from elit_export.bundle.manifest import PlanSet
from elit_export.bundle.reading import Bundle
from elit_export.bundle.recipe import recipe_from_values
from elit_export.cli import main
from elit_export.cli.bench.backends import verdict
from elit_export.errors import InputError
from elit_export.runtime.bank import EngineBank, Slot
from elit_export.spec import Precision, Profile, Range
from tests.conftest import recipe_values

Arrays = Mapping[str, HostArray]


def competitor(plan_set: PlanSet, bundle: Bundle, *, passes: int, latents: Range) -> Competitor:
    """An engine that takes about so many passes over an array, at the budgets named."""
    spec = bundle.manifest.model.spec
    ballast = np.ones(200_000)

    def step(inputs: Arrays) -> dict[str, HostArray]:
        for _ in range(passes):
            ballast.sum()
        return {"velocity": np.zeros_like(inputs["x"]), "residual": np.zeros(1, np.float32)}

    slot = Slot(Profile("only", latents, Range(1, 2, 4)), FunctionEngine(step))
    pipeline = Pipeline(EngineBank([slot], spec.budgets, Precision.FP32), spec, bundle.manifest.model.data)
    return Competitor(
        plan_set.model_copy(update={"target": f"takes-{passes}"}), pipeline, accepted_miss="", held_bytes=None
    )


def compared(*competitors: Competitor, rows: int = 2, **changes: Any) -> BackendsResult:
    choices: dict[str, Any] = {"rounds": 5, "peaks": {Precision.FP32: 10.0}, "skipped": {"other": "why"}}
    return compare_backends(
        competitors, changes.pop("baseline", {}), rows=rows, on_budget=lambda _name, _total: None, **choices | changes
    )


def test_the_fastest_is_found_and_times_are_relative(tiny_bundle: Bundle) -> None:
    (plan_set,) = tiny_bundle.manifest.plan_sets
    every = Range(1, 4, 4)
    slow, fast = (competitor(plan_set, tiny_bundle, passes=passes, latents=every) for passes in (200, 2))
    result = compared(slow, fast)
    assert result.baseline == slow.name
    assert result.fastest == ["takes-2 fp32"]
    assert result.fastest_recipe == result.backends[1].recipe
    assert verdict(result).startswith("the fastest, in a recipe:\n[targets.")
    assert result.skipped == {"other": "why"}
    for row in result.backends:
        assert list(row.times) == ["full", "half", "quarter"]
        for name, time in row.times.items():
            over = result.backends[0].times[name].timing.median_ms
            assert time.speedup == pytest.approx(over / time.timing.median_ms)
            assert time.share_of_peak == pytest.approx(time.gflops_per_s / 10)
    quarter = result.backends[1].times["quarter"]
    assert quarter.speedup > 5
    assert result.backends[0].times["full"].time_over_flops == 1


def timed(row: BackendRow, timing: Timing) -> BackendRow:
    return replace(row, times={name: replace(time, timing=timing) for name, time in row.times.items()})


def test_none_is_called_fastest_within_the_noise(tiny_bundle: Bundle) -> None:
    (plan_set,) = tiny_bundle.manifest.plan_sets
    row = compared(competitor(plan_set, tiny_bundle, passes=1, latents=Range(1, 4, 4))).backends[0]
    least = timed(row, Timing(median_ms=10.0, low_ms=9.0, high_ms=11.0, runs=10))
    meeting = replace(timed(row, Timing(median_ms=11.5, low_ms=11.0, high_ms=13.0, runs=10)), name="meeting")
    beyond = replace(timed(row, Timing(median_ms=11.5, low_ms=11.01, high_ms=12.0, runs=10)), name="beyond")
    assert not_slower([beyond, meeting, least], "full") == [least, meeting]
    tie = replace(compared(competitor(plan_set, tiny_bundle, passes=1, latents=Range(1, 4, 4))), fastest_recipe="")
    said = verdict(replace(tie, fastest=["one", "meeting"]))
    assert "none is fastest beyond the noise: the 10-90 % ranges of one, meeting overlap" in said
    assert "measure again on a quiet machine with more --rounds" in said


def test_of_few_rounds_none_is_called_the_fastest(tiny_bundle: Bundle) -> None:
    (plan_set,) = tiny_bundle.manifest.plan_sets
    every = Range(1, 4, 4)
    slow, fast = (competitor(plan_set, tiny_bundle, passes=passes, latents=every) for passes in (200, 2))
    result = compared(slow, fast, rounds=1)
    assert (result.rounds, result.fastest, result.fastest_recipe) == (1, [fast.name, slow.name], "")
    assert verdict(result).endswith("--rounds 5 or more do")
    assert compared(fast, rounds=1).fastest_recipe  # it is the only one


def test_budgets_are_those_that_all_cover(tiny_bundle: Bundle) -> None:
    (plan_set,) = tiny_bundle.manifest.plan_sets
    whole, part, other = (
        competitor(plan_set, tiny_bundle, passes=passes, latents=latents)
        for passes, latents in ((1, Range(1, 4, 4)), (2, Range(2, 2, 3)), (3, Range(1, 1, 1)))
    )
    assert list(compared(whole, part).backends[0].times) == ["half"]
    with pytest.raises(InputError, match="no budget in common"):
        compared(part, other)
    with pytest.raises(InputError, match="a bench of 9 rows"):
        compared(whole, rows=9)


def test_the_recipe_it_prints_builds_the_same(tiny_bundle: Bundle, tiny_checkpoint: Path) -> None:
    (plan_set,) = tiny_bundle.manifest.plan_sets
    written = tomllib.loads(recipe_of(plan_set))
    recipe = recipe_from_values({**recipe_values(tiny_checkpoint), **written}, "printed")
    chosen = recipe.target(plan_set.target)
    assert (chosen.backend, chosen.device, chosen.precision) == ("onnxruntime", "cpu", Precision.FP32)
    assert chosen.options() == plan_set.options


def test_the_recipe_says_what_else_was_asked_for(fused_bundle: Bundle) -> None:
    (plan_set,) = fused_bundle.manifest.plan_sets
    written = tomllib.loads(recipe_of(plan_set.model_copy(update={"accepted": 'so "be" it'})))
    target = written["targets"][plan_set.target]
    assert (target["fused"], target["accept_below_tolerance"]) == (True, 'so "be" it')


def test_the_command_compares_all_that_run_here(tiny_checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    targets = {
        "cpu": {"backend": "onnxruntime", "device": "cpu", "precision": "fp32"},
        "ov": {"backend": "openvino", "precision": "fp32"},
    }
    recipe = recipe_from_values({**recipe_values(tiny_checkpoint), "targets": targets}, "test")
    for target in targets:
        compile_bundle(recipe, target, out=tmp_path / "bundle")
    options = ["--rows", "2", "--rounds", "2", "--checkpoint", str(tiny_checkpoint), "--json", str(tmp_path / "b.json")]
    done = CliRunner().invoke(main, ["bench", "backends", str(tmp_path / "bundle"), *options])
    assert done.exit_code == 0, done.output
    facts = json.loads((tmp_path / "b.json").read_text())["backends"]
    assert {row["name"] for row in facts["backends"]} == {"cpu fp32", "ov fp32"}
    assert facts["baseline"] == "PyTorch eager"
    assert set(facts["peaks"]) == {"fp32", "bf16"}
    assert all(row["parity_db"] > 115 and row["plan_bytes"] > 0 and row["held_bytes"] > 0 for row in facts["backends"])
    assert facts["fastest"]
    told = f"in a recipe:\n{facts['fastest_recipe']}" if facts["fastest_recipe"] else "none is called the fastest"
    assert told in done.output

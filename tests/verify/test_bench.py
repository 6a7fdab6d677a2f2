"""The bench measures what it says; its numbers themselves are not tested."""

from __future__ import annotations

import time

import pytest

from elit_export import Pipeline
from elit_export.bundle import Bundle
from elit_export.models.cost import flops, flops_per_image
from elit_export.verify.bench import bench
from elit_export.verify.reference import torch_engine
from elit_export.verify.timing import resident_bytes, timed_in_turn
from tests.helpers import tiny_model


def test_every_budget_is_timed_beside_pytorch(tiny_bundle: Bundle) -> None:
    stages: list[str] = []
    with Pipeline.load(tiny_bundle.folder) as pipeline:
        runners = {"eager": torch_engine(tiny_model())}
        result = bench(pipeline, runners, rows=4, rounds=3, sampling=True, on_stage=stages.append)
    assert [budget.budget for budget in result.budgets] == ["4of4", "2of4", "1of4"]
    for budget in result.budgets:
        engine = budget.timings["engine"]
        assert engine.low_ms <= engine.median_ms <= engine.high_ms
        assert budget.speedups["eager"] == pytest.approx(budget.timings["eager"].median_ms / engine.median_ms)
        assert budget.images_per_s == pytest.approx(4e3 / engine.median_ms)
    assert result.samplings[0].speedup == 1.0
    assert all(0 <= way.outside_engines < 1 for way in result.samplings)
    assert {"full", "switching", "sampling"} <= set(stages)


def test_flops_of_a_sampling_count_every_call(tiny_bundle: Bundle) -> None:
    with Pipeline.load(tiny_bundle.folder) as pipeline:
        spec = pipeline.spec
        sample = pipeline.sample([0, 1], steps=3, sampler="euler", guidance="ccfg:2@1")
    assert flops_per_image(sample, spec) == 3 * (flops(spec, spec.full).total + flops(spec, spec.budget(1)).total)


def test_functions_run_in_turn_after_a_warmup() -> None:
    order: list[str] = []
    timings = timed_in_turn(
        {"a": lambda: order.append("a"), "b": lambda: (order.append("b"), time.sleep(0.002))}, rounds=3, warmup=1
    )
    assert order == ["a", "b", "a", "b", "a", "b", "a", "b"]
    assert timings["b"].median_ms >= 2
    assert timings["a"].runs == 3


def test_resident_memory_grows_with_what_is_held() -> None:
    before = resident_bytes()
    if before is None:
        pytest.skip("only Linux tells")
    held = bytearray(b"x" * 50_000_000)
    after = resident_bytes()
    assert after is not None
    assert after - before > 40_000_000
    del held

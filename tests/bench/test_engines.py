"""The bench measures what it says; its numbers themselves are not tested."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from elit_export import Pipeline
from elit_export.bench.engines import ENGINE, BenchResult, bench, measured_budgets
from elit_export.bench.limits import load_limits, misses
from elit_export.bench.memory import BankMemory
from elit_export.bench.samplings import sampling_configs
from elit_export.bench.timing import resident_bytes, timed_in_turn
from elit_export.bundle.reading import Bundle
from elit_export.cli.tables.bench import bench_tables
from elit_export.cost.flops import flops, flops_per_image
from elit_export.errors import InputError
from elit_export.runtime.bank import EngineBank, Slot
from elit_export.spec import Precision, Profile, Range
from elit_export.verify.reference import torch_engine
from tests.helpers import tiny_model

BARS = Path(__file__).parent.parent.parent / "benchmarks" / "limits.json"


def ignore(_stage: str, _total: int) -> None:
    """Listen to no stage."""


def pipeline_over(latents: Range, rows: Range) -> Pipeline:
    """PyTorch as the engine of one profile."""
    model = tiny_model()
    slots = [Slot(Profile("only", latents, rows), torch_engine(model))]
    return Pipeline(EngineBank(slots, model.spec.budgets, Precision.FP32), model.spec, model.data)


def bench_of(pipeline: Pipeline, *, rows: int, sampling: bool, on_stage: Callable[[str, int], None]) -> BenchResult:
    return bench(
        pipeline,
        {},
        rows=rows,
        rounds=1,
        sampling=sampling,
        plan_bytes=1,
        decoder_bytes=None,
        memory=lambda: None,
        on_stage=on_stage,
    )


@pytest.fixture(scope="module")
def whole(tiny_bundle: Bundle) -> BenchResult:
    """A bench of everything beside PyTorch."""
    with Pipeline.load(tiny_bundle.folder) as pipeline:
        runners = {"eager": torch_engine(tiny_model())}
        return bench(
            pipeline,
            runners,
            rows=4,
            rounds=3,
            sampling=True,
            plan_bytes=7,
            decoder_bytes=None,
            memory=lambda: BankMemory(whole_bytes=210, one_bytes=200),
            on_stage=ignore,
        )


def test_every_budget_is_timed_beside_pytorch(whole: BenchResult) -> None:
    assert [budget.budget for budget in whole.budgets] == ["4of4", "2of4", "1of4"]
    full_ms = whole.budgets[0].timings[ENGINE].median_ms
    for budget in whole.budgets:
        engine = budget.timings[ENGINE]
        assert engine.low_ms <= engine.median_ms <= engine.high_ms
        assert budget.speedups["eager"] == pytest.approx(budget.timings["eager"].median_ms / engine.median_ms)
        assert budget.forward_passes_per_s == pytest.approx(4e3 / engine.median_ms)
        assert budget.flops == budget.cost.total
        assert budget.time_over_largest == pytest.approx(engine.median_ms / full_ms)
        assert budget.flops_over_largest == pytest.approx(budget.flops / whole.budgets[0].flops)
        assert budget.time_over_flops == pytest.approx(budget.time_over_largest / budget.flops_over_largest)
    assert (whole.bank_bytes, whole.bank_memory_ratio, whole.plan_bytes) == (210, 1.05, 7)


def test_every_way_to_sample_is_timed(whole: BenchResult) -> None:
    assert len(whole.samplings) == 5
    assert whole.samplings[0].speedup == 1.0
    for way in whole.samplings:
        assert 0 < way.outside_engines < 1
        outside_ms = way.outside_engines * way.ms_per_image * 2  # images
        assert way.outside_ms_per_step == pytest.approx(outside_ms / int(way.options["steps"]))


# ---------------------------------------------------------------- bars


def holding(result: BenchResult) -> BenchResult:
    """The result with numbers that the committed bars hold."""
    first, *between, last = result.budgets
    reference, *configs = result.samplings
    return replace(
        result,
        budgets=[replace(first, speedups={"eager": 1.2}), *between, replace(last, time_over_flops=1.05)],
        samplings=[replace(reference, outside_engines=0.001), *configs],
        bank_memory_ratio=1.0,
    )


def test_committed_bars_hold(whole: BenchResult) -> None:
    assert misses(load_limits(BARS), asdict(holding(whole))) == []


def slower_engine(facts: dict[str, Any]) -> None:
    facts["budgets"][0]["speedups"]["eager"] = 1.1


def time_that_does_not_follow_flops(facts: dict[str, Any]) -> None:
    facts["budgets"][-1]["time_over_flops"] = 1.2


def slow_loop(facts: dict[str, Any]) -> None:
    facts["samplings"][0]["outside_engines"] = 0.02


def engine_for_every_profile(facts: dict[str, Any]) -> None:
    facts["bank_memory_ratio"] = 3.9


@pytest.mark.parametrize(
    ("worse", "said"),
    [
        (slower_engine, "budgets.0.speedups.eager is 1.1, the limit is at least 1.15"),
        (time_that_does_not_follow_flops, "budgets.-1.time_over_flops is 1.2, the limit is at most 1.15"),
        (slow_loop, "samplings.0.outside_engines is 0.02, the limit is at most 0.01"),
        (engine_for_every_profile, "bank_memory_ratio is 3.9, the limit is at most 1.1"),
    ],
)
def test_committed_bars_see_what_got_worse(
    whole: BenchResult, worse: Callable[[dict[str, Any]], None], said: str
) -> None:
    facts = asdict(holding(whole))
    worse(facts)
    assert misses(load_limits(BARS), facts) == [said]


# ---------------------------------------------------------------- what a bundle does not cover


def test_a_bundle_without_full_is_measured_against_its_largest_budget() -> None:
    pipeline = pipeline_over(Range(1, 2, 3), Range(1, 2, 8))
    result = bench_of(pipeline, rows=4, sampling=True, on_stage=ignore)
    assert [budget.name for budget in result.budgets] == ["3of4", "half", "quarter"]
    assert result.budgets[0].time_over_largest == result.budgets[0].flops_over_largest == 1.0
    assert [way.options["schedule"] for way in result.samplings] == [
        *("3of4", "3of4", "3of4"),
        *("0-6:quarter,7-13:3of4", "quarter"),
    ]
    assert all(budget.sample_sqnr_db is not None for budget in result.budgets)


def test_a_bundle_without_any_named_budget_is_measured_at_its_largest() -> None:
    result = bench_of(pipeline_over(Range(3, 3, 3), Range(1, 2, 8)), rows=4, sampling=True, on_stage=ignore)
    assert [budget.name for budget in result.budgets] == ["3of4"]
    assert [way.name for way in result.samplings] == ["euler 50", "ab3 14"]
    assert len(list(bench_tables(result))) == 3


def test_ways_to_sample_use_covered_budgets_only() -> None:
    budgets = measured_budgets(pipeline_over(Range(2, 2, 4), Range(1, 2, 8)))
    assert list(budgets) == ["full", "half"]
    assert [name for name, _ in sampling_configs(budgets)][2:] == [
        *("ab3 14, weak at half", "ab3 14, half then full, weak at half", "ab3 14, all at half"),
    ]


@pytest.mark.parametrize(
    ("rows", "sampling", "said"),
    [
        (2, False, "a bench of 2 rows a call does not fit: .* takes 1..1..1 rows[^;]*; choose other --rows"),
        (1, True, "whole samplings do not fit: .*2 rows at budget 4of4: [^;]*; leave them out with --no-sampling"),
    ],
)
def test_rows_that_do_not_fit_are_refused_before_measuring(rows: int, sampling: bool, said: str) -> None:
    stages: list[str] = []
    with pytest.raises(InputError, match=said):
        bench_of(
            pipeline_over(Range(1, 4, 4), Range(1, 1, 1)),
            rows=rows,
            sampling=sampling,
            on_stage=lambda name, _total: stages.append(name),
        )
    assert stages == []


def test_one_row_is_measured_without_samplings() -> None:
    stages: list[str] = []
    pipeline = pipeline_over(Range(1, 4, 4), Range(1, 1, 1))
    result = bench_of(pipeline, rows=1, sampling=False, on_stage=lambda name, _total: stages.append(name))
    assert (len(result.budgets), result.samplings) == (3, [])
    assert stages == ["memory", "matrix product", "full", "half", "quarter", "switching"]


# ---------------------------------------------------------------- parts


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

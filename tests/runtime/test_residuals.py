"""What a sampling remembers for its step cache and decides by it, and that each branch meets its own residuals only."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elit_export.arrays import HostArray
from elit_export.backends.protocols import FunctionEngine, HostOutput, to_host
from elit_export.cost.flops import flops, flops_per_image
from elit_export.runtime.bank import EngineBank
from elit_export.runtime.pipeline import Pipeline, Sample
from elit_export.runtime.residuals import (
    FIRST,
    FORCED,
    MAX_SKIP,
    RANGE,
    THRESHOLD,
    Computed,
    Decision,
    Memory,
    RequestCache,
)
from elit_export.runtime.sampling import Call, StepRecord
from elit_export.runtime.step_cache.every import Every
from elit_export.runtime.step_cache.fit import covers, increments
from elit_export.runtime.step_cache.policy import CachePolicy
from elit_export.runtime.step_cache.ready import StepCache
from elit_export.spec import PIXELS, Fit, Precision, Range
from tests.runtime.carrying import (
    GUIDED,
    IDENTITY,
    SAMPLERS,
    SPEC,
    WEAK,
    Asked,
    all_pairs,
    carrying,
    facts_of,
    probe,
    reuse,
)

RESIDUALS = ("residual", "residual_prev")
CACHES = ("static:every@3", "static:time@0.1", "teacache:0.7", "teacache:0.7,order=0,max_skip=2,warmup=3")


def euler(labels: Sequence[int], cache: str, *, steps: int = 10, fit: Fit = IDENTITY, **choices: Any) -> Sample:
    return carrying(fit).pipeline.sample(labels, steps=steps, sampler="euler", cache=cache, **choices)


def decisions(sample: Sample, role: str = "strong") -> list[Decision]:
    return [call.cached for record in sample.records for call in record.calls if call.role in (role, "joined")]


def reuses(sample: Sample, role: str = "strong") -> str:
    """A digit for each call, 1 where it was reused."""
    return "".join("01"[decision.reused] for decision in decisions(sample, role))


# ---------------------------------------------------------------- a memory


def computed(t: float, value: float) -> Computed:
    return Computed(t, np.full((1, 2, 2), value, np.float32))


def test_the_forecast_goes_on_in_a_straight_line() -> None:
    memory = Memory()
    memory.note_computed(computed(1.0, 10.0))
    memory.note_computed(computed(0.8, 12.0))
    latest, before, weight = memory.forecast(0.5, order=1)
    assert to_host(latest) + weight * (to_host(latest) - to_host(before)) == pytest.approx(15.0)


def test_at_order_0_the_latest_is_taken_as_it_is() -> None:
    memory = Memory()
    memory.note_computed(computed(1.0, 10.0))
    memory.note_computed(computed(0.8, 12.0))
    latest, before, weight = memory.forecast(0.5, order=0)
    assert weight == 0.0
    assert latest is before
    assert float(to_host(latest).flat[0]) == 12.0


@pytest.mark.parametrize("order", [0, 1])
def test_one_residual_is_taken_as_it_is(order: int) -> None:
    memory = Memory()
    memory.note_computed(computed(1.0, 10.0))
    assert memory.forecast(0.5, order)[2] == 0.0


def test_no_more_than_two_residuals_are_kept() -> None:
    memory = Memory()
    for step in range(5):
        memory.note_computed(computed(1.0 - step / 10, float(step)))
    assert [float(to_host(kept.residual).flat[0]) for kept in memory.computed] == [4.0, 3.0]


# ---------------------------------------------------------------- what a fit adds up

floats32 = st.floats(-4, 4, width=32)


@given(
    coefficients=st.lists(floats32, min_size=1, max_size=5).map(tuple),
    distances=st.lists(st.floats(0, 4, width=32), min_size=1, max_size=4),
)
def test_increments_are_the_polynomial_where_it_is_not_negative(
    coefficients: tuple[float, ...], distances: list[float]
) -> None:
    found = increments(Fit(coefficients, 0.0, 4.0), np.array(distances, np.float32))
    exact = np.polynomial.polynomial.polyval(np.array(distances), coefficients)
    assert found.dtype == np.float32
    assert (found >= 0).all()
    np.testing.assert_allclose(found, np.maximum(exact, 0), atol=1e-2, rtol=1e-5)


@pytest.mark.parametrize("distance", [math.nan, math.inf, -math.inf, 0.0, 0.49, 2.01])
def test_a_fit_does_not_hold_outside_its_range(distance: float) -> None:
    """And says so without a warning of NumPy's."""
    fit, distances = Fit((0.0, 1.0), 0.5, 2.0), np.array([1.0, distance, 0.5, 2.0], np.float32)
    assert covers(fit, distances).tolist() == [True, False, True, True]
    assert increments(fit, distances)[[0, 2, 3]].tolist() == [1.0, 0.5, 2.0]


# ---------------------------------------------------------------- decisions


def test_a_row_computes_when_its_distances_add_up_to_the_threshold() -> None:
    found = decisions(euler([0], "teacache:0.25"))
    assert "".join("01"[decision.reused] for decision in found) == "0110110110"
    assert [decision.because for decision in found] == [FORCED, "", "", THRESHOLD, "", "", THRESHOLD, "", "", FORCED]
    sums = [0.1, 0.2, 0.3]
    assert [decision.accumulated for decision in found[1:9]] == [(pytest.approx(total),) for total in sums * 3][:8]
    assert [decision.distance for decision in found[1:9]] == [(pytest.approx(0.1),)] * 8


def test_where_nothing_was_measured_nothing_is_said() -> None:
    """Before the first step there is no signal, and after the last there is nothing to decide."""
    for cache in ("teacache:0.25", "static:every@3"):
        found = decisions(euler([0], cache))
        silent = [found[0], found[-1]] if cache.startswith("tea") else found
        assert all(decision.distance == decision.accumulated == () for decision in silent)


def test_a_threshold_of_0_computes_every_step() -> None:
    assert reuses(euler([0], "teacache:0")) == "0" * 10


@pytest.mark.parametrize(("threshold", "expected"), [("1e-60", "0000000000"), ("1e300", "0111101110")])
def test_thresholds_that_no_float32_holds(threshold: str, expected: str) -> None:
    assert reuses(euler([0], f"teacache:{threshold}")) == expected


def test_rows_compute_together_as_soon_as_one_must() -> None:
    """A row with label 2 moves three times as fast as one with label 0."""
    slow, fast, both = (euler(labels, "teacache:0.5") for labels in ([0], [2], [0, 2]))
    assert reuses(fast) == reuses(both) == "0101010100"
    assert reuses(slow) == "0111101110"
    at_once = decisions(both)
    assert [at_once[step].accumulated for step in (1, 2, 3)] == [
        (pytest.approx(slow_row), pytest.approx(fast_row))
        for slow_row, fast_row in ((0.1, 0.3), (0.2, 0.6), (0.1, 0.3))
    ]
    assert at_once[2].because == THRESHOLD
    assert reuses(euler([2, 0], "teacache:0.5")) == reuses(both)


def test_what_was_added_up_is_not_taken_back() -> None:
    """A fit that is negative at the distances of label 2, and positive at those of label 0."""
    falling = Fit((0.15, -1.0), 0.0, 1.0)
    assert reuses(euler([2], "teacache:0.01", fit=falling)) == "0111101110"  # never by its distances
    rows = [decision.accumulated for decision in decisions(euler([0, 2], "teacache:0.12", fit=falling))]
    assert rows[1] == (pytest.approx(0.05), 0.0)
    assert rows[2] == (pytest.approx(0.10), 0.0)
    assert all(total >= 0 for row in rows for total in row)


@pytest.mark.parametrize("label", [0, 2])
def test_a_distance_outside_the_calibrated_range_computes(label: int) -> None:
    narrow = Fit((0.0, 1.0), 0.15, 0.25) if label == 0 else Fit((0.0, 1.0), 0.05, 0.25)
    found = decisions(euler([1, label], "teacache:100", fit=narrow))
    assert [decision.because for decision in found] == [FORCED, *[RANGE] * 8, FORCED]
    assert "1" in reuses(euler([1], "teacache:100", fit=narrow))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_distance_that_is_no_number_computes_and_is_forgotten(value: float) -> None:
    """One row of two gives it, at t = 0.7 alone."""

    def once_wrong(inputs: Mapping[str, HostArray]) -> dict[str, HostArray]:
        outputs = probe(inputs)
        if abs(inputs["t"][0] - 0.7) < 1e-3:
            outputs["distance"][1] = value
        return outputs

    pipeline = carrying(probe=once_wrong).pipeline
    found = decisions(pipeline.sample([0, 0], steps=10, sampler="euler", cache="teacache:100"))
    assert [decision.because for decision in found[2:5]] == ["", RANGE, ""]
    assert found[4].accumulated == (pytest.approx(0.1), pytest.approx(0.1))


def test_max_skip_reuses_in_a_row() -> None:
    assert reuses(euler([0], "static:every@100,max_skip=3", steps=12)) == "011101110110"
    found = decisions(euler([0], "teacache:100,max_skip=3", steps=12))
    assert "".join("01"[decision.reused] for decision in found) == "011101110110"
    assert [decision.because for decision in found if not decision.reused] == [FORCED, MAX_SKIP, MAX_SKIP, FORCED]


@pytest.mark.parametrize("cache", ["static:every@100", "static:mask@" + "0" * 10, "static:time@100", "teacache:100"])
def test_the_steps_of_the_warm_up_compute_and_so_do_the_first_and_the_last(cache: str) -> None:
    assert reuses(euler([0], f"{cache},max_skip=100")) == "0111111110"
    assert reuses(euler([0], f"{cache},max_skip=100,warmup=4")) == "0000111110"
    assert reuses(euler([0], f"{cache},max_skip=100,warmup=40")) == "0" * 10


def test_what_added_up_in_the_warm_up_is_gone_with_it() -> None:
    assert reuses(euler([0], "teacache:0.25,warmup=3")) == "0001101100"


# ---------------------------------------------------------------- branches


def test_each_branch_decides_for_itself() -> None:
    """The null class, 3, moves four times as fast as label 0."""
    sample = euler([0], "teacache:0.75", guidance="ccfg:2@1")
    assert reuses(sample, "strong") == "0111101110"
    assert reuses(sample, "weak") == "0101010100"


def test_branches_at_one_budget_share_a_call_and_a_decision() -> None:
    sample = euler([0], "teacache:0.75", guidance="cfg:2")
    assert reuses(sample) == "0101010100"
    assert decisions(sample)[1].distance == (pytest.approx(0.1), pytest.approx(0.4))


def test_each_budget_has_its_own_fit() -> None:
    made = carrying()
    still = Fit((0.0, 0.0), 0.0, 10.0)
    fits = {budget: still if budget.kept == 2 else IDENTITY for budget in SPEC.budgets}
    pipeline = Pipeline(made.pipeline.bank, SPEC, PIXELS, fits=fits)
    choices: dict[str, Any] = {"steps": 10, "sampler": "euler", "cache": "teacache:0.15,max_skip=100"}
    assert reuses(pipeline.sample([0], schedule="2", **choices)) == "0111111110"
    assert reuses(pipeline.sample([0], schedule="full", **choices)) == "0101010100"
    assert reuses(pipeline.sample([0], schedule="0-4:2,5-9:full", **choices)) == "0111110100"


def test_heuns_evaluations_each_measure_from_their_own_of_the_step_before() -> None:
    sample = carrying().pipeline.sample([0], steps=10, sampler="heun", cache="teacache:0.25")
    measured = [decision.distance for decision in decisions(sample) if decision.distance]
    assert len(measured) == 2 * 8
    assert measured == [(pytest.approx(0.1),)] * 16
    assert reuses(sample) == "00" + "11" * 2 + "00" + "11" * 2 + "00" + "11" * 2 + "0"


def test_a_branch_that_was_idle_starts_anew() -> None:
    """Guidance that ends and begins again computes first, whatever the policy says."""
    interval = {"guidance": "ccfg:2@1", "guidance_interval": (0.0, 0.55)}
    for cache in ("static:mask@1100000001", "teacache:100"):
        weak = decisions(euler([0], cache, **interval), "weak")
        assert [weak[0].because, weak[0].distance] == [FIRST, ()]
        assert weak[1].reused


def test_what_is_idle_is_let_go_at_the_next_step() -> None:
    """Not at the end of the request: residuals are large."""
    cache = RequestCache(StepCache(CachePolicy(Every(2)), (True,) * 4, (2, 2)))
    for role in ("strong", "weak"):
        cache.memory(((role,), 0), 0).note_computed(computed(1.0, 1.0))
    idle = weakref.ref(cache.memory((("weak",), 0), 0))
    assert cache.memory((("strong",), 0), 1).computed
    assert idle()
    assert cache.memory((("strong",), 0), 2).computed
    assert not idle()


def test_what_a_branch_knew_before_it_was_idle_is_gone() -> None:
    """Strong and weak share calls for a while, apart and together again."""
    made = carrying()
    schedule = "0-2:1,3-6:full,7-11:1"
    choices: dict[str, Any] = {"guidance": "ccfg:2@1", "schedule": schedule, "cache": "static:mask@" + "0" * 12}
    sample = made.pipeline.sample([0], steps=12, sampler="euler", **choices)
    joined = [call.cached.because for record in sample.records for call in record.calls if call.role == "joined"]
    assert joined == [FORCED, "", "", FIRST, "", "", "", FORCED]


def test_the_memory_outlives_a_change_of_budget() -> None:
    """The residual has the same shape at every budget, and so has the slope of two that differ in it."""
    made = carrying()
    choices: dict[str, Any] = {"schedule": "0-3:2,4-9:full", "cache": "static:mask@1100001001,max_skip=9"}
    made.pipeline.sample([0], steps=10, sampler="euler", **choices)
    kept = [tuple(int(facts_of(asked.inputs[name])[2][0]) for name in RESIDUALS) for asked in made.asked("reuse")]
    weights = [float(asked.inputs["forecast"][0]) for asked in made.asked("reuse")]
    assert kept == [(2, 2)] * 4 + [(4, 2)] * 2
    # computed at t = 1, 0.9, 0.4: so many times the step between the last two to go on
    assert weights == pytest.approx([1, 2, 3, 4, 0.2, 0.4])


def test_a_reused_call_tells_the_profile_that_would_have_served_it() -> None:
    made = carrying()
    (slot,) = made.pipeline.bank.slots
    halves = (Range(1, 1, 3), Range(4, 4, 4))
    slots = [replace(slot, profile=replace(slot.profile, name=str(half.max), latents=half)) for half in halves]
    bank = EngineBank(slots, SPEC.budgets, Precision.FP32, made.pipeline.bank.cache)
    choices: dict[str, Any] = {"schedule": "0-1:2,2-4:full,5:2", "cache": "static:mask@100001,max_skip=9"}
    sample = Pipeline(bank, SPEC, PIXELS).sample([0, 1], steps=6, sampler="euler", guidance="ccfg:2@1", **choices)
    assert reuses(sample) == reuses(sample, "weak") == "011110"
    assert [call.profile for call in sample.calls if call.role == "strong"] == ["3", "3", "4", "4", "4", "3"]
    assert {call.profile for call in sample.calls if call.role == "weak"} == {"3"}


# ---------------------------------------------------------------- every sampler and guidance


def mixed(sampler: str, guided: dict[str, Any], cache: str) -> tuple[Sample, list[Asked]]:
    """Mixed labels under a mixed schedule."""
    made = carrying()
    schedule = "0-3:2,4-8:full,9-11:3"
    sample = made.pipeline.sample([0, 2, 1], steps=12, sampler=sampler, schedule=schedule, cache=cache, **guided)
    return sample, made.ledger


def evaluations(sample: Sample) -> list[tuple[StepRecord, Call]]:
    return [(record, call) for record in sample.records for call in record.calls]


@pytest.mark.parametrize("caches", [CACHES, CACHES[:3]])
def test_every_pair_of_values_occurs(caches: tuple[str, ...]) -> None:
    """The cases that run are not all, but any two values of two different kinds meet in one of them."""
    cases = [(sampler, str(guided), cache) for sampler, guided, cache in all_pairs(caches)]
    kinds = (SAMPLERS, tuple(map(str, GUIDED)), caches)
    assert len(cases) == len(SAMPLERS) * len(GUIDED)
    for one, other in combinations(range(3), 2):
        assert {(case[one], case[other]) for case in cases} == set(product(kinds[one], kinds[other]))


@pytest.mark.parametrize(("sampler", "guided", "cache"), all_pairs(CACHES), ids=str)
def test_a_branch_meets_the_residuals_that_it_computed_last(sampler: str, guided: dict[str, Any], cache: str) -> None:
    """In its own evaluation of the step, its own branch, its own row; told from what the engines wrote down."""
    sample, ledger = mixed(sampler, guided, cache)
    asked = [one for one in ledger if one.graph in ("step", "reuse")]
    latest: dict[tuple[str, bool], list[float]] = {}  # t of what a branch computed, by role and evaluation
    used: dict[tuple[str, bool], int] = {}
    for (record, call), one in zip(evaluations(sample), asked, strict=True):
        key = (call.role, one.t == np.float32(record.t))
        assert call.reused == (one.graph == "reuse")
        if record.index - used.get(key, -1) > 1:
            latest[key] = []
        used[key] = record.index
        if not call.reused:
            latest[key] = [one.t, *latest.get(key, [])][:2]
            continue
        found = [facts_of(one.inputs[name]) for name in RESIDUALS]
        newest, oldest = latest[key][0], latest[key][0 if "order=0" in cache else -1]
        assert [float(t[0]) for t, _, _ in found] == [newest, oldest]
        assert all((kept == WEAK).all() == (call.role == "weak") for _, _, kept in found)
    assert sum(call.reused for _, call in evaluations(sample)) >= 3


def test_static_policies_probe_never_and_teacache_once_an_evaluation_but_for_the_last_step() -> None:
    for case in all_pairs(CACHES):
        sample, ledger = mixed(*case)
        measured = [(one.t, len(one.inputs["x"])) for one in ledger if one.graph == "probe"]
        if case[2].startswith("static"):
            assert measured == [], case
        else:
            answered = [one for one in ledger if one.graph in ("step", "reuse")]
            calls = zip(evaluations(sample), answered, strict=True)
            assert measured == [(one.t, call.rows) for (record, call), one in calls if record.index < 11], case


LINEAR_CHOICES = [
    {"sampler": "euler", "guidance": "none"},
    {"sampler": "heun", "guidance": "none"},
    {"sampler": "ab2", "guidance": "cfg:2"},
    {"sampler": "ab3", "guidance": "ccfg:2@1"},
    {"sampler": "euler-maruyama", "guidance": "autoguidance:2@1"},
    {"sampler": "heun", "guidance": "ccfg:2@1", "guidance_interval": (0.3, 0.7)},
    {"sampler": "euler", "guidance": "cfg:2", "schedule": "0-5:2,6-11:full"},
]


@pytest.mark.parametrize("choices", LINEAR_CHOICES, ids=str)
def test_what_is_linear_in_t_is_forecast_without_error(choices: dict[str, Any]) -> None:
    """Labels, branches of guidance and Heun's two evaluations each keep their own line, across budgets too."""
    pipeline = carrying().pipeline
    # Each line has two computed points, also after a change of what the interval guides.
    mask = "110111011011" if "guidance_interval" in choices else "110110110111"
    exact = pipeline.sample([0, 1, 2], steps=12, seed=1, **choices)
    cached = pipeline.sample([0, 1, 2], steps=12, seed=1, cache=f"static:mask@{mask}", **choices)
    assert sum(call.reused for _, call in evaluations(cached)) >= 3
    np.testing.assert_allclose(cached.latents, exact.latents, rtol=0, atol=2e-3)


# ---------------------------------------------------------------- what is told and what it costs


@pytest.mark.parametrize("cache", CACHES)
def test_summary_and_flops_count_what_was_reused(cache: str) -> None:
    sample, ledger = mixed("heun", {"guidance": "ccfg:2@1"}, cache)
    reused = [one for one in ledger if one.graph == "reuse"]
    steps = [one for one in ledger if one.graph == "step"]
    assert f", {len(reused)}×reused" in sample.summary()
    full = sum(len(one.inputs["latents"]) == 4 for one in steps)
    assert f"{full}×4of4" in sample.summary()
    total = sum(len(one.inputs["x"]) * flops(SPEC, SPEC.budget(len(one.inputs["latents"]))).total for one in steps)
    total += sum(len(one.inputs["x"]) * flops(SPEC, SPEC.full).other for one in reused)
    assert flops_per_image(sample, SPEC) == total / 3


def test_a_decision_is_told_in_every_record() -> None:
    sample, _ = mixed("euler", {"guidance": "cfg:2"}, "teacache:0.7")
    for _, call in evaluations(sample):
        assert call.reused == call.cached.reused == (not call.cached.because)
        assert len(call.cached.distance) == len(call.cached.accumulated)
        assert len(call.cached.distance) in (0, call.rows)
    plain = carrying().pipeline.sample([0], steps=3, sampler="euler")
    assert all(call.cached == Decision(reused=False) for _, call in evaluations(plain))


def test_device_outputs_go_back_as_they_are() -> None:
    """A residual or signal never passes through the host on its way from one engine to another."""
    seen: list[object] = []

    class Watching(FunctionEngine):
        def __call__(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
            seen.extend(inputs[name] for name in ("residual", "residual_prev", "signal_prev") if name in inputs)
            return super().__call__(inputs)

    bank = carrying().pipeline.bank
    made = {name: Watching(function, SPEC.graph(name)) for name, function in (("reuse", reuse), ("probe", probe))}
    watched = EngineBank(bank.slots, SPEC.budgets, Precision.FP32, made)
    pipeline = Pipeline(watched, SPEC, PIXELS, fits=dict.fromkeys(SPEC.budgets, IDENTITY))
    pipeline.sample([0], steps=6, sampler="euler", cache="teacache:100")
    first, *others = seen
    assert isinstance(first, np.ndarray)  # the zeros before the first step
    assert others
    assert all(isinstance(array, HostOutput) for array in others)

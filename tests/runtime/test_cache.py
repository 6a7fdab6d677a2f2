"""Step caching: policies as text, what is remembered for whom, and what it costs in error."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from itertools import zip_longest

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elit_export.bundle import Bundle
from elit_export.errors import InputError
from elit_export.models.cost import flops, flops_per_image
from elit_export.runtime.bank import EngineBank, Slot
from elit_export.runtime.cache import CachePolicy, Computed, Memory
from elit_export.runtime.engine import FunctionEngine, HostArray, HostOutput, to_host
from elit_export.runtime.pipeline import Pipeline
from elit_export.spec import PIXELS, Budget, ModelSpec, Precision, Profile, Range
from elit_export.verify.metrics import difference
from tests.helpers import tiny_spec

FULL = "full"


# ---------------------------------------------------------------- policies


@given(
    every=st.integers(1, 50),
    mask=st.one_of(st.just(()), st.lists(st.booleans(), min_size=1, max_size=40).map(tuple)),
    order=st.integers(0, 1),
    most=st.integers(1, 9),
)
def test_a_policy_reads_what_it_prints(every: int, mask: tuple[bool, ...], order: int, most: int) -> None:
    policy = CachePolicy(every=1 if mask else every, mask=mask, order=order, most=most)
    assert CachePolicy.parse(str(policy)) == policy


def test_none_is_no_policy() -> None:
    assert CachePolicy.parse("none") is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("static:every@3", "1001001001"),  # the last computes anyway
        ("static:every@4", "1000100011"),
        ("static:every@1", "1111111111"),
        ("static:mask@0100000000", "1100000001"),
    ],
)
def test_first_and_last_step_compute(text: str, expected: str) -> None:
    policy = CachePolicy.parse(text)
    assert policy
    assert "".join("01"[compute] for compute in policy.steps(10)) == expected


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("static:every@0", "at least 1"),
        ("static:every@-2", "none of"),
        ("static:every@nan", "none of"),
        ("static:every@2,order=2", "order=2"),
        ("static:every@2,most=0", "at least 1"),
        ("static:every@2,speed=3", "unknown option 'speed=3'"),
        ("static:mask@", "none of"),
        ("static:mask@012", "none of"),
        ("none,order=1", "none of"),
        ("every@2", "none of"),
        ("", "none of"),
    ],
)
def test_other_text_is_refused(text: str, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        CachePolicy.parse(text)


@pytest.mark.parametrize(
    ("cache", "steps", "problem"),
    [
        ("static:mask@101", 4, "mask has 3 digits, this sampling has 4 steps"),
        ("static:every@2", 1, "at least 2 steps"),
    ],
)
def test_a_policy_that_does_not_fit_the_steps_is_refused(cache: str, steps: int, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        linear_pipeline().sample([0], steps=steps, sampler="euler", cache=cache)


def test_engines_without_a_reuse_graph_cannot_cache() -> None:
    pipeline = linear_pipeline()
    bare = Pipeline(EngineBank(pipeline.bank.slots, pipeline.spec.budgets, Precision.FP32), pipeline.spec, PIXELS)
    with pytest.raises(InputError, match="no graph `reuse`"):
        bare.sample([0], steps=4, cache="static:every@2")


# ---------------------------------------------------------------- a branch


def computed(t: float, kept: int, value: float) -> Computed:
    return Computed(t, Budget(kept, 4), np.full((1, 2, 2), value, np.float32))


def test_the_forecast_goes_on_in_a_straight_line() -> None:
    memory = Memory()
    memory.note(0, computed(1.0, 4, 10.0))
    memory.note(1, computed(0.8, 4, 12.0))
    latest, before, weight = memory.forecast(0.5, order=1)
    assert to_host(latest) + weight * (to_host(latest) - to_host(before)) == pytest.approx(15.0)


@pytest.mark.parametrize("order", [0, 1])
def test_one_residual_is_taken_as_it_is(order: int) -> None:
    memory = Memory()
    memory.note(0, computed(1.0, 4, 10.0))
    assert memory.forecast(0.5, order)[2] == 0.0


def test_a_residual_of_another_budget_gives_no_slope() -> None:
    memory = Memory()
    memory.note(0, computed(1.0, 4, 10.0))
    memory.note(1, computed(0.8, 2, 12.0))
    latest, _, weight = memory.forecast(0.5, order=1)
    assert weight == 0.0
    assert float(to_host(latest).flat[0]) == 12.0


# ---------------------------------------------------------------- engines that tell what they were given
#
# The residual is linear in t and carries the label and the budget, and reuse answers with it: so whatever
# reached a sample from another one, another branch or another budget shows in the velocity.


def residual_of(t: HostArray, y: HostArray) -> HostArray:
    return (3.0 * t + 100.0 * y)[:, None, None].astype(np.float32)


def step(inputs: Mapping[str, HostArray]) -> dict[str, HostArray]:
    residual = residual_of(inputs["t"], inputs["y"])
    return {"velocity": velocity_of(inputs["x"], residual), "residual": residual}


def reuse(inputs: Mapping[str, HostArray]) -> dict[str, HostArray]:
    latest, before, weight = inputs["residual"], inputs["residual_prev"], inputs["forecast"][:, None, None]
    return {"velocity": velocity_of(inputs["x"], latest + weight * (latest - before))}


def velocity_of(x: HostArray, residual: HostArray) -> HostArray:
    return np.broadcast_to(residual[:, :, :, None], x.shape).astype(np.float32)


def linear_pipeline() -> Pipeline:
    spec: ModelSpec = tiny_spec()
    every = Profile("every", Range(1, spec.latents, spec.latents), Range(1, 1, 64))
    slots = [Slot(every, FunctionEngine(step))]
    bank = EngineBank(slots, spec.budgets, Precision.FP32, {"reuse": FunctionEngine(reuse)})
    return Pipeline(bank, spec, PIXELS)


LINEAR_CHOICES = [
    {"sampler": "euler", "guidance": "none"},
    {"sampler": "heun", "guidance": "none"},
    {"sampler": "ab2", "guidance": "cfg:2"},
    {"sampler": "ab3", "guidance": "ccfg:2@1"},
    {"sampler": "euler-maruyama", "guidance": "autoguidance:2@2"},
    {"sampler": "heun", "guidance": "ccfg:2@1", "guidance_interval": (0.3, 0.7)},
    {"sampler": "euler", "guidance": "cfg:2", "schedule": "0-5:2,6-11:full"},
]


@pytest.mark.parametrize("choices", LINEAR_CHOICES, ids=str)
def test_what_is_linear_in_t_is_forecast_without_error(choices: dict[str, object]) -> None:
    """Labels, branches of guidance and Heun's two evaluations each keep their own line."""
    pipeline = linear_pipeline()
    # Each line has two computed points, also after a change of budget and of what the interval guides.
    mask = "110111011011" if "guidance_interval" in choices else "110110110111"
    exact = pipeline.sample([0, 1, 2], steps=12, seed=1, **choices)  # type: ignore[arg-type]
    cached = pipeline.sample([0, 1, 2], steps=12, seed=1, cache=f"static:mask@{mask}", **choices)  # type: ignore[arg-type]
    reused = sum(call.reused for record in cached.records for call in record.calls)
    assert reused >= 3
    assert np.allclose(cached.latents, exact.latents, rtol=0, atol=2e-3)


def test_most_reuses_in_a_row() -> None:
    sample = linear_pipeline().sample([0], steps=12, sampler="euler", cache="static:every@100,most=3")
    assert reuses(sample.records) == "011101110110"


def reuses(records: object) -> str:
    return "".join("01"[record.calls[0].reused] for record in records)  # type: ignore[attr-defined]


def test_a_branch_that_was_idle_starts_anew() -> None:
    """Guidance that ends and begins again computes first, whatever the mask says."""
    sample = linear_pipeline().sample(
        [0],
        steps=10,
        sampler="euler",
        guidance="ccfg:2@1",
        guidance_interval=(0.0, 0.55),
        cache="static:mask@1100000001",
    )
    weak = [[call.reused for call in record.calls[1:]] for record in sample.records]
    first = next(index for index, calls in enumerate(weak) if calls)
    assert weak[first] == [False]
    assert weak[first + 1] == [True]


# ---------------------------------------------------------------- requests apart


def test_two_requests_in_turn_share_nothing() -> None:
    pipeline = linear_pipeline()

    def started(label: int) -> Iterator[object]:
        return pipeline.steps([label], steps=12, sampler="ab2", cache="static:every@3")

    alone = [[record.x for record in started(label)] for label in (1, 2)]  # type: ignore[attr-defined]
    turns = zip_longest(started(1), started(2))
    for index, (first, second) in enumerate(turns):
        assert np.array_equal(first.x, alone[0][index])
        assert np.array_equal(second.x, alone[1][index])


def test_two_threads_on_one_bank_share_nothing() -> None:
    pipeline = linear_pipeline()

    def sampled(label: int) -> HostArray:
        return pipeline.sample([label], steps=30, cache="static:every@3").latents

    alone = {label: sampled(label) for label in range(3)}
    found: dict[int, HostArray] = {}
    threads = [threading.Thread(target=lambda label=label: found.update({label: sampled(label)})) for label in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(found[label], alone[label]) for label in alone)


def test_a_cancelled_request_leaves_nothing_behind() -> None:
    pipeline = linear_pipeline()
    whole = pipeline.sample([1], steps=12, cache="static:every@3").latents
    for done in range(1, 12):
        steps = pipeline.steps([2], steps=12, cache="static:every@3")
        for _ in range(done):
            next(steps)
        steps.close()
        assert np.array_equal(pipeline.sample([1], steps=12, cache="static:every@3").latents, whole)


def test_device_outputs_go_back_as_they_are() -> None:
    """A residual never passes through the host on its way from `step` to `reuse`."""
    pipeline = linear_pipeline()
    seen: list[object] = []

    class Watching(FunctionEngine):
        def __call__(self, inputs: Mapping[str, object]) -> Mapping[str, object]:  # type: ignore[override]
            seen.append(inputs["residual"])
            return super().__call__(inputs)  # type: ignore[arg-type]

    bank = EngineBank(pipeline.bank.slots, pipeline.spec.budgets, Precision.FP32, {"reuse": Watching(reuse)})
    Pipeline(bank, pipeline.spec, PIXELS).sample([0], steps=6, cache="static:every@2")
    assert seen
    assert all(isinstance(array, HostOutput) for array in seen)


# ---------------------------------------------------------------- real engines


def test_computing_every_step_changes_nothing(tiny_bundle: Bundle) -> None:
    with Pipeline.load(tiny_bundle.folder) as pipeline:
        plain = pipeline.sample([0, 1], steps=6, guidance="cfg:2")
        cached = pipeline.sample([0, 1], steps=6, guidance="cfg:2", cache="static:every@1")
    assert np.array_equal(plain.latents, cached.latents)


def test_the_forecast_is_worth_its_residual(fashion_bundle: Bundle) -> None:
    """On the shipped model a linear forecast beats reuse as it is, and both beat as few Euler steps."""
    with Pipeline.load(fashion_bundle.folder) as pipeline:
        labels = [0, 3, 7]
        exact = pipeline.sample(labels, steps=60, sampler="heun").latents

        def error_db(steps: int, cache: str) -> float:
            made = pipeline.sample(labels, steps=steps, sampler="euler", cache=cache)
            return difference(made.latents, exact).sqnr_db

        linear, plain = error_db(40, "static:every@3"), error_db(40, "static:every@3,order=0")
        fewer = error_db(14, "none")  # as many computed steps
    assert linear > plain + 3
    assert linear > fewer + 3


def test_records_and_flops_tell_what_was_reused(fashion_bundle: Bundle) -> None:
    with Pipeline.load(fashion_bundle.folder) as pipeline:
        sample = pipeline.sample([1], steps=7, sampler="euler", cache="static:every@3")
        spec = pipeline.spec
    assert reuses(sample.records) == "0110110"
    assert "3×16of16, 4×reused" in sample.summary()
    cost = flops(spec, spec.full)
    assert flops_per_image(sample, spec) == 3 * cost.total + 4 * cost.other

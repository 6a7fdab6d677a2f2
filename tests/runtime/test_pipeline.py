"""The sampling loop and the object around it, with engines that are plain functions of NumPy arrays."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from elit_export.arrays import HostArray
from elit_export.backends.protocols import FunctionEngine
from elit_export.errors import EngineError, InputError
from elit_export.runtime.bank import EngineBank, Slot
from elit_export.runtime.guidance import Guidance, Kind
from elit_export.runtime.noise import SeededNoise
from elit_export.runtime.pipeline import Pipeline
from elit_export.runtime.samplers import SAMPLERS
from elit_export.runtime.sampling import StepRecord
from elit_export.spec import PIXELS, SD_VAE, Budget, DataFacts, Precision, Profile, Range, default_profiles
from tests.helpers import tiny_spec
from tests.runtime.three_branches import Three
from tests.spec.refusals import wrong_refusals

SPEC = tiny_spec(group_size=4)  # (1, 8, 8) pixels, 1 group of 16 latents, classes 0 to 2, 3 means no class
SHAPE = SPEC.sample_shape
NULL = SPEC.null_class
ROWS = Range(1, 4, 8)
FULL, QUARTER, ONE = Budget(16, 16), Budget(4, 16), Budget(1, 16)
Arrays = Mapping[str, HostArray]
Floats = npt.NDArray[np.float64]


def toy_velocity(x: HostArray, t: HostArray, y: HostArray, kept: int) -> HostArray:
    """Depends on every input. Sums and products alone, so that no row's rounding depends on the others."""
    return x * (0.25 + 0.125 * y[:, None, None, None]) + np.float32(kept / 16) * t[:, None, None, None]


class Toy:
    """The toy velocity as the one engine of a pipeline; remembers what it was given."""

    def __init__(self, profiles: tuple[Profile, ...] = default_profiles(16, ROWS), data: DataFacts = PIXELS) -> None:
        self.calls: list[dict[str, HostArray]] = []
        slots = [Slot(profile, FunctionEngine(self._run)) for profile in profiles]
        self.pipeline = Pipeline(EngineBank(slots, SPEC.budgets, Precision.FP32), SPEC, data)

    def _run(self, inputs: Arrays) -> Arrays:
        self.calls.append({name: array.copy() for name, array in inputs.items()})
        return {"velocity": toy_velocity(inputs["x"], inputs["t"], inputs["y"], len(inputs["latents"]))}

    @property
    def kept_and_labels(self) -> list[tuple[int, list[int]]]:
        """(K, y) of every call."""
        return [(len(call["latents"]), call["y"].tolist()) for call in self.calls]

    @property
    def times_and_rows(self) -> list[tuple[float, int]]:
        """(t, rows) of every call."""
        return [(float(call["t"][0]), len(call["x"])) for call in self.calls]


@pytest.fixture
def toy() -> Toy:
    return Toy()


def toy_step(x: Floats, t: float, labels: list[int], kept: int) -> Floats:
    """One evaluation as the runtime makes it: float32 in, float64 out."""
    rows = len(x)
    times = np.full(rows, t, np.float32)
    return toy_velocity(x.astype(np.float32), times, np.array(labels), kept).astype(np.float64)


def finite_until(t_end: float, value: float) -> Pipeline:
    """A model whose velocity is `value` for t ≤ t_end."""

    def function(inputs: Arrays) -> Arrays:
        velocity = inputs["x"] / 2
        velocity[inputs["t"] <= t_end] = value
        return {"velocity": velocity}

    slots = [Slot(profile, FunctionEngine(function)) for profile in default_profiles(16, ROWS)]
    return Pipeline(EngineBank(slots, SPEC.budgets, Precision.FP32), SPEC, PIXELS)


# ---------------------------------------------------------------- what engines get, what callers get


def test_engines_get_float32_while_the_state_is_float64(toy: Toy) -> None:
    sample = toy.pipeline.sample([0, 2], steps=3)
    types = {name: (array.dtype.name, array.shape) for name, array in toy.calls[0].items()}
    assert types == {
        "x": ("float32", (2, *SHAPE)),
        "t": ("float32", (2,)),
        "y": ("int64", (2,)),
        "latents": ("int64", (16,)),
    }
    assert sample.latents.dtype == np.float64
    assert (sample.latents.astype(np.float32) != sample.latents).any()


def test_a_record_cannot_be_written(toy: Toy) -> None:
    for record in toy.pipeline.steps([0], steps=3):
        assert record.x.dtype == np.float64
        with pytest.raises(ValueError, match="read-only"):
            record.x[:] = 0


def test_records_tell_index_and_time(toy: Toy) -> None:
    records = list(toy.pipeline.steps([0], steps=4))
    assert [(record.index, record.t, record.t_next) for record in records] == [
        (0, 1.0, 0.75),
        (1, 0.75, 0.5),
        (2, 0.5, 0.25),
        (3, 0.25, 0.0),
    ]


def test_records_tell_budget_rows_and_profile_of_every_call(toy: Toy) -> None:
    (record,) = toy.pipeline.steps([0, 1], steps=1, sampler="euler", schedule="quarter", guidance="ccfg:3@1")
    assert record.budget == QUARTER
    assert [(call.budget, call.rows, call.profile) for call in record.calls] == [
        (QUARTER, 2, "quarter"),
        (ONE, 2, "sixteenth"),
    ]
    assert all(call.engine_ms >= 0 for call in record.calls)


def test_euler_by_hand(toy: Toy) -> None:
    x = SeededNoise(7, 2, SHAPE)()
    for t in (1.0, 0.75, 0.5, 0.25):
        x = x - 0.25 * toy_step(x, t, [1, 2], 16)
    sample = toy.pipeline.sample([1, 2], steps=4, sampler="euler", seed=7)
    assert np.array_equal(sample.latents, x)


def test_a_time_grid_moves_the_steps(toy: Toy) -> None:
    records = list(toy.pipeline.steps([0], steps=2, sampler="euler", time_grid="shift:3"))
    assert [record.t for record in records] == [1.0, 0.75]
    assert toy.times_and_rows == [(1.0, 1), (0.75, 1)]


def test_a_sample_keeps_labels_records_and_the_last_state(toy: Toy) -> None:
    sample = toy.pipeline.sample([2, 0], steps=3)
    assert sample.labels == (2, 0)
    assert len(sample.records) == 3
    *_, last = toy.pipeline.steps([2, 0], steps=3)
    assert np.array_equal(sample.latents, last.x)
    assert sample.timings.total_s >= sample.timings.engines_s > 0


def test_on_step_hears_every_step_as_it_ends(toy: Toy) -> None:
    heard: list[tuple[int, int]] = []
    sample = toy.pipeline.sample(
        [0], steps=3, sampler="euler", on_step=lambda record: heard.append((record.index, len(toy.calls)))
    )
    assert heard == [(0, 1), (1, 2), (2, 3)]
    assert [record.index for record in sample.records] == [0, 1, 2]


# ---------------------------------------------------------------- schedules


def test_a_schedule_changes_the_budget_step_by_step(toy: Toy) -> None:
    records = list(toy.pipeline.steps([0], steps=4, schedule="0-1:quarter,2:1,3:full", sampler="euler"))
    assert [record.budget for record in records] == [QUARTER, QUARTER, ONE, FULL]
    assert [call.budget for record in records for call in record.calls] == [QUARTER, QUARTER, ONE, FULL]
    assert [kept for kept, _ in toy.kept_and_labels] == [4, 4, 1, 16]


def test_changing_engines_equals_calling_them_by_hand(toy: Toy) -> None:
    x = SeededNoise(0, 1, SHAPE)()
    for t, kept in ((1.0, 16), (0.75, 1), (0.5, 16), (0.25, 1)):
        x = x - 0.25 * toy_step(x, t, [1], kept)
    schedule = [FULL, ONE, FULL, ONE]
    assert np.array_equal(toy.pipeline.sample([1], steps=4, sampler="euler", schedule=schedule).latents, x)


def test_both_evaluations_of_heun_run_at_the_budget_of_the_step(toy: Toy) -> None:
    records = list(toy.pipeline.steps([0], steps=3, sampler="heun", schedule="0:1,1:4,2:16"))
    assert [[call.budget.kept for call in record.calls] for record in records] == [[1, 1], [4, 4], [16]]


# ---------------------------------------------------------------- guidance


def test_cfg_is_one_call_on_doubled_rows_with_no_class_behind(toy: Toy) -> None:
    toy.pipeline.sample([0, 2], steps=1, sampler="euler", guidance="cfg:3", schedule="quarter")
    assert toy.kept_and_labels == [(4, [0, 2, NULL, NULL])]
    x = toy.calls[0]["x"]
    assert np.array_equal(x[:2], x[2:])


def test_ccfg_is_two_calls_at_two_budgets_the_weak_one_without_class(toy: Toy) -> None:
    toy.pipeline.sample([0, 2], steps=1, sampler="euler", guidance="ccfg:3@1")
    assert toy.kept_and_labels == [(16, [0, 2]), (1, [NULL, NULL])]


def test_autoguidance_is_two_calls_at_two_budgets_with_the_same_classes(toy: Toy) -> None:
    toy.pipeline.sample([0, 2], steps=1, sampler="euler", guidance="autoguidance:3@1")
    assert toy.kept_and_labels == [(16, [0, 2]), (1, [0, 2])]


def test_branches_that_meet_at_one_budget_share_a_call(toy: Toy) -> None:
    toy.pipeline.sample([0], steps=2, guidance="ccfg:3@quarter", schedule="0:full,1:quarter", sampler="euler")
    assert toy.kept_and_labels == [(16, [0]), (4, [NULL]), (4, [0, NULL])]


@pytest.mark.parametrize(
    ("guidance", "weak_labels", "weak_kept"),
    [("cfg:3", [NULL, NULL], 16), ("ccfg:3@1", [NULL, NULL], 1), ("autoguidance:3@1", [0, 2], 1)],
)
def test_guidance_goes_from_the_weak_velocity_through_the_strong_one(
    toy: Toy, guidance: str, weak_labels: list[int], weak_kept: int
) -> None:
    start = SeededNoise(0, 2, SHAPE)()
    strong = toy_step(start, 1.0, [0, 2], 16)
    weak = toy_step(start, 1.0, weak_labels, weak_kept)
    sample = toy.pipeline.sample([0, 2], steps=1, guidance=guidance, sampler="euler")
    assert np.allclose(sample.latents, start - (weak + 3 * (strong - weak)), rtol=0, atol=1e-15)


def test_a_scale_of_one_is_no_guidance(toy: Toy) -> None:
    guided = toy.pipeline.sample([0], steps=3, guidance="cfg:1")
    assert {rows for _, rows in toy.times_and_rows} == {1}
    assert np.array_equal(guided.latents, toy.pipeline.sample([0], steps=3).latents)


def test_both_ends_of_the_guidance_interval_are_guided(toy: Toy) -> None:
    choices: dict[str, Any] = {"guidance": "cfg:3", "guidance_interval": (0.25, 0.75)}
    toy.pipeline.sample([0], steps=8, sampler="euler", **choices)
    assert [t for t, rows in toy.times_and_rows if rows == 2] == [0.75, 0.625, 0.5, 0.375, 0.25]


def test_an_interval_end_written_as_a_decimal_meets_the_step_at_that_time(toy: Toy) -> None:
    choices: dict[str, Any] = {"guidance": "cfg:3", "guidance_interval": (0.3, 0.7)}
    records = list(toy.pipeline.steps([0], steps=10, sampler="euler", **choices))
    assert [record.index for record in records if record.calls[0].rows == 2] == [3, 4, 5, 6, 7]


def test_the_interval_is_tested_at_the_time_of_each_evaluation(toy: Toy) -> None:
    """Heun's second evaluation is at t_next."""
    choices: dict[str, Any] = {"guidance": "cfg:3", "guidance_interval": (0.5, 0.75)}
    toy.pipeline.sample([0], steps=4, sampler="heun", **choices)
    assert toy.times_and_rows == [(1.0, 1), (0.75, 2), (0.75, 2), (0.5, 2), (0.5, 2), (0.25, 1), (0.25, 1)]


def test_guidance_may_come_as_a_value(toy: Toy) -> None:
    value = Guidance(Kind.CCFG, 3.0, ONE, low=0.5)
    as_text = toy.pipeline.sample([0], steps=4, guidance="ccfg:3@1", guidance_interval=(0.5, 1.0))
    assert np.array_equal(toy.pipeline.sample([0], steps=4, guidance=value).latents, as_text.latents)


def test_a_weak_budget_of_another_model_is_refused(toy: Toy) -> None:
    with pytest.raises(InputError, match="2of64"):
        toy.pipeline.steps([0], guidance=Guidance(Kind.CCFG, 3.0, Budget(2, 64)))


def test_guidance_may_have_any_number_of_branches(toy: Toy) -> None:
    """Strong and null share a call; velocities are combined in the order of the branches."""
    guidance = Three(Kind.CCFG, 3.0, ONE)
    sample = toy.pipeline.sample([2, 0], steps=1, sampler="euler", guidance=guidance, schedule="quarter")
    assert toy.kept_and_labels == [(4, [2, 0, NULL, NULL]), (1, [2, 0])]
    assert [(call.role, call.budget, call.rows) for call in sample.calls] == [("joined", QUARTER, 4), ("weak", ONE, 2)]
    x = toy.pipeline.request([2, 0]).start
    each = [toy_step(x, 1.0, labels, kept) for labels, kept in (([2, 0], 4), ([2, 0], 1), ([NULL, NULL], 4))]
    assert np.array_equal(sample.latents, x - guidance.combine(each, patch=1))


# ---------------------------------------------------------------- randomness


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sample_does_not_depend_on_its_batch(sampler: str) -> None:
    for guidance in ("none", "cfg:3", "autoguidance:2@1"):
        choices: dict[str, Any] = {"steps": 4, "sampler": sampler, "guidance": guidance, "seed": 3}
        together = Toy().pipeline.sample([1, 0, 2], **choices)
        alone = Toy().pipeline.sample([1], **choices)
        assert np.array_equal(together.latents[:1], alone.latents), guidance


@pytest.mark.parametrize("sampler", ["ab2", "euler-maruyama"])
def test_sample_i_of_a_batch_runs_alone_from_the_noise_of_key_seed_and_i(toy: Toy, sampler: str) -> None:
    together = toy.pipeline.sample([1, 0, 2], steps=4, sampler=sampler, seed=3)
    stream = np.random.Generator(np.random.Philox(key=np.array([3, 2], np.uint64)))
    noise = [stream.standard_normal((1, *SHAPE)) for _ in range(4)]
    choices: dict[str, Any] = {"noise": noise[0], "step_noise": noise[1:]} if sampler == "euler-maruyama" else {}
    alone = toy.pipeline.sample([2], steps=4, sampler=sampler, **({"noise": noise[0]} | choices))
    assert np.array_equal(together.latents[2:], alone.latents)


def test_the_seed_decides(toy: Toy) -> None:
    first, again, other = (toy.pipeline.sample([0], steps=2, seed=seed).latents for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_given_noise_starts_the_sampling_and_is_left_alone(toy: Toy) -> None:
    noise = np.full((2, *SHAPE), 0.5)
    toy.pipeline.sample([0, 1], steps=2, noise=noise)
    assert np.array_equal(toy.calls[0]["x"], np.full((2, *SHAPE), 0.5, np.float32))
    assert noise.flags.writeable
    assert (noise == 0.5).all()


def test_noise_that_changes_after_the_request_changes_nothing(toy: Toy) -> None:
    noise = np.full((1, *SHAPE), 0.5)
    records = toy.pipeline.steps([0], steps=2, noise=noise)
    noise[:] = 100
    next(records)
    assert np.array_equal(toy.calls[0]["x"], np.full((1, *SHAPE), 0.5, np.float32))


def test_given_step_noise_takes_the_place_of_the_seed(toy: Toy) -> None:
    seeded = SeededNoise(5, 2, SHAPE)
    start, given = seeded(), np.stack([seeded() for _ in range(3)])
    choices: dict[str, Any] = {"steps": 4, "sampler": "euler-maruyama"}
    expected = toy.pipeline.sample([0, 1], seed=5, **choices)
    found = toy.pipeline.sample([0, 1], seed=99, noise=start, step_noise=given, **choices)
    assert np.array_equal(found.latents, expected.latents)


# ---------------------------------------------------------------- refused before the first step


@pytest.mark.parametrize(
    ("choices", "told"),
    [
        ({"guidance": "cfg:3"}, r"an image is 2 rows at budget 16of16: profile full takes 1\.\.1\.\.1 rows"),
        ({"guidance": "ccfg:3@quarter", "schedule": "0-12:full,13:quarter"}, "an image is 2 rows at budget 4of16"),
    ],
)
def test_an_image_of_more_rows_than_a_profile_takes_is_refused_at_once(choices: dict[str, Any], told: str) -> None:
    toy = Toy(default_profiles(16, Range(1, 1, 1)))
    with pytest.raises(InputError, match=told + ".*; choose guidance of fewer rows an image.* build with other"):
        toy.pipeline.steps([0] * 5, **choices)
    assert not toy.calls


@pytest.mark.parametrize("choices", [{"schedule": "0-12:full,13:quarter"}, {"guidance": "ccfg:3@quarter"}])
def test_a_budget_that_no_profile_covers_is_refused_at_once(choices: dict[str, Any]) -> None:
    toy = Toy((Profile("full", Range(13, 16, 16), ROWS),))
    with pytest.raises(InputError, match="no profile covers budget 4of16; covered: 13of16 to 16of16"):
        toy.pipeline.steps([0], **choices)
    assert not toy.calls


def test_two_calls_at_two_budgets_need_no_doubled_rows(toy: Toy) -> None:
    assert len(toy.pipeline.sample([0] * 8, steps=2, guidance="ccfg:3@1").labels) == 8


def test_rows_that_no_step_runs_are_not_asked_for() -> None:
    """CFG on one image calls for two rows at every t, never for one."""
    toy = Toy((Profile("pair", Range(1, 16, 16), Range(2, 2, 2)),))
    toy.pipeline.sample([0], steps=2, sampler="euler", guidance="cfg:3")
    assert [rows for _, rows in toy.times_and_rows] == [2, 2]


def test_without_guidance_its_scale_asks_for_no_rows(toy: Toy) -> None:
    assert len(toy.pipeline.sample([0] * 8, steps=2, guidance=Guidance(Kind.NONE, 3.0)).labels) == 8


NO_LABELS: list[tuple[Any, str]] = [
    ([], r"at least one whole number or class name, not \[\]"),
    ([0.5], r"whole number or class name, not \[0\.5\]"),
    ([1.0], r"whole number or class name, not \[1\.0\]"),
    (["0"], "label '0' is neither a number nor a class name"),
    ([True], r"whole number or class name, not \[True\]"),
    ([[0, 1]], r"whole number or class name, not \[\[0, 1\]\]"),
    ([[0], [1, 2]], "whole number or class name, not"),
    (2, "whole number or class name, not 2"),
    ([0, 4, -1], "label 4 is out of range: classes are 0 to 2, 3 means no class"),
    ([-1], "label -1 is out of range"),
]


def test_labels_are_checked(toy: Toy) -> None:
    assert wrong_refusals(toy.pipeline.steps, NO_LABELS) == {}


def test_no_class_is_a_label(toy: Toy) -> None:
    toy.pipeline.sample([NULL], steps=1, sampler="euler")
    assert toy.kept_and_labels == [(16, [NULL])]


NO_CHOICES: list[tuple[dict[str, Any], str]] = [
    ({"guidance": "cfg:nan"}, "scale nan must be a finite number"),
    ({"guidance": "cfg:inf"}, "scale inf must be a finite number"),
    ({"guidance": "cfg:0.9"}, r"scale 0\.9 must be .*1 \(no guidance\) or more"),
    ({"guidance": "cgf:3"}, "'cgf:3' is none of: none, cfg:SCALE"),
    ({"guidance": "ccfg:3"}, "ccfg:SCALE@WEAK_BUDGET"),
    ({"guidance": "cfg:3", "guidance_interval": (0.8, 0.2)}, r"interval 0\.8 0\.2: needs 0 <= low <= high <= 1"),
    ({"guidance": "cfg:3", "guidance_interval": (0.0, 2.0)}, r"interval 0\.0 2\.0"),
    ({"sampler": "ddim"}, "unknown sampler 'ddim'; known: euler, heun"),
    ({"seed": -1}, "seed -1 must"),
    ({"steps": 0, "sampler": "ab2"}, "sampler ab2 needs at least 1 steps, not 0"),
    ({"steps": -2}, "needs at least 1 steps, not -2"),
    ({"steps": 1, "sampler": "euler-maruyama"}, "sampler euler-maruyama needs at least 2 steps, not 1"),
    ({"schedule": "third"}, "budget 'third'"),
    ({"schedule": "0-20:full"}, "past the last step; 14 steps are 0 to 13"),
    ({"time_grid": "cosine"}, "'cosine' is neither linear nor shift:S"),
    ({"noise": np.zeros((2, *SHAPE))}, r"noise has shape \(2, 1, 8, 8\), this sampling needs \(1, 1, 8, 8\)"),
    ({"noise": np.full((1, *SHAPE), np.nan)}, "noise holds values that are not finite"),
    ({"noise": np.full((1, *SHAPE), np.inf)}, "noise holds values that are not finite"),
    (
        {"sampler": "euler-maruyama", "steps": 4, "step_noise": np.zeros((4, 1, *SHAPE))},
        r"step_noise has shape \(4, 1, 1, 8, 8\), this sampling needs \(3, 1, 1, 8, 8\)",
    ),
    (
        {"sampler": "euler-maruyama", "steps": 2, "step_noise": np.full((1, 1, *SHAPE), np.nan)},
        "step_noise holds values that are not finite",
    ),
    (
        {"sampler": "heun", "steps": 2, "step_noise": np.zeros((1, 1, *SHAPE))},
        "sampler heun adds no noise; leave step_noise out",
    ),
]


def test_choices_are_checked_before_the_first_step(toy: Toy) -> None:
    assert wrong_refusals(lambda choices: toy.pipeline.steps([0], **choices), NO_CHOICES) == {}
    assert not toy.calls


def test_a_choice_that_does_not_exist_is_refused(toy: Toy) -> None:
    with pytest.raises((InputError, TypeError), match="shedule"):
        toy.pipeline.sample([0], steps=2, shedule="quarter")  # type: ignore[call-arg]


# ---------------------------------------------------------------- failing, cancelling, sharing


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_velocity_that_is_not_finite_names_step_profile_and_precision(value: float) -> None:
    records = finite_until(0.5, value).steps([0], steps=4, schedule="quarter")
    assert [next(records).index, next(records).index] == [0, 1]
    with pytest.raises(EngineError, match=r"step 2 \(t=0\.5\): profile quarter \(fp32\) at budget 4of16 .*not finite"):
        next(records)


def test_nothing_runs_before_the_first_record_is_asked_for(toy: Toy) -> None:
    toy.pipeline.steps([0], steps=4)
    assert not toy.calls


def test_closing_the_generator_cancels(toy: Toy) -> None:
    records = toy.pipeline.steps([0], steps=4, sampler="euler")
    assert isinstance(records, Iterator)
    next(records)
    records.close()  # type: ignore[attr-defined]
    assert list(records) == []
    assert len(toy.calls) == 1


def test_a_cancelled_sampling_leaves_nothing_behind(toy: Toy) -> None:
    expected = Toy().pipeline.sample([1], steps=4).latents
    next(toy.pipeline.steps([1], steps=4))
    assert np.array_equal(toy.pipeline.sample([1], steps=4).latents, expected)


def test_an_error_in_a_listener_stops_the_sampling(toy: Toy) -> None:
    def stop(record: StepRecord) -> None:
        if record.index == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        toy.pipeline.sample([0], steps=4, sampler="euler", on_step=stop)
    assert len(toy.calls) == 2


def test_samplings_may_be_interleaved(toy: Toy) -> None:
    expected = [Toy().pipeline.sample([label], steps=4, seed=label).latents for label in (0, 1)]
    pairs = zip(*(toy.pipeline.steps([label], steps=4, seed=label) for label in (0, 1)), strict=True)
    *_, last = pairs
    assert all(np.array_equal(record.x, latents) for record, latents in zip(last, expected, strict=True))


def test_threads_that_share_a_pipeline_get_what_one_thread_gets(toy: Toy) -> None:
    requests: list[dict[str, Any]] = [
        {"labels": [0, 1], "guidance": "cfg:3", "schedule": "quarter", "seed": 1},
        {"labels": [2], "guidance": "ccfg:2@1", "sampler": "euler-maruyama", "seed": 2},
    ]
    expected = [Toy().pipeline.sample(**request, steps=30).latents for request in requests]
    together = threading.Barrier(2)

    def run(request: dict[str, Any]) -> Floats:
        together.wait(5)
        return toy.pipeline.sample(**request, steps=30).latents

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(run, requests))
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_closed_pipeline_refuses_and_says_what_to_do(toy: Toy) -> None:
    with toy.pipeline as pipeline:
        pipeline.sample([0], steps=1)
    with pytest.raises(EngineError, match="bank is closed; load the pipeline again"):
        pipeline.sample([0], steps=1)


def test_closing_in_the_middle_of_a_sampling_names_the_step(toy: Toy) -> None:
    records = toy.pipeline.steps([0], steps=4)
    next(records)
    toy.pipeline.close()
    with pytest.raises(EngineError, match=r"step 1 \(t=0\.75\): .*closed"):
        next(records)


# ---------------------------------------------------------------- samples


def test_the_summary_counts_images_steps_and_calls_by_budget(toy: Toy) -> None:
    sample = toy.pipeline.sample([0, 1], steps=4, guidance="ccfg:3@1", schedule="0-2:full,3:quarter", sampler="euler")
    told = sample.summary()
    assert told.startswith("2 images in 4 steps, engine calls 3×16of16, 4×1of16, 1×4of16; ")
    assert "ms per image" in told
    assert told.endswith("% in engines")


def test_pictures_of_a_pixel_model() -> None:
    toy = Toy(data=DataFacts(kind="pixels", low=0.0, high=2.0))
    sample = toy.pipeline.sample([0, 1, 2], steps=2)
    assert sample.images.dtype == np.uint8
    assert sample.images.shape == (3, 8, 8, 1)
    expected = np.clip(sample.latents / 2, 0, 1) * 255
    assert np.abs(sample.images[..., 0] - expected[:, 0]).max() <= 0.5


def test_latents_of_a_vae_are_no_pictures_and_the_message_tells_what_to_do() -> None:
    sample = Toy(data=SD_VAE).pipeline.sample([0], steps=2)
    told = r"stabilityai/sd-vae-ft-ema.*pipeline\.decode\(sample\.latents\).*\[decoder\] folder = "
    with pytest.raises(InputError, match=told):
        _ = sample.images


def test_labels_of_a_sample_are_plain_numbers(toy: Toy) -> None:
    labels: Any = np.array([2, 0])
    assert json.dumps(toy.pipeline.sample(labels, steps=1).labels) == "[2, 0]"


@pytest.mark.parametrize("choice", [{"seed": 1.5}, {"seed": "3"}, {"steps": 2.0}])
def test_numbers_that_are_not_whole_are_refused(toy: Toy, choice: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="must be a whole number"):
        toy.pipeline.sample([0], **choice)


def test_a_schedule_may_be_a_plain_number(toy: Toy) -> None:
    (record,) = toy.pipeline.steps([0], steps=1, schedule=2, sampler="euler")
    assert record.budget.kept == 2


@pytest.mark.parametrize("given", [{}, {"step_noise": np.ones((3, 1, 1, 8, 8))}], ids=["the seed's", "given"])
def test_a_request_may_be_run_again(toy: Toy, given: dict[str, Any]) -> None:
    """Also one of a sampler that takes noise at every step."""
    request = toy.pipeline.request([1], steps=4, sampler="euler-maruyama", **given)
    first, again = (toy.pipeline.run(request).latents for _ in range(2))
    assert np.array_equal(first, again)
    assert np.array_equal(first, toy.pipeline.sample([1], steps=4, sampler="euler-maruyama", **given).latents)

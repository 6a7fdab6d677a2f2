"""Batches of any size are split by themselves: into parts that the profiles take, with the results that these have."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from elit_export.backends.protocols import FunctionEngine
from elit_export.bundle.reading import Bundle
from elit_export.errors import EngineError, InputError
from elit_export.runtime.bank import EngineBank, Slot
from elit_export.runtime.coverage import CallSize, Coverage
from elit_export.runtime.noise import SeededNoise
from elit_export.runtime.pipeline import Pipeline
from elit_export.runtime.split import split
from elit_export.spec import PIXELS, Budget, Precision, Profile, Range, default_profiles
from elit_export.spec.limits import IMAGES
from elit_export.verify.metrics import difference
from tests.runtime.carrying import SPEC as CARRYING_SPEC
from tests.runtime.carrying import carrying
from tests.runtime.test_pipeline import FULL, QUARTER, SHAPE, SPEC, Toy

LABELS = [0, 1, 2, 3, 0, 2, 1, 1, 0, 2, 3]


@pytest.fixture
def toy() -> Toy:
    """Calls of 1 to 8 rows."""
    return Toy()


def with_rows(rows: Range) -> Toy:
    return Toy(default_profiles(16, rows))


def carrying_rows(rows: Range) -> Pipeline:
    """Engines that tell what they were given, with other rows."""
    made = carrying().pipeline
    slots = [Slot(replace(slot.profile, rows=rows), slot.engine) for slot in made.bank.slots]
    bank = EngineBank(slots, CARRYING_SPEC.budgets, Precision.FP32, made.bank.cache)
    return Pipeline(bank, CARRYING_SPEC, PIXELS, fits=made.coverage.fits)


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("rows", "branches", "images", "expected"),
    [
        ([(1, 8)], 1, 8, (8,)),
        ([(1, 8)], 1, 9, (5, 4)),
        ([(1, 8)], 2, 9, (3, 3, 3)),
        ([(1, 9)], 2, 9, (3, 3, 3)),  # four images are 8 rows, and nine images in three parts are even
        ([(1, 1)], 1, 3, (1, 1, 1)),
        ([(4, 6)], 1, 9, (5, 4)),  # 6 and 3 would leave fewer rows than a call takes
        ([(4, 8)], 2, 6, (3, 3)),
        ([(3, 8)], 2, 10, (4, 3, 3)),  # an image is 2 rows, so a part has 2 to 4
        ([(1, 1), (8, 8)], 1, 20, (8, 8, 1, 1, 1, 1)),  # engines of fixed sizes
        ([(2, 2), (5, 5)], 1, 7, (5, 2)),
        ([(1, 3), (5, 8)], 1, 12, (6, 6)),
        ([(1, 3), (5, 8)], 1, 4, (2, 2)),
        ([(6, 6), (8, 10)], 1, 31, (9, 8, 8, 6)),  # not even, and no 10 among them
    ],
)
def test_a_batch_is_split_into_few_even_parts(
    rows: list[tuple[int, int]], branches: int, images: int, expected: tuple[int, ...]
) -> None:
    assert split(profiles_of(rows), [CallSize(FULL, branches, 0)], images) == expected
    assert sum(expected) == images


def profiles_of(rows: Iterable[tuple[int, int]]) -> Coverage:
    ranges = [Range(low, low, high) for low, high in rows]
    profiles = tuple(Profile(str(number), Range(1, 16, 16), each) for number, each in enumerate(ranges))
    return Coverage(profiles, SPEC.budgets)


def test_every_split_that_exists_is_found() -> None:
    """Against all sums of sizes, made one part after another; where none has the images, the next that some have."""
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        starts = generator.integers(1, 20, generator.integers(1, 4)).tolist()
        rows = [(low, low + int(generator.integers(0, 3))) for low in starts]
        sizes = {size for low, high in rows for size in range(low, high + 1)}
        sums = {0}
        for total in range(1, 120):
            if any(total - size in sums for size in sizes):
                sums.add(total)
        images = int(generator.integers(1, 90))
        coverage, calls = profiles_of(rows), [CallSize(FULL, 1, 0)]
        if images in sums:
            parts = split(coverage, calls, images)
            assert sum(parts) == images
            assert set(parts) <= sizes
            assert parts == tuple(sorted(parts, reverse=True))
        else:
            refused += 1
            enough = min(total for total in sums if total > images)
            with pytest.raises(InputError, match=f"sample {enough} images, or build"):
                split(coverage, calls, images)
    assert 30 < refused < 270


def test_a_million_images_of_uneven_sizes_are_split_at_once() -> None:
    started = time.perf_counter()
    parts = split(profiles_of([(7, 7), (64, 64)]), [CallSize(FULL, 1, 0)], 999_999)
    assert time.perf_counter() - started < 2
    assert (sum(parts), {*parts}) == (999_999, {7, 64})
    assert parts.count(7) == 9  # the least with which the rest is a multiple of 64


def test_a_part_fits_every_call_of_a_sampling() -> None:
    """Of profiles with other rows, and of steps with and without guidance."""
    profiles = (Profile("low", Range(1, 4, 8), Range(1, 4, 12)), Profile("high", Range(9, 16, 16), Range(3, 3, 8)))
    calls = [CallSize(FULL, 2, 0), CallSize(FULL, 1, 0), CallSize(QUARTER, 2, 0)]
    coverage = Coverage(profiles, SPEC.budgets)
    assert split(coverage, calls, 4) == (4,)
    assert split(coverage, calls, 11) == (4, 4, 3)  # 3 rows or more where a call is of the strong branch alone
    with pytest.raises(InputError, match=r"5 images cannot be split into parts: .*; sample 6 images, or build with"):
        split(coverage, calls, 5)
    assert split(coverage, calls, 6) == (3, 3)


@pytest.mark.parametrize(
    ("rows", "branches", "images", "told"),
    [
        (
            (2, 4),
            1,
            1,
            r"1 images .*an image is 1 rows at budget 16of16: profile p takes 2\.\.2\.\.4 rows.*; sample 2 im",
        ),
        ((4, 4), 1, 7, r"7 images .*; sample 8 images, or build with other `rows`"),
        ((1, 1), 2, 3, r"an image is 2 rows .* takes 1\.\.1\.\.1 rows .*; choose guidance of fewer rows an image"),
        (
            (1, 8),
            1,
            int(IMAGES.maximum) + 1,
            "at most 1,000,000 images in a call: .*; sample them in several runs",
        ),
        ((1, 8), 1, 10**18, "at most 1,000,000 images in a call: .*; sample them in several runs"),
    ],
)
def test_a_batch_that_cannot_be_split_says_what_can(
    rows: tuple[int, int], branches: int, images: int, told: str
) -> None:
    coverage = Coverage((Profile("p", Range(1, 16, 16), Range(rows[0], rows[0], rows[1])),), SPEC.budgets)
    with pytest.raises(InputError, match=told):
        split(coverage, [CallSize(FULL, branches, 0)], images)


def test_a_part_may_have_fewer_images_than_the_profiles_take() -> None:
    coverage = Coverage((Profile("p", Range(1, 16, 16), Range(2, 4, 8)),), SPEC.budgets)
    calls = [CallSize(Budget(1, 16), 1, 0)]
    assert split(coverage, calls, 9, at_once=3) == (3, 3, 3)
    with pytest.raises(InputError, match="parts of at most 1: "):
        split(coverage, calls, 9, at_once=1)


# ---------------------------------------------------------------- results are those of the parts


@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"sampler": "heun", "schedule": "0-1:quarter,2-3:full", "steps": 4},
        {"sampler": "euler-maruyama", "guidance": "cfg:2", "steps": 3},
        {"guidance": "cfg:2", "guidance_interval": (0.3, 0.7)},
        {"guidance": "ccfg:3@1", "time_grid": "shift:2"},
    ],
    ids=str,
)
def test_a_split_sampling_gives_bit_for_bit_what_its_parts_give(toy: Toy, choices: dict[str, Any]) -> None:
    sample = toy.pipeline.sample(LABELS, seed=5, **choices)
    assert len(sample.part_sizes) > 1
    starts = [0, *np.cumsum(sample.part_sizes)]
    parts = [
        toy.pipeline.sample(LABELS[start:stop], seed=5, first_image=start, **choices)
        for start, stop in pairwise(starts)
    ]
    assert np.array_equal(sample.latents, np.concatenate([part.latents for part in parts]))
    assert sample.labels == tuple(LABELS)
    assert sum(call.rows for part in parts for call in part.calls) == sum(call.rows for call in sample.calls)
    one = toy.pipeline.sample(LABELS[6:7], seed=5, first_image=6, **choices)  # rounding here does not see other rows
    assert np.array_equal(one.latents[0], sample.latents[6])


def test_noise_that_is_given_is_split_with_the_images(toy: Toy) -> None:
    choices: dict[str, Any] = {"sampler": "euler-maruyama", "steps": 3}
    seeded = SeededNoise(5, len(LABELS), SHAPE)
    start, steps = seeded(), np.stack([seeded() for _ in range(2)])
    found = toy.pipeline.sample(LABELS, noise=start, step_noise=steps, **choices)
    assert np.array_equal(found.latents, toy.pipeline.sample(LABELS, seed=5, **choices).latents)


def test_the_cache_decides_for_each_part_and_says_so() -> None:
    """A label moves faster the larger it is: alone, the images of label 0 reuse more than beside label 2."""
    pipeline = carrying_rows(Range(1, 4, 8))
    labels = [0] * 8 + [2] * 8
    choices: dict[str, Any] = {"steps": 12, "sampler": "euler", "cache": "teacache:0.3"}
    sample = pipeline.sample(labels, **choices)
    assert sample.part_sizes == (8, 8)
    parts = [pipeline.sample(labels[a:b], first_image=a, **choices) for a, b in ((0, 8), (8, 16))]
    assert np.array_equal(sample.latents, np.concatenate([part.latents for part in parts]))
    reused = [[call.reused for call in part.calls] for part in parts]
    assert reused[0] != reused[-1]
    assert [call.reused for call in sample.calls] == [each for step in zip(*reused, strict=True) for each in step]
    assert f"each of {len(parts)} parts decided by itself" in sample.cache_summary()
    assert "parts" not in parts[0].cache_summary()


@pytest.mark.parametrize("rule", ["static:every@2", "static:mask@101011010101"])
def test_a_cache_that_measures_nothing_decides_for_all_parts_alike(rule: str) -> None:
    sample = carrying_rows(Range(1, 4, 8)).sample([0] * 16, steps=12, sampler="euler", cache=rule)
    assert sample.part_sizes == (8, 8)
    assert "parts" not in sample.cache_summary()


def test_what_the_cache_keeps_is_of_one_part() -> None:
    """No call reuses the residual of another part: the engines here refuse those of other labels and other rows."""
    labels = [image % CARRYING_SPEC.num_classes for image in range(20)]
    sample = carrying_rows(Range(2, 4, 7)).sample(labels, steps=9, cache="static:every@3", guidance="cfg:2")
    assert sample.part_sizes == (3, 3, 3, 3, 3, 3, 2)
    assert np.isfinite(sample.latents).all()


def test_real_engines_split_within_parity(tiny_bundle: Bundle) -> None:
    labels = [image % 3 for image in range(11)]
    choices: dict[str, Any] = {"steps": 4, "guidance": "cfg:2", "schedule": "0-1:half,2-3:full"}
    with Pipeline.load(tiny_bundle.folder) as pipeline:
        sample = pipeline.sample(labels, **choices)
        assert sample.part_sizes == (4, 4, 3)
        parts = [pipeline.sample(labels[a:b], first_image=a, **choices) for a, b in ((0, 4), (4, 8), (8, 11))]
        alone = [pipeline.sample([label], first_image=image, **choices) for image, label in enumerate(labels)]
    assert np.array_equal(sample.latents, np.concatenate([part.latents for part in parts]))
    assert difference(np.concatenate([one.latents for one in alone]), sample.latents).sqnr_db > 90


# ---------------------------------------------------------------- what is recorded


def test_steps_tell_whose_they_are_and_a_sample_has_whole_ones(toy: Toy) -> None:
    heard: list[tuple[int, range]] = []
    sample = toy.pipeline.sample(
        LABELS, steps=3, sampler="euler", on_step=lambda record: heard.append((record.index, record.images))
    )
    first, second = range(6), range(6, 11)
    assert heard == [(0, first), (1, first), (2, first), (0, second), (1, second), (2, second)]
    assert toy.pipeline.request(LABELS, steps=3, sampler="euler").records == len(heard)
    assert [record.index for record in sample.records] == [0, 1, 2]
    for record in sample.records:
        assert [call.rows for call in record.calls] == [6, 5]
        assert not hasattr(record, "x")  # states of all steps would fill the memory
    assert len(sample.latents) == 11
    assert not sample.latents.flags.writeable
    assert sample.timings.engines_s == pytest.approx(sum(call.engine_ms for call in sample.calls) / 1e3)
    assert "11 images in 3 steps, in 2 parts of at most 6, engine calls 6×16of16" in repr(sample)


def test_the_size_of_every_call_is_known_before_any(toy: Toy) -> None:
    request = toy.pipeline.request(LABELS, steps=2, sampler="euler", guidance="cfg:2", guidance_interval=(0.9, 1))
    sizes = [(size.budget, size.rows) for size in request.sizes()]
    assert sizes == [(FULL, 8), (FULL, 4), (FULL, 8), (FULL, 4), (FULL, 6), (FULL, 3)]
    toy.pipeline.run(request)
    assert [rows for _, rows in toy.times_and_rows] == [rows for _, rows in sizes]


def test_a_failing_part_names_its_step() -> None:
    calls = []

    def function(inputs: Any) -> Any:
        calls.append(len(inputs["x"]))
        return {"velocity": inputs["x"] * (np.nan if len(calls) > 5 else 1)}

    slots = [Slot(profile, FunctionEngine(function)) for profile in default_profiles(16, Range(1, 2, 2))]
    pipeline = Pipeline(EngineBank(slots, SPEC.budgets, Precision.FP32), SPEC, PIXELS)
    with pytest.raises(EngineError, match=r"step 2 \(t=0\.3333\)"):
        pipeline.sample([0] * 4, steps=3, sampler="euler")


def test_too_few_images_are_refused_before_an_engine_is_asked() -> None:
    toy = with_rows(Range(2, 4, 8))
    assert toy.pipeline.sample([0] * 9, steps=2).part_sizes == (5, 4)
    toy.calls.clear()
    with pytest.raises(InputError, match=r"1 images cannot be split into parts: .*; sample 2 images"):
        toy.pipeline.steps([0], steps=2)
    assert not toy.calls


# ---------------------------------------------------------------- numbering goes on


def test_a_numbering_goes_on_at_first_image(toy: Toy) -> None:
    whole = toy.pipeline.sample(LABELS, steps=3, sampler="euler-maruyama", seed=2)
    rest = toy.pipeline.sample(LABELS[4:], steps=3, sampler="euler-maruyama", seed=2, first_image=4)
    assert np.array_equal(rest.latents, whole.latents[4:])
    far = toy.pipeline.request([0], first_image=2**63 - 1)
    assert not np.array_equal(far.start, toy.pipeline.request([0]).start)


@pytest.mark.parametrize("number", [-1, 2**63])
def test_a_number_that_no_image_has_is_refused(toy: Toy, number: int) -> None:
    with pytest.raises(InputError, match=f"first_image {number} is out of range; choose one of 0 to"):
        toy.pipeline.steps([0], first_image=number)


def test_a_request_is_a_value_whose_parts_are_requests(toy: Toy) -> None:
    request = toy.pipeline.request(LABELS, steps=2)
    parts = list(request.parts())
    assert [part.part_sizes for part in parts] == [(6,), (5,)]
    assert [part.first_image for part in parts] == [0, 6]
    again = toy.pipeline.run(replace(request))
    assert np.array_equal(np.concatenate([toy.pipeline.run(part).latents for part in parts]), again.latents)

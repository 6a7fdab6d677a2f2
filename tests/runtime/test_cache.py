"""Step caching: policies as text, which steps they let compute, what they need, and what they cost in error."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elit_export.arrays import HostArray
from elit_export.bundle.reading import Bundle
from elit_export.cost.flops import flops, flops_per_image
from elit_export.errors import BundleError, CalibrationError, InputError
from elit_export.models.sit import ElitSiT
from elit_export.runtime.bank import EngineBank, Slot
from elit_export.runtime.opening import cache_fits
from elit_export.runtime.pipeline import Pipeline, Sample
from elit_export.runtime.sampling import step_cache_of
from elit_export.runtime.step_cache.base import Rule
from elit_export.runtime.step_cache.every import Every
from elit_export.runtime.step_cache.mask import Mask
from elit_export.runtime.step_cache.policy import CachePolicy
from elit_export.runtime.step_cache.teacache import TeaCache
from elit_export.runtime.step_cache.time_distance import TimeDistance
from elit_export.spec import PIXELS, Fit, Precision, Range
from elit_export.verify.metrics import difference
from tests.helpers import calibrate, fit_of
from tests.runtime.carrying import SPEC, carrying, time
from tests.spec.refusals import wrong_refusals

BAD = ("-1", "-0.1", "nan", "inf", "-inf", "1e999")
thresholds = st.floats(0, allow_nan=False, allow_infinity=False)
rules = st.one_of(
    st.builds(Every, st.integers(1, 9_999)),
    st.builds(Mask, st.lists(st.booleans(), min_size=1, max_size=40).map(tuple)),
    st.builds(TimeDistance, thresholds),
    st.builds(TeaCache, thresholds),
)


def unasked() -> Sequence[float]:
    raise AssertionError("only static:time asks how the embedding of t changes")


def policy_of(text: str) -> CachePolicy:
    policy = CachePolicy.parse(text)
    assert policy
    return policy


def digits(computes: Sequence[bool]) -> str:
    return "".join("01"[compute] for compute in computes)


# ---------------------------------------------------------------- policies as text


@given(rule=rules, order=st.integers(0, 1), max_skip=st.integers(1, 999_999), warmup=st.integers(1, 999_999))
def test_a_policy_reads_what_it_prints(rule: Rule, order: int, max_skip: int, warmup: int) -> None:
    policy = CachePolicy(rule, order=order, max_skip=max_skip, warmup=warmup)
    assert CachePolicy.parse(str(policy)) == policy


@pytest.mark.parametrize("rule", [TeaCache, TimeDistance])
@pytest.mark.parametrize("threshold", [np.float64(0.3), np.float32(0.25), 1])
def test_a_threshold_of_any_kind_of_number_is_printed_as_text(
    rule: type[TeaCache | TimeDistance], threshold: Any
) -> None:
    assert CachePolicy.parse(str(CachePolicy(rule(threshold)))) == CachePolicy(rule(threshold))


def test_what_is_left_out_has_its_default() -> None:
    assert policy_of("teacache:0.2") == CachePolicy(TeaCache(0.2), order=1, max_skip=4, warmup=1)
    assert policy_of(" static:every@3,warmup=2 ") == CachePolicy(Every(3), order=1, max_skip=2, warmup=2)


@pytest.mark.parametrize(
    ("cache", "mask"),
    [
        ("static:every@8", "1000000010000001"),
        ("static:every@8,max_skip=3", "1000100010001001"),
        ("static:mask@1000000000000000", "1000000000000001"),
        ("static:mask@1000000000100000,max_skip=4", "1000010000100001"),
    ],
)
def test_what_counts_or_names_steps_is_capped_only_if_asked(cache: str, mask: str) -> None:
    computes = policy_of(cache).computes(16, lambda: [])
    assert "".join("01"[compute] for compute in computes) == mask
    sample = carrying().pipeline.sample([0], steps=16, sampler="euler", cache=cache)
    assert "".join("10"[record.calls[0].reused] for record in sample.records) == mask


def test_the_earlier_name_of_max_skip_is_read_with_a_warning() -> None:
    with pytest.warns(FutureWarning, match="the option most is now called max_skip: write max_skip=3") as warned:
        policy = policy_of("static:every@8,order=0,most=3")
    assert policy == policy_of("static:every@8,order=0,max_skip=3")
    assert str(policy).endswith("order=0,max_skip=3,warmup=1")
    assert [warning.filename for warning in warned] == [__file__]  # where it is to be changed


def test_none_is_no_policy() -> None:
    assert CachePolicy.parse("none") is None


NO_POLICIES = [
    *((f"{rule}{value}", "finite number, 0 or more") for rule in ("teacache:", "static:time@") for value in BAD),
    *((f"{rule}{value}", "is not a number") for rule in ("teacache:", "static:time@") for value in ("", "x", "0.1x")),
    ("teacache", "the threshold '' is not a number"),
    ("static:every@0", "at least 1"),
    ("static:every@-2", "none of"),
    ("static:every@nan", "none of"),
    ("static:every@", "none of"),
    ("static:every@2,order=2", "order=2"),
    ("static:every@2,max_skip=0", "max_skip=0"),
    ("static:every@2,warmup=0", "warmup=0"),
    ("static:every@2,warmup=-1", "unknown option 'warmup=-1'"),
    ("static:every@2,speed=3", "unknown option 'speed=3'"),
    ("static:every@2,", "unknown option ''"),
    ("teacache:0.1,order", "unknown option 'order'"),
    ("static:mask@", "one digit a step"),
    ("static:mask@012", "one digit a step"),
    ("static:mask@1 0", "one digit a step"),
    ("static:mask@١٠", "one digit a step"),
    ("static:", "none of"),
    ("static", "none of"),
    ("static:every", "none of"),
    ("static:other@3", r"no mask there \(.*\); use static:every@N, .*teacache:THRESHOLD, with .* ,max_skip=N"),
    ("teacache@3", "none of"),
    ("none,order=1", "none of"),
    ("every@2", "none of"),
    ("", "none of"),
]


def test_other_text_is_refused() -> None:
    assert wrong_refusals(CachePolicy.parse, NO_POLICIES) == {}


def test_a_mask_may_lie_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "mask").write_text("100 1\n00\t1\n")
    assert policy_of(f"static:{tmp_path / 'mask'},order=0") == policy_of("static:mask@1001001,order=0")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "one digit a step"),
        (b"10x1", "one digit a step"),
        (b"1012", "one digit a step"),
        ("1001\N{ARABIC-INDIC DIGIT ONE}".encode(), "a mask is one digit a step"),
        (b"\xff\x00", "not text"),
        (None, "No such file"),
    ],
)
def test_a_file_with_other_things_is_refused_by_name(tmp_path: Path, content: bytes | None, problem: str) -> None:
    path = tmp_path / "mask"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=problem) as refused:
        CachePolicy.parse(f"static:{path}")
    assert str(path) in str(refused.value)


def test_a_folder_or_no_name_at_all_is_no_file(tmp_path: Path) -> None:
    for name in (tmp_path, "a\0b"):
        with pytest.raises(InputError, match="no mask there"):
            CachePolicy.parse(f"static:{name}")


# ---------------------------------------------------------------- which steps compute


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("static:every@3", "1001001001"),  # the last computes anyway
        ("static:every@4", "1000100011"),
        ("static:every@1", "1111111111"),
        ("static:every@4,warmup=3", "1110100011"),
        ("static:mask@0100000000", "1100000001"),
        ("static:mask@0000000000,warmup=2", "1100000001"),
        ("teacache:0.1", "1000000001"),  # of the others it decides on the way
        ("teacache:0.1,warmup=20", "1111111111"),
    ],
)
def test_first_and_last_step_and_the_warm_up_compute(text: str, expected: str) -> None:
    assert digits(policy_of(text).computes(10, unasked)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("static:time@1", "1001001001"),
        ("static:time@1,warmup=2", "1100100101"),
        ("static:time@1,warmup=3", "1110010011"),  # not at step 3, though 1.2 had added up since step 0
        ("static:time@1,max_skip=1", "1010101011"),  # nor at any odd step
        ("static:time@100,max_skip=3", "1000100011"),
        ("static:time@0", "1111111111"),
        ("static:time@0.4", "1111111111"),  # what reaches the threshold computes
    ],
)
def test_a_step_that_computes_for_any_reason_starts_the_sum_anew(text: str, expected: str) -> None:
    assert digits(policy_of(text).computes(10, lambda: [0.4] * 9)) == expected


@given(
    changes=st.lists(st.floats(0, 1), min_size=1, max_size=30),
    threshold=st.floats(0, 3),
    max_skip=st.integers(1, 5),
    warmup=st.integers(1, 5),
)
def test_between_computed_steps_less_than_the_threshold_adds_up(
    changes: list[float], threshold: float, max_skip: int, warmup: int
) -> None:
    """And none computes without a reason."""
    computes = CachePolicy(TimeDistance(threshold), max_skip=max_skip, warmup=warmup).computes(
        len(changes) + 1, lambda: changes
    )
    last = 0
    for step in range(1, len(computes)):
        total = sum(changes[last:step])
        if computes[step]:
            reasons = (total >= threshold, step < warmup, step - last - 1 == max_skip, step == len(computes) - 1)
            assert any(reasons)
            last = step
        else:
            assert total < threshold
            assert step - last <= max_skip


@pytest.mark.parametrize(
    ("cache", "steps", "problem"),
    [
        ("static:mask@101", 4, "mask has 3 digits, this sampling has 4 steps"),
        ("static:mask@10101", 4, "mask has 5 digits, this sampling has 4 steps"),
        *(
            (cache, 1, "at least 2 steps")
            for cache in ("static:every@2", "static:mask@1", "static:time@1", "teacache:1")
        ),
    ],
)
def test_a_policy_that_does_not_fit_the_steps_is_refused(cache: str, steps: int, problem: str) -> None:
    made = carrying()
    with pytest.raises(InputError, match=problem):
        made.pipeline.steps([0], steps=steps, sampler="euler", cache=cache)
    assert made.ledger == []


# ---------------------------------------------------------------- what a policy needs


@pytest.mark.parametrize(
    ("cache", "needed"),
    [
        ("static:every@2", {"reuse"}),
        ("static:mask@1001", {"reuse"}),
        ("static:time@0.1", {"reuse", "time"}),
        ("teacache:0.1", {"reuse", "probe"}),
    ],
)
def test_engines_without_the_graphs_of_a_policy_cannot_cache(cache: str, needed: set[str]) -> None:
    whole = carrying().pipeline

    def with_graphs(names: set[str]) -> Pipeline:
        engines = {name: whole.bank.cache[name] for name in names}
        bank = EngineBank(whole.bank.slots, SPEC.budgets, Precision.FP32, engines)
        return Pipeline(bank, SPEC, PIXELS, fits=whole.coverage.fits)

    assert with_graphs(needed).sample([0], steps=4, cache=cache)
    for name in needed:
        with pytest.raises(InputError, match=f"no graph `{name}`; build the bundle again"):
            with_graphs({"reuse", "probe", "time"} - {name}).steps([0], steps=4, cache=cache)


def test_teacache_without_a_calibration_names_the_command(tiny_bundle: Bundle) -> None:
    with (
        Pipeline.load(tiny_bundle.folder) as pipeline,
        pytest.raises(
            CalibrationError,
            match=r"has none: elit-export calibrate cache .*; or use a cache policy of the family static",
        ),
    ):
        pipeline.steps([0], steps=4, cache="teacache:0.1")


# ---------------------------------------------------------------- a bundle's calibration


@pytest.fixture
def copied(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle.folder, tmp_path / "copied"))


def test_a_calibrated_bundle_samples_with_teacache(copied: Path) -> None:
    calibrate(copied, fit_of(None))
    with Pipeline.load(copied) as pipeline:

        def reused(threshold: float) -> int:
            sample = pipeline.sample([0, 1], steps=12, sampler="euler", cache=f"teacache:{threshold}")
            return sum(call.reused for record in sample.records for call in record.calls)

        assert reused(0) == 0 < reused(0.15) < reused(100) == 8


def test_a_budget_takes_its_own_fit_or_the_nearest(copied: Path) -> None:
    bundle = calibrate(copied, fit_of(1, slope=1.0), fit_of(4, slope=4.0))
    fits, _ = cache_fits(bundle)
    assert fits
    assert {budget.kept: fit.coefficients[1] for budget, fit in fits.items()} == {1: 1.0, 2: 1.0, 3: 4.0, 4: 4.0}
    assert fits[SPEC.full] == Fit((0.0, 4.0, 0.0, 0.0, 0.0), 0.0, 10.0)
    of_all, problem = cache_fits(calibrate(copied, fit_of(None, slope=2.0)))
    assert of_all
    assert not problem
    assert {fit.coefficients[1] for fit in of_all.values()} == {2.0}


def test_a_bundle_without_a_calibration_has_no_fits(tiny_bundle: Bundle) -> None:
    fits, problem = cache_fits(tiny_bundle)
    assert fits is None
    assert problem.endswith(f"elit-export calibrate cache {tiny_bundle.folder}")


def test_a_calibration_of_another_checkpoint_is_refused(copied: Path) -> None:
    calibrate(copied, fit_of(None), checkpoint_sha256="0" * 64)
    with Pipeline.load(copied) as pipeline:
        pipeline.sample([0], steps=3, cache="static:every@2")  # which needs none
        with pytest.raises(CalibrationError, match=r"of another checkpoint .*: elit-export calibrate cache") as refused:
            pipeline.sample([0], steps=3, cache="teacache:0.1")
    assert str(copied) in str(refused.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"coefficients": (0.0, 1.0)},
        {"coefficients": (0.0, math.nan, 0.0, 0.0, 0.0)},
        {"coefficients": (0.0, math.inf, 0.0, 0.0, 0.0)},
        {"low": -1.0},
        {"high": math.inf},
        {"high": math.nan},
    ],
    ids=str,
)
def test_a_calibration_that_says_nothing_is_not_read(copied: Path, wrong: dict[str, Any]) -> None:
    """As of a hand that altered the manifest."""
    facts = fit_of(None)
    calibrate(copied, facts.model_copy(update={"fit": replace(facts.fit, **wrong)}))
    with pytest.raises(BundleError, match=r"damaged: cache_calibration\.fits\.0\.fit"):
        Bundle.open(copied)


# ---------------------------------------------------------------- the embedding of t


def mask_by_hand(model: ElitSiT, times: Sequence[float], threshold: float, max_skip: int, warmup: int) -> str:
    """`static:time@` as one reads it, from the model's own embedder in float64."""
    embedder = model.t_embedder
    with torch.no_grad():
        embedded = [embedder(torch.tensor([t], dtype=torch.float32))[0].double().numpy() for t in times]
    mask, total, reused = "1", 0.0, 0
    for step in range(1, len(times)):
        total += np.abs(embedded[step] - embedded[step - 1]).mean() / np.abs(embedded[step - 1]).mean()
        computes = total >= threshold or step < warmup or reused == max_skip or step == len(times) - 1
        mask += "1" if computes else "0"
        total, reused = (0.0, 0) if computes else (total, reused + 1)
    return mask


@pytest.mark.parametrize("sampler", ["euler", "heun", "euler-maruyama"])
@pytest.mark.parametrize("rows", [1, 8, 16])
def test_time_distances_are_those_of_the_models_own_embedder(
    fashion_bundle: Bundle, fashion_model: ElitSiT, rows: int, sampler: str
) -> None:
    """One row a call, and more rows than steps."""
    found = set()
    with Pipeline.load(fashion_bundle.folder) as pipeline:
        settings = ((12, 0.25, 9, 1), (40, 0.1, 9, 3), (40, 0.3, 4, 1), (40, 0.3, 20, 1))
        for steps, threshold, max_skip, warmup in settings:
            cache = f"static:time@{threshold},max_skip={max_skip},warmup={warmup}"
            request = pipeline.request([3] * rows, steps=steps, sampler=sampler, cache=cache)
            cached = step_cache_of(pipeline.bank, request)
            assert cached
            mask = digits(cached.computes)
            assert mask == mask_by_hand(fashion_model, request.times[:-1].tolist(), threshold, max_skip, warmup)
            found.add(mask)
    assert all("01" in mask[:-3] and "10" in mask for mask in found)
    assert len(found) == 4


@pytest.mark.parametrize("rows", [1, 2, 5, 7, 64])
def test_embeddings_do_not_depend_on_how_many_go_into_a_call(rows: int) -> None:
    made = carrying()
    times = np.linspace(1, 0, 7)
    found = made.pipeline.bank.time_embeddings(times, rows)
    assert found.shape == (7, SPEC.hidden_size)
    np.testing.assert_array_equal(found[:, 0], 1 + times.astype(np.float32))
    assert [len(asked.inputs["t"]) for asked in made.asked("time")] == [rows] * math.ceil(7 / rows)


def test_the_embedding_of_t_is_asked_before_the_first_step_alone() -> None:
    made = carrying()
    list(made.pipeline.steps([0, 1], steps=6, cache="static:time@0.2"))
    asked = [one.graph for one in made.ledger]
    before = asked.index("step")
    assert set(asked[:before]) == {"time"}
    assert "time" not in asked[before:]
    assert made.asked("probe") == []


def with_rows(rows: Range) -> Pipeline:
    """Engines that refuse other numbers of rows, as compiled ones do."""

    def strict(inputs: Mapping[str, HostArray]) -> Mapping[str, HostArray]:
        assert len(inputs["t"]) in rows, "refused by the engine"
        return time(inputs)

    made = carrying(time=strict).pipeline
    slots = [Slot(replace(made.bank.slots[0].profile, rows=rows), made.bank.slots[0].engine)]
    return Pipeline(EngineBank(slots, SPEC.budgets, Precision.FP32, made.bank.cache), SPEC, PIXELS)


def test_the_embedding_of_t_is_asked_with_as_many_rows_as_the_steps_have() -> None:
    """Two images with guidance are four rows, and an engine may take no fewer."""
    choices: dict[str, Any] = {"steps": 6, "cache": "static:time@0.2", "guidance": "cfg:2"}
    assert with_rows(Range(4, 4, 8)).sample([0, 1], **choices)


def test_rows_that_no_profile_takes_are_refused_before_an_engine_is_asked() -> None:
    with pytest.raises(InputError, match=r"5 images cannot be split into parts: .*; sample 8 images"):
        with_rows(Range(4, 4, 4)).steps([0] * 5, steps=6, cache="static:time@0.2")


# ---------------------------------------------------------------- real engines


@pytest.mark.parametrize("cache", ["static:every@1", "static:time@0"])
def test_computing_every_step_changes_nothing(tiny_bundle: Bundle, cache: str) -> None:
    with Pipeline.load(tiny_bundle.folder) as pipeline:
        plain = pipeline.sample([0, 1], steps=6, guidance="cfg:2")
        cached = pipeline.sample([0, 1], steps=6, guidance="cfg:2", cache=cache)
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
        sample: Sample = pipeline.sample([1], steps=7, sampler="euler", cache="static:every@3")
        spec = pipeline.spec
    assert digits([record.calls[0].reused for record in sample.records]) == "0110110"
    assert "3×16of16, 4×reused" in sample.summary()
    cost = flops(spec, spec.full)
    assert flops_per_image(sample, spec) == 3 * cost.total + 4 * cost.other

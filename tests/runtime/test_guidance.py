"""Guidance: how it is written, when it acts, and which branches it compares."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from elit_export.errors import InputError
from elit_export.runtime.guidance import STRONG, WEAK, Branch, Guidance, Kind
from elit_export.spec import Budget
from tests.helpers import tiny_spec
from tests.runtime.three_branches import Three
from tests.spec.refusals import wrong_refusals

SPEC = tiny_spec(input_size=16, group_size=4)  # 16 latents
FULL, HALF, ONE = Budget(16, 16), Budget(8, 16), Budget(1, 16)


FORMS = [
    ("none", Kind.NONE, 1.0, None),
    ("cfg:3", Kind.CFG, 3.0, None),
    ("cfg:1", Kind.CFG, 1.0, None),
    ("cfg:1.5", Kind.CFG, 1.5, None),
    ("ccfg:4@sixteenth", Kind.CCFG, 4.0, ONE),
    ("ccfg:4@8of16", Kind.CCFG, 4.0, HALF),
    ("autoguidance:2@2", Kind.AUTOGUIDANCE, 2.0, Budget(2, 16)),
    ("autoguidance:2.5@0.5", Kind.AUTOGUIDANCE, 2.5, HALF),
    (" cfg:3 ", Kind.CFG, 3.0, None),
    (" none ", Kind.NONE, 1.0, None),
]


def test_every_form_is_read() -> None:
    found = {text: Guidance.parse(text, SPEC) for text, *_ in FORMS}
    assert found == {text: Guidance(kind, scale, weak) for text, kind, scale, weak in FORMS}


@pytest.mark.parametrize("text", ["none", "cfg:3", "cfg:1.5", "ccfg:4@1", "autoguidance:2@2"])
def test_the_written_form_reads_back(text: str) -> None:
    guidance = Guidance.parse(text, SPEC)
    assert str(guidance) == text
    assert Guidance.parse(str(guidance), SPEC) == guidance


def test_what_is_no_guidance_is_refused_with_every_form() -> None:
    forms = r".*none, cfg:SCALE\[,norm\], ccfg:SCALE@WEAK_BUDGET\[,norm\], autoguidance:"
    cases = [
        (text, re.escape(repr(text)) + forms) for text in ("", "cfg", "cfg3", "3", "none:2", "apg:3", "cfg:", "CFG:3")
    ]
    assert wrong_refusals(lambda text: Guidance.parse(text, SPEC), cases) == {}


WRONG_NUMBERS = [
    ("cfg:three", "scale 'three' is not a number"),
    ("cfg:nan", "scale nan must be a finite number"),
    ("cfg:inf", "scale inf must be a finite number"),
    ("cfg:0.5", r"scale 0\.5 must be .* 1 \(no guidance\) or more"),
    ("cfg:-3", r"scale -3\.0 must be"),
    ("cfg:3@4", "guidance cfg: cfg:SCALE"),
    ("ccfg:4", "guidance ccfg: ccfg:SCALE@WEAK_BUDGET"),
    ("autoguidance:2", "guidance autoguidance: autoguidance:SCALE@WEAK_BUDGET"),
    ("ccfg:4@17", "17of16"),
    ("ccfg:4@2of64", "2of64 does not fit a model with 16 latents"),
    ("ccfg:4@third", "'third' is not"),
]


def test_wrong_numbers_are_refused() -> None:
    assert wrong_refusals(lambda text: Guidance.parse(text, SPEC), WRONG_NUMBERS) == {}


@pytest.mark.parametrize("interval", [(-0.1, 1.0), (0.0, 1.1), (0.6, 0.4), (math.nan, 1.0), (0.0, math.nan)])
def test_an_interval_out_of_order_is_refused(interval: tuple[float, float]) -> None:
    with pytest.raises(InputError, match=f"interval {interval[0]} {interval[1]}: needs 0 <= low <= high <= 1"):
        Guidance.parse("cfg:3", SPEC, interval=interval)


def test_both_ends_of_the_interval_are_inside() -> None:
    guidance = Guidance.parse("cfg:3", SPEC, interval=(0.25, 0.75))
    times = (1.0, 0.7500001, 0.75, 0.5, 0.25, 0.2499999, 0.0)
    assert [t for t in times if guidance.active(t)] == [0.75, 0.5, 0.25]


@pytest.mark.parametrize("text", ["none", "cfg:1", "ccfg:1@1"])
def test_without_a_scale_above_one_there_is_one_branch(text: str) -> None:
    assert Guidance.parse(text, SPEC).branches(FULL, 0.5) == (Branch(STRONG, FULL, null_class=False),)


@pytest.mark.parametrize(
    ("text", "weak"),
    [
        ("cfg:3", Branch(WEAK, HALF, null_class=True)),
        ("ccfg:3@1", Branch(WEAK, ONE, null_class=True)),
        ("autoguidance:3@1", Branch(WEAK, ONE, null_class=False)),
    ],
)
def test_the_weak_branch(text: str, weak: Branch) -> None:
    assert Guidance.parse(text, SPEC).branches(HALF, 0.5) == (Branch(STRONG, HALF, null_class=False), weak)


def test_outside_the_interval_there_is_one_branch() -> None:
    guidance = Guidance.parse("ccfg:3@1", SPEC, interval=(0.0, 0.5))
    assert len(guidance.branches(FULL, 0.5)) == 2
    assert len(guidance.branches(FULL, 0.6)) == 1


# ---------------------------------------------------------------- engine calls


def test_branches_at_one_budget_share_a_call() -> None:
    guidance = Three(Kind.CCFG, 2.0, ONE)
    strong, weak, null = guidance.branches(FULL, 0.5)
    assert guidance.batches(FULL, 0.5) == [(strong, null), (weak,)]
    assert guidance.batches(ONE, 0.5) == [guidance.branches(ONE, 0.5)]
    assert [guidance.rows_per_image(budget) for budget in (FULL, ONE)] == [2, 3]


@pytest.mark.parametrize(
    ("text", "one_budget", "rows"),
    [("none", True, (1, 1)), ("cfg:3", True, (2, 2)), ("cfg:1", True, (1, 1)), ("ccfg:3@1", False, (1, 2))],
)
def test_how_many_rows_a_call_has_for_an_image(text: str, one_budget: bool, rows: tuple[int, int]) -> None:
    guidance = Guidance.parse(text, SPEC, interval=(0.2, 0.4))
    assert guidance.one_budget == one_budget
    assert (guidance.rows_per_image(FULL), guidance.rows_per_image(ONE)) == rows


def test_one_velocity_is_taken_as_it_is() -> None:
    velocity = np.linspace(0, 1, 4, dtype=np.float32).reshape(1, 1, 2, 2)
    found = Guidance.parse("cfg:3", SPEC).combine([velocity], patch=2)
    assert found.dtype == np.float64
    assert np.array_equal(found, velocity)


def test_a_weak_branch_at_a_budget_of_its_own_keeps_the_rest() -> None:
    guidance = Guidance.parse("cfg:3,norm", SPEC, interval=(0.2, 0.4))
    assert guidance.with_weak(ONE) == Guidance.parse("ccfg:3@1,norm", SPEC, interval=(0.2, 0.4))

"""Schedules: one budget per step, or a refusal that names the step or the time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from elit_export.runtime.samplers.base import even_times
from elit_export.runtime.schedule import ScheduleLike, resolve_schedule
from elit_export.spec import Budget
from tests.helpers import tiny_spec
from tests.spec.refusals import wrong_refusals

SPEC = tiny_spec(input_size=16, group_size=4)  # 16 latents


def kept(schedule: ScheduleLike, steps: int = 4) -> list[int]:
    """K of every step on even times."""
    return [budget.kept for budget in resolve_schedule(schedule, even_times(steps).tolist(), SPEC)]


# ---------------------------------------------------------------- what is read


FORMS: list[tuple[ScheduleLike, list[int]]] = [
    ("full", [16] * 4),
    ("quarter", [4] * 4),
    ("3", [3] * 4),
    ("0.5", [8] * 4),
    ("2of16", [2] * 4),
    (Budget(5, 16), [5] * 4),
    ([Budget(1, 16), Budget(2, 16), Budget(3, 16), Budget(4, 16)], [1, 2, 3, 4]),
    ("0-3:half", [8] * 4),
    ("0-1:quarter,2-3:full", [4, 4, 16, 16]),
    (" 0-1:quarter , 2-3:full ", [4, 4, 16, 16]),
    ("2-3:full,0-1:quarter", [4, 4, 16, 16]),
    ("0:1,1:2,2:3,3:4", [1, 2, 3, 4]),
    ("0.0-1.0:half", [8] * 4),
    (".0-1.:half", [8] * 4),
    ("0.0-0.5:full,0.5-1.0:quarter", [4, 4, 4, 16]),  # steps start at t = 1, 0.75, 0.5, 0.25
    ("0.5-1.0:quarter,0.0-0.5:full", [4, 4, 4, 16]),
    ("0.0-0.51:full,0.51-1.0:quarter", [4, 4, 16, 16]),
    ("0.0-0.3:1,0.3-0.8:2,0.8-1.0:3", [3, 2, 2, 1]),
    ("0%-50%:quarter,50%-100%:full", [4, 4, 16, 16]),  # the first half of the steps first
    ("50%-100%:full,0%-50%:quarter", [4, 4, 16, 16]),
    ("0-50%:quarter,50-100%:full", [4, 4, 16, 16]),
    ("0%-26%:1,26%-75%:2,75%-100%:3", [1, 1, 2, 3]),  # steps start at 0, 25, 50 and 75 %
    ("0%-12.5%:1,12.5%-100%:2", [1, 2, 2, 2]),
]


def test_every_form_is_read() -> None:
    assert [(schedule, kept(schedule)) for schedule, _ in FORMS] == FORMS


def test_a_time_range_starts_at_its_low_end() -> None:
    """low ≤ t < high: of ten steps, the one that starts at t = 0.3 belongs to 0.3-1.0."""
    assert kept("0.0-0.3:full,0.3-1.0:quarter", steps=10) == [4] * 8 + [16] * 2


def test_a_time_range_counts_by_the_t_a_step_starts_from() -> None:
    times = [1.0, 0.4, 0.3, 0.0]
    chosen = resolve_schedule("0.0-0.35:1,0.35-1.0:2", times, SPEC)
    assert [budget.kept for budget in chosen] == [2, 2, 1]


@given(st.lists(st.integers(1, 16), min_size=1, max_size=20))
def test_any_list_of_budgets_can_be_written_as_step_ranges(budgets: list[int]) -> None:
    text = ",".join(f"{step}:{budget}" for step, budget in enumerate(budgets))
    assert kept(text, steps=len(budgets)) == budgets


@given(cut=st.integers(0, 28), steps=st.integers(30, 60))
def test_two_step_ranges_meet_without_gap(cut: int, steps: int) -> None:
    assert kept(f"0-{cut}:1,{cut + 1}-{steps - 1}:2", steps) == [1] * (cut + 1) + [2] * (steps - cut - 1)


# ---------------------------------------------------------------- what is refused


WRONG: list[tuple[ScheduleLike, str]] = [
    # gaps and overlaps
    ("0-1:half", r"gap: no budget for step 2 \(2 of 4 steps missing\)"),
    ("1-3:half", r"gap: no budget for step 0 \(1 of 4 steps missing\)"),
    ("0-2:half,2-3:full", "overlap: step 2 is in two ranges"),
    ("0.0-0.5:half", r"gap: no budget for t from 0\.5 to 1"),
    ("0.5-1.0:half", r"gap: no budget for t from 0 to 0\.5"),
    ("0.0-0.4:half,0.6-1.0:full", r"gap: no budget for t from 0\.4 to 0\.6"),
    ("0.0-0.6:half,0.4-1.0:full", r"overlap: t from 0\.4 to 0\.6 is in two ranges"),
    ("0.0-1.0:half,0.2-0.3:full", r"overlap: t from 0\.2 to 0\.3 is in two ranges"),
    # shares, which run the way of the sampling; messages tell both directions
    ("0%-50%:half", "gap: no budget for the sampling from 50% to 100%; 0% is where sampling starts, at noise"),
    ("50%-100%:half", "gap: no budget for the sampling from 0% to 50%; 0% is where"),
    ("0%-60%:half,40%-100%:full", "overlap: the sampling from 40% to 60% is in two ranges; 0% is where"),
    ("0%-150%:half", "0%-150%: needs 0 <= low < high <= 100%; 0% is"),
    ("%-100%:half", "'%-100%' is not LOW-HIGH"),
    ("0.0-0.5:half", r"; t = 1 is noise, where sampling starts, .* 0%-50%:quarter,50%-100%:full"),
    # the end
    ("0-4:half", "0-4 goes past the last step; 4 steps are 0 to 3"),
    ("0-3:half,4:full", "4 goes past the last step; 4 steps are 0 to 3"),
    # order
    ("3-0:half", "3-0 runs backwards"),
    ("0.5-0.0:half", r"0\.5-0\.0: needs 0 <= low < high <= 1"),
    ("0.5-0.5:half", r"0\.5-0\.5: needs 0 <= low < high"),
    ("0.0-1.5:half", r"0\.0-1\.5: needs .* high <= 1"),
    # form
    ("0-1:half,0.5-1.0:full", r"all steps \(0-9:half\), all shares .* or all times with a point .*; choose one kind"),
    ("0%-50%:half,0.5-1.0:full", r"all steps .*; choose one kind for all; t = 1 is noise, where sampling starts"),
    ("0%-50%:half,2-3:full", "choose one kind for all"),
    ("a-b:half", "'a-b:half'.*all steps"),
    ("0-1.0:half", "all steps"),
    (".-1.0:half", r"'\.-1\.0' is not LOW-HIGH"),
    ("0-1:half,2-3", "entry '2-3' is not RANGE:BUDGET, e.g. 0-9:quarter"),
    ("0-3:", "entry '0-3:' is not RANGE:BUDGET"),
    ("0-3:half,", "entry '' is not RANGE:BUDGET"),
    # budgets
    ("", "budget ''"),
    ("third", "budget 'third'.*sixteenth"),
    ("0-3:third", "budget 'third'"),
    ("0-3:17", "17of16"),
    ("0.0-1.0:0", "0of16"),
    (Budget(4, 64), "4of64 does not fit a model with 16 latents"),
    ([Budget(4, 64)] * 4, "4of64 does not fit a model with 16 latents"),
    ([Budget(4, 16)] * 3, "lists 3 budgets for 4 steps"),
    ([], "lists 0 budgets for 4 steps"),
]


def test_a_wrong_schedule_is_refused() -> None:
    assert wrong_refusals(kept, WRONG) == {}

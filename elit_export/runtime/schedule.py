"""Schedules: which budget each step runs at."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from elit_export.errors import InputError
from elit_export.spec import Budget, ModelSpec, limits

ScheduleLike = str | int | Budget | Sequence[Budget]
STEPS = re.compile(r"(\d+)(?:-(\d+))?", re.ASCII)
TIMES = re.compile(r"(\d*\.\d*)-(\d*\.\d*)")


def resolve_schedule(schedule: ScheduleLike, times: Sequence[float], spec: ModelSpec) -> tuple[Budget, ...]:
    """One budget per step of `times` (steps + 1 values of t).

    Text is one budget for all steps (`full`, `4`), step ranges, inclusive (`0-9:quarter,10-49:full`),
    or t ranges with low ≤ t < high, the last including 1 (`0.0-0.5:full,0.5-1.0:quarter`); a step
    counts by the t it starts from. Raises InputError for a gap, an overlap or a step past the end.
    """
    steps = len(times) - 1
    if isinstance(schedule, int | np.integer | Budget):
        return (spec.budget(schedule if isinstance(schedule, Budget) else int(schedule)),) * steps
    if not isinstance(schedule, str):
        return _listed_schedule(schedule, steps, spec)
    if ":" not in schedule:
        return (spec.budget(schedule),) * steps
    entries = [_split_entry(entry) for entry in schedule.split(",")]
    if all(STEPS.fullmatch(range_) for range_, _ in entries):
        return _step_ranges(entries, steps, spec)
    if all(TIMES.fullmatch(range_) for range_, _ in entries):
        return _time_ranges(entries, times, spec)
    raise InputError(
        f"schedule {schedule!r}: ranges must be all steps (0-9:half) or all times with a point (0.0-0.5:half)"
    )


def _listed_schedule(budgets: Sequence[Budget], steps: int, spec: ModelSpec) -> tuple[Budget, ...]:
    if len(budgets) != steps:
        raise InputError(f"the schedule lists {len(budgets)} budgets for {steps} steps")
    return tuple(spec.budget(budget) for budget in budgets)


def _split_entry(entry: str) -> tuple[str, str]:
    range_, colon, budget = entry.strip().partition(":")
    if not colon or not budget:
        raise InputError(f"schedule entry {entry.strip()!r} is not RANGE:BUDGET, e.g. 0-9:quarter")
    return range_.strip(), budget.strip()


def _step_ranges(entries: Sequence[tuple[str, str]], steps: int, spec: ModelSpec) -> tuple[Budget, ...]:
    chosen: dict[int, Budget] = {}
    for range_, name in entries:
        match = STEPS.fullmatch(range_)
        assert match
        first, last = (
            limits.STEPS.whole(end, f"schedule range {range_[:40]}") for end in (match[1], match[2] or match[1])
        )
        if first > last:
            raise InputError(f"schedule range {range_} runs backwards")
        if last >= steps:
            raise InputError(f"schedule range {range_} goes past the last step; {steps} steps are 0 to {steps - 1}")
        budget = spec.budget(name)
        for step in range(first, last + 1):
            if step in chosen:
                raise InputError(f"schedule overlap: step {step} is in two ranges")
            chosen[step] = budget
    missing = [step for step in range(steps) if step not in chosen]
    if missing:
        raise InputError(f"schedule gap: no budget for step {missing[0]} ({len(missing)} of {steps} steps missing)")
    return tuple(chosen[step] for step in range(steps))


def _time_ranges(entries: Sequence[tuple[str, str]], times: Sequence[float], spec: ModelSpec) -> tuple[Budget, ...]:
    parts = sorted((*_time_bounds(range_), spec.budget(name)) for range_, name in entries)
    reached = 0.0
    for low, high, _ in parts:
        if low > reached:
            raise InputError(f"schedule gap: no budget for t from {reached:g} to {low:g}")
        if low < reached:
            raise InputError(f"schedule overlap: t from {low:g} to {min(reached, high):g} is in two ranges")
        reached = high
    if reached != 1.0:
        raise InputError(f"schedule gap: no budget for t from {reached:g} to 1")
    return tuple(next(b for low, high, b in reversed(parts) if low <= t) for t in times[:-1])


def _time_bounds(range_: str) -> tuple[float, float]:
    match = TIMES.fullmatch(range_)
    assert match
    try:
        low, high = float(match[1]), float(match[2])
    except ValueError as error:
        raise InputError(f"schedule range {range_!r} is not LOW-HIGH in t") from error
    if not 0 <= low < high <= 1:
        raise InputError(f"schedule range {range_}: needs 0 <= low < high <= 1")
    return low, high

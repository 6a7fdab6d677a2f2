"""Schedules: which budget each step runs at."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from elit_export.errors import InputError
from elit_export.spec import Budget, ModelSpec, limits

ScheduleLike = str | int | Budget | Sequence[Budget]
STEPS = re.compile(r"(\d+)(?:-(\d+))?", re.ASCII)
DIRECTION = "t = 1 is noise, where sampling starts, and t = 0 the image"


@dataclass(frozen=True)
class Span:
    """A form of ranges LOW-HIGH that reach from 0 to `end`: low ≤ place < high, where the place is a step's start."""

    pattern: re.Pattern[str]
    end: float
    unit: str
    name: str  # of what is in ranges
    hint: str

    def between(self, low: float, high: float) -> str:
        return f"{self.name} from {low:g}{self.unit} to {high:g}{self.unit}"


TIMES = Span(
    pattern=re.compile(r"(\d*\.\d*)-(\d*\.\d*)"),
    end=1.0,
    unit="",
    name="t",
    hint=f"{DIRECTION}; ranges in the order of sampling: 0%-50%:quarter,50%-100%:full",
)
SHARES = Span(
    pattern=re.compile(r"(\d*\.?\d*)%?-(\d*\.?\d*)%"),
    end=100.0,
    unit="%",
    name="the sampling",
    hint="0% is where sampling starts, at noise, and 100% its end: 0%-50%:quarter,50%-100%:full",
)


def resolve_schedule(schedule: ScheduleLike, times: Sequence[float], spec: ModelSpec) -> tuple[Budget, ...]:
    """Return one budget per step of `times` (steps + 1 values of t).

    Text is one budget for all steps (`full`, `4`), or ranges. Ranges of steps are inclusive (`0-9:quarter,10-49:full`).
    Ranges by share of the steps go from the start, 0%, which is noise (`0%-50%:quarter,50%-100%:full`). Ranges of t go
    against the sampling, which starts at t = 1 (`0.5-1.0:quarter,0.0-0.5:full` is the same). For both low ≤ place <
    high, the last including its end; a step counts by where it starts. Raises InputError for a gap, an overlap or a
    step past the end.
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
    for span, places in ((TIMES, times[:-1]), (SHARES, [100 * step / steps for step in range(steps)])):
        if all(span.pattern.fullmatch(range_) for range_, _ in entries):
            return _spans(entries, span, places, spec)
    raise InputError(
        f"schedule {schedule!r}: ranges must be all steps (0-9:half), all shares of the sampling (0%-50%:half) or all "
        f"times with a point (0.0-0.5:half)",
        f"choose one kind for all; {DIRECTION}",
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
    budgets: dict[int, Budget] = {}
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
            if step in budgets:
                raise InputError(f"schedule overlap: step {step} is in two ranges")
            budgets[step] = budget
    missing = [step for step in range(steps) if step not in budgets]
    if missing:
        raise InputError(f"schedule gap: no budget for step {missing[0]} ({len(missing)} of {steps} steps missing)")
    return tuple(budgets[step] for step in range(steps))


def _spans(
    entries: Sequence[tuple[str, str]], span: Span, places: Sequence[float], spec: ModelSpec
) -> tuple[Budget, ...]:
    parts = sorted((*_bounds(range_, span), spec.budget(name)) for range_, name in entries)
    reached = 0.0
    for low, high, _ in parts:
        if low > reached:
            raise InputError(f"schedule gap: no budget for {span.between(reached, low)}", span.hint)
        if low < reached:
            both = span.between(low, min(reached, high))
            raise InputError(f"schedule overlap: {both} is in two ranges", span.hint)
        reached = high
    if reached != span.end:
        raise InputError(f"schedule gap: no budget for {span.between(reached, span.end)}", span.hint)
    return tuple(next(budget for low, _, budget in reversed(parts) if low <= place) for place in places)


def _bounds(range_: str, span: Span) -> tuple[float, float]:
    match = span.pattern.fullmatch(range_)
    assert match
    try:
        low, high = float(match[1]), float(match[2])
    except ValueError as error:
        raise InputError(f"schedule range {range_!r} is not LOW-HIGH", span.hint) from error
    if not 0 <= low < high <= span.end:
        raise InputError(f"schedule range {range_}: needs 0 <= low < high <= {span.end:g}{span.unit}", span.hint)
    return low, high

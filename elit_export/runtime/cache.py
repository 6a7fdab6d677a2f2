"""Step caching: the policies, which evaluations reuse what the blocks gave earlier.

    teacache:0.2              measures at every step how much the input changed, reuses while that adds up to less
    static:every@3            every third step computes
    static:mask@1011…         one digit a step, 1 computes
    static:time@0.3           by how much the embedding of t changes
    static:FILE               a file with such digits, no comma in its name
    … ,order=1                how the residual is forecast: 0 as it is, 1 linearly in t
    … ,most=2                 consecutive reuses at most; 4 for rules that measure a change, no limit for the others
    … ,warmup=3               steps at the start that compute

What is reused is the residual: the tokens before the final layer minus those after the embedder. It has
the same shape at every budget. The first and the last step always compute. All of the family `static` is
fixed before sampling starts and makes no call of its own at a step; `teacache` needs a calibration.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from elit_export.arrays import Bools, Float32
from elit_export.errors import InputError
from elit_export.spec import Budget

MOST_REUSES = 4  # of rules that measure a change
USAGE = (
    "teacache:THRESHOLD, static:every@N, static:mask@1011…, static:time@THRESHOLD or static:FILE, "
    "with ,order=0|1 ,most=N ,warmup=N behind it, or none"
)


# ---------------------------------------------------------------- rules


@dataclass(frozen=True)
class Every:
    """Every `period`-th step computes."""

    period: int

    def __post_init__(self) -> None:
        if self.period < 1:
            raise InputError(f"cache: every@{self.period} must be at least 1")

    def __str__(self) -> str:
        return f"static:every@{self.period}"


@dataclass(frozen=True)
class Mask:
    """The steps that compute, one by one."""

    computes: tuple[bool, ...]

    def __str__(self) -> str:
        return f"static:mask@{''.join('1' if compute else '0' for compute in self.computes)}"


@dataclass(frozen=True)
class TimeDistance:
    """Compute once the embedding of t has changed by `threshold` since the last computed step.

    The change of a step is mean|m − m_prev| / mean|m_prev|, as TeaCache takes it of its signal.
    """

    threshold: float

    def __post_init__(self) -> None:
        _check_threshold(f"static:time@{self.threshold:g}", self.threshold)

    def __str__(self) -> str:
        return f"static:time@{self.threshold}"


@dataclass(frozen=True)
class TeaCache:
    """Compute once the calibrated change of the signal since the last computed step reaches `threshold`."""

    threshold: float

    def __post_init__(self) -> None:
        _check_threshold(f"teacache:{self.threshold:g}", self.threshold)

    def __str__(self) -> str:
        return f"teacache:{self.threshold}"


Rule = Every | Mask | TimeDistance | TeaCache


def _check_threshold(text: str, threshold: float) -> None:
    if not 0 <= threshold < math.inf:
        raise InputError(f"cache {text}: the threshold must be a finite number, 0 or more")


# ---------------------------------------------------------------- policies


@dataclass(frozen=True)
class CachePolicy:
    """When to reuse, and how.

    `order` is that of the forecast, `most` the reuses in a row after which a step computes anyway,
    `warmup` the steps at the start that compute.
    """

    rule: Rule
    order: int = 1
    most: int = MOST_REUSES
    warmup: int = 1

    def __post_init__(self) -> None:
        if self.most < 1 or self.warmup < 1:
            raise InputError(f"cache: most={self.most} and warmup={self.warmup} must be at least 1")
        if self.order not in (0, 1):
            raise InputError(f"cache: order={self.order} must be 0 (as it is) or 1 (linear in t)")

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Read `none`, `teacache:0.1,order=0`, `static:every@3`; raises InputError."""
        rule, *options = text.strip().split(",")
        if rule == "none" and not options:
            return None
        made = _rule(rule, text)
        return cls(made, **{"most": _usual_most(made), **dict(_option(option, text) for option in options)})

    def computes(self, steps: int, time_changes: Callable[[], Sequence[float]]) -> tuple[bool, ...]:
        """Which of the steps compute whatever is measured on the way; the others reuse, or let `teacache` decide.

        `time_changes` gives how much the embedding of t changed at each step but the first. Raises
        InputError if the policy does not fit so many steps.
        """
        if steps < 2:
            raise InputError("a cache needs at least 2 steps: the first and the last always compute")
        wanted = self._wanted(steps, time_changes)
        fixed = [compute or step < self.warmup or step == steps - 1 for step, compute in enumerate(wanted)]
        return tuple(fixed if isinstance(self.rule, TeaCache) else _capped(fixed, self.most))

    def _wanted(self, steps: int, time_changes: Callable[[], Sequence[float]]) -> Sequence[bool]:
        match self.rule:
            case Every(period):
                return [step % period == 0 for step in range(steps)]
            case Mask(computes):
                if len(computes) != steps:
                    raise InputError(f"cache mask has {len(computes)} digits, this sampling has {steps} steps")
                return computes
            case TimeDistance(threshold):
                return self._by_time(threshold, time_changes())
            case TeaCache():
                return [False] * steps

    def _by_time(self, threshold: float, changes: Sequence[float]) -> list[bool]:
        """A step that computes, for whatever reason, starts the sum anew."""
        wanted, total, reused = [True], 0.0, 0
        for step, change in enumerate(changes, start=1):
            total += change
            compute = total >= threshold or step < self.warmup or reused == self.most
            wanted.append(compute)
            total, reused = (0.0, 0) if compute else (total, reused + 1)
        return wanted

    def __str__(self) -> str:
        return f"{self.rule},order={self.order},most={self.most},warmup={self.warmup}"


def _capped(computes: Sequence[bool], most: int) -> list[bool]:
    """The same, and a step that computes after each `most` that reuse."""
    capped, reused = [], 0
    for compute in computes:
        capped.append(compute or reused == most)
        reused = 0 if capped[-1] else reused + 1
    return capped


def _usual_most(rule: Rule) -> int:
    """What counts steps or names them says itself how many may be reused in a row."""
    match rule:
        case Every(period):
            return max(1, period - 1)
        case Mask(computes):
            return len(computes)
    return MOST_REUSES


def _rule(text: str, whole: str) -> Rule:
    family, _, told = text.partition(":")
    word, at, value = told.partition("@")
    if family == "teacache":
        return TeaCache(_number(told, whole))
    if family == "static" and at and word == "every" and re.fullmatch(r"\d{1,6}", value):
        return Every(int(value))
    if family == "static" and at and word == "time":
        return TimeDistance(_number(value, whole))
    if family == "static" and at and word == "mask":
        return _mask(value, f"cache {whole!r}")
    if family == "static" and told and word not in ("every", "time", "mask"):
        return _mask_of_file(Path(told))
    raise InputError(f"cache {whole!r} is none of: {USAGE}")


def _number(text: str, whole: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise InputError(f"cache {whole!r}: the threshold {text!r} is not a number") from error


def _mask(digits: str, where: str) -> Mask:
    if not re.fullmatch("[01]+", digits):
        raise InputError(f"{where}: a mask is one digit a step, 1 computes and 0 reuses")
    return Mask(tuple(digit == "1" for digit in digits))


def _mask_of_file(path: Path) -> Mask:
    """Digits with any white space between them."""
    try:
        text = path.read_text(encoding="ascii")
    except (OSError, ValueError) as error:  # no such file, no text, no name of a file
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise InputError(f"cache static:{path}: no mask there ({reason}); use {USAGE}") from error
    return _mask("".join(text.split()), f"cache static:{path}")


def _option(text: str, whole: str) -> tuple[str, int]:
    match = re.fullmatch(r"(order|most|warmup)=(\d{1,6})", text)
    if not match:
        raise InputError(f"cache {whole!r}: unknown option {text!r}; use {USAGE}")
    return match[1], int(match[2])


# ---------------------------------------------------------------- what one sampling does


@dataclass(frozen=True)
class Fit:
    """How much the residual changes where the signal changes by a distance: a polynomial, lowest power first.

    It holds for distances in [low, high]. All in float32, as the graph `fused` computes it.
    """

    coefficients: tuple[float, ...]
    low: float
    high: float

    def increments(self, distance: Float32) -> Float32:
        """Never negative: what was added up is not taken back."""
        value = np.zeros_like(distance)
        with np.errstate(invalid="ignore", over="ignore"):  # of distances that it does not cover
            for coefficient in reversed(np.asarray(self.coefficients, np.float32)):
                value = value * distance + coefficient
        return np.maximum(value, np.float32(0))

    def covers(self, distance: Float32) -> Bools:
        return (distance >= np.float32(self.low)) & (distance <= np.float32(self.high))


@dataclass(frozen=True)
class StepCache:
    """A policy made ready for one sampling.

    `computes` says which steps compute whatever happens. Of the others, all reuse where `fits` is None, as far
    as there is something to reuse and `most` allows; else the fit of the budget and the threshold decide too.
    `signal_shape` is (N, D).
    """

    policy: CachePolicy
    computes: tuple[bool, ...]
    signal_shape: tuple[int, int]
    fits: Mapping[Budget, Fit] | None = None

    @property
    def threshold(self) -> np.float32:
        assert isinstance(self.policy.rule, TeaCache)
        return np.float32(min(self.policy.rule.threshold, float(np.finfo(np.float32).max)))

"""Step caching: which evaluations reuse what the blocks gave earlier, and what is remembered for that.

    static:every@3            every third evaluation computes, decided before sampling
    static:mask@1011…         one digit a step, 1 computes
    … ,order=1                how the residual is forecast: 0 as it is, 1 linearly in t
    … ,most=2                 consecutive reuses at most

Takes: text.  Gives: CachePolicy values, and the memory of one request.  May touch: nothing.
Knows nothing of: engines, files.

What is reused is the residual: the tokens before the final layer minus those after the embedder. It has
the same shape at every budget. The first and the last evaluation always compute.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable
from dataclasses import dataclass, field

from elit_export.errors import InputError
from elit_export.runtime.engine import Array
from elit_export.spec import Budget

MOST_REUSES = 4
USAGE = "static:every@N or static:mask@1011…, with ,order=0|1 and ,most=N behind it, or none"


@dataclass(frozen=True)
class CachePolicy:
    """When to reuse. `mask` holds a value for each step, or is empty for every `every`-th step.

    `order` is that of the forecast, `most` the reuses in a row after which a step computes anyway.
    """

    every: int = 1
    mask: tuple[bool, ...] = ()
    order: int = 1
    most: int = MOST_REUSES

    def __post_init__(self) -> None:
        if self.every < 1 or self.most < 1:
            raise InputError(f"cache: every@{self.every} and most={self.most} must be at least 1")
        if self.order not in (0, 1):
            raise InputError(f"cache: order={self.order} must be 0 (as it is) or 1 (linear in t)")

    @classmethod
    def parse(cls, text: str) -> CachePolicy | None:
        """Read `none`, `static:every@3`, `static:mask@10010,order=0`; raises InputError."""
        rule, *options = text.strip().split(",")
        if rule == "none" and not options:
            return None
        numbers = dict(_option(option, text) for option in options)
        order, most = numbers.get("order", cls.order), numbers.get("most", cls.most)
        if match := re.fullmatch(r"static:every@(\d{1,6})", rule):
            return cls(every=int(match[1]), order=order, most=most)
        if match := re.fullmatch(r"static:mask@([01]+)", rule):
            return cls(mask=tuple(digit == "1" for digit in match[1]), order=order, most=most)
        raise InputError(f"cache {text!r} is none of: {USAGE}")

    def steps(self, count: int) -> tuple[bool, ...]:
        """Which of `count` steps compute; raises InputError if the mask has another length."""
        if self.mask and len(self.mask) != count:
            raise InputError(f"cache mask has {len(self.mask)} digits, this sampling has {count} steps")
        if count < 2:
            raise InputError("a cache needs at least 2 steps: the first and the last always compute")
        wanted = self.mask or tuple(step % self.every == 0 for step in range(count))
        return tuple(compute or step in (0, count - 1) for step, compute in enumerate(wanted))

    def __str__(self) -> str:
        rule = (
            f"mask@{''.join('1' if compute else '0' for compute in self.mask)}" if self.mask else f"every@{self.every}"
        )
        return f"static:{rule},order={self.order},most={self.most}"


def _option(text: str, whole: str) -> tuple[str, int]:
    match = re.fullmatch(r"(order|most)=(\d{1,6})", text)
    if not match:
        raise InputError(f"cache {whole!r}: unknown option {text!r}; use {USAGE}")
    return match[1], int(match[2])


# ---------------------------------------------------------------- what is remembered


@dataclass(frozen=True)
class Computed:
    """The residual of an evaluation that ran the blocks, at time `t`."""

    t: float
    budget: Budget
    residual: Array


@dataclass
class Memory:
    """What is kept for one branch of guidance in one evaluation of a step: its last computed residuals."""

    computed: list[Computed] = field(default_factory=list)  # the latest first, at most two
    step: int = -1  # of the last evaluation
    reused: int = 0  # in a row

    def note(self, step: int, computed: Computed) -> None:
        """A step that computed. A residual of another budget says nothing about the slope."""
        older = [last for last in self.computed[:1] if last.budget == computed.budget]
        self.computed, self.step, self.reused = [computed, *older], step, 0

    def forecast(self, t: float, order: int) -> tuple[Array, Array, float]:
        """(latest residual, the one before, weight w): the residual at t is latest + w · (latest − before)."""
        latest = self.computed[0]
        if order == 0 or len(self.computed) < 2:
            return latest.residual, latest.residual, 0.0
        before = self.computed[1]
        return latest.residual, before.residual, (t - latest.t) / (latest.t - before.t)


class RequestCache:
    """The cache of one sampling: made with it and gone with it, so that nothing reaches another."""

    def __init__(self, policy: CachePolicy, steps: int) -> None:
        self._policy = policy
        self._compute = policy.steps(steps)
        self._memories: dict[Hashable, Memory] = {}

    def memory(self, key: Hashable, step: int) -> Memory:
        """The memory of a branch; one that was idle in the step before starts anew."""
        known = self._memories.get(key)
        if known is None or step - known.step > 1:
            known = self._memories[key] = Memory()
        return known

    def reuses(self, memory: Memory, step: int) -> bool:
        """Does this branch reuse at this step?"""
        return bool(memory.computed) and not self._compute[step] and memory.reused < self._policy.most

    def forecast(self, memory: Memory, step: int, t: float) -> tuple[Array, Array, float]:
        """As Memory.forecast, which notes that it was reused."""
        memory.step, memory.reused = step, memory.reused + 1
        residual, before, weight = memory.forecast(t, self._policy.order)
        assert math.isfinite(weight)
        return residual, before, weight

"""A cache policy: when to reuse and how, parsed from text."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from elit_export.errors import InputError
from elit_export.runtime.step_cache import USAGE, rule_from_text
from elit_export.runtime.step_cache.base import DEFAULT_MAX_SKIP, Rule, TimeChanges

RENAMED = {"most": "max_skip"}  # options by their earlier names


@dataclass(frozen=True)
class CachePolicy:
    """A policy: when to reuse, and how.

    `order` is that of the forecast, `max_skip` the consecutive reuses after which a step computes anyway,
    `warmup` the number of steps at the start that compute.
    """

    rule: Rule
    order: int = 1
    max_skip: int = DEFAULT_MAX_SKIP
    warmup: int = 1

    def __post_init__(self) -> None:
        if self.max_skip < 1 or self.warmup < 1:
            raise InputError(f"cache: max_skip={self.max_skip} and warmup={self.warmup} must be at least 1")
        if self.order not in (0, 1):
            raise InputError(f"cache: order={self.order} must be 0 (as it is) or 1 (linear in t)")

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Read `none`, `teacache:0.1,order=0`, `static:every@3`; raises InputError."""
        first, *options = text.strip().split(",")
        if first == "none" and not options:
            return None
        rule = rule_from_text(first, text)
        return cls(rule, **{"max_skip": rule.max_skip, **_options(options, text)})

    def check_steps(self, steps: int) -> None:
        """Raise InputError if the policy does not fit so many steps."""
        self.rule.check_steps(steps)

    def computes(self, steps: int, time_changes: TimeChanges) -> tuple[bool, ...]:
        """Return which steps compute, whatever is measured; the others reuse, or the rule decides at the step.

        Raises InputError if the policy does not fit so many steps.
        """
        self.check_steps(steps)
        is_due = self.rule.due(steps, time_changes)
        computes, last = list[bool](), 0
        for step in range(steps):
            is_forced = step < self.warmup or step == steps - 1 or self._is_capped(step - last - 1)
            computes.append(is_forced or is_due(step, last))
            last = step if computes[-1] else last
        return tuple(computes)

    def _is_capped(self, reused: int) -> bool:
        """Return whether `max_skip` is reached; if the rule measures, reuses in a row are counted while sampling."""
        return reused >= self.max_skip and not self.rule.measures

    def __str__(self) -> str:
        return f"{self.rule},order={self.order},max_skip={self.max_skip},warmup={self.warmup}"


def _options(texts: Iterable[str], policy: str) -> dict[str, int]:
    """Parse options by name, and warn of names that have changed; raises InputError."""
    options = {}
    for text in texts:
        match = re.fullmatch(r"(order|max_skip|most|warmup)=(\d{1,6})", text)
        if not match:
            raise InputError(f"cache {policy!r}: unknown option {text!r}", f"use {USAGE}")
        name = RENAMED.get(match[1], match[1])
        if name != match[1]:
            message = f"cache {policy!r}: the option {match[1]} is now called {name}: write {name}={match[2]}"
            warnings.warn(message, FutureWarning, stacklevel=3)
        options[name] = int(match[2])
    return options

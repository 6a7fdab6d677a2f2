"""`static:every@N`: every N-th step computes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from elit_export.errors import InputError
from elit_export.runtime.step_cache.base import IsDue, Rule, RuleText, TimeChanges
from elit_export.spec.limits import STEPS


@dataclass(frozen=True)
class Every(Rule):
    """A rule by which every `period`-th step computes."""

    period: int

    def __post_init__(self) -> None:
        if self.period < 1:
            raise InputError(f"cache: every@{self.period} must be at least 1")

    @classmethod
    def parse(cls, text: RuleText) -> Self | None:
        is_number = re.fullmatch(r"\d+", text.value, re.ASCII)
        return cls(STEPS.whole(text.value, f"cache {text.policy!r}: N")) if is_number else None

    @property
    def max_skip(self) -> int:
        return max(1, self.period - 1)

    def due(self, _steps: int, _time_changes: TimeChanges) -> IsDue:
        return lambda step, _last: step % self.period == 0

    def __str__(self) -> str:
        return f"static:every@{self.period}"

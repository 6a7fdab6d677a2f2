"""`static:time@THRESHOLD`: decides by the change of the embedding of t, before sampling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from elit_export.runtime.step_cache.base import IsDue, Rule, RuleText, TimeChanges, check_threshold, threshold_of
from elit_export.spec import REUSE, TIME


@dataclass(frozen=True)
class TimeDistance(Rule):
    """A rule: compute once the embedding of t has changed by `threshold` since the last computed step.

    The change of a step is mean|m − m_prev| / mean|m_prev|, as TeaCache measures it on its signal.
    """

    needs: ClassVar[frozenset[str]] = frozenset({REUSE, TIME})

    threshold: float

    def __post_init__(self) -> None:
        check_threshold(f"static:time@{self.threshold:g}", self.threshold)

    @classmethod
    def parse(cls, text: RuleText) -> Self:
        return cls(threshold_of(text))

    def due(self, _steps: int, time_changes: TimeChanges) -> IsDue:
        changes = time_changes()
        return lambda step, last: sum(changes[last:step]) >= self.threshold

    def __str__(self) -> str:
        return f"static:time@{self.threshold}"

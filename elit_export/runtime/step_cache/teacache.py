"""`teacache:THRESHOLD`: decides by the change of the blocks' input, measured at each step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from elit_export.arrays import Float32
from elit_export.runtime.step_cache.base import IsDue, Rule, RuleText, TimeChanges, check_threshold, threshold_of
from elit_export.spec import PROBE, REUSE


@dataclass(frozen=True)
class TeaCache(Rule):
    """A rule: compute once the calibrated change since the last computed step reaches `threshold` in any row."""

    needs: ClassVar[frozenset[str]] = frozenset({REUSE, PROBE})
    calibrated: ClassVar[bool] = True

    threshold: float

    def __post_init__(self) -> None:
        check_threshold(f"teacache:{self.threshold:g}", self.threshold)

    @classmethod
    def parse(cls, text: RuleText) -> Self:
        return cls(threshold_of(text))

    def due(self, _steps: int, _time_changes: TimeChanges) -> IsDue:
        return lambda _step, _last: False

    def is_reached(self, accumulated: Float32) -> bool:
        """Decide in float32, as the graph `fused` does."""
        threshold = np.float32(min(self.threshold, float(np.finfo(np.float32).max)))
        return bool((accumulated >= threshold).any())

    def __str__(self) -> str:
        return f"teacache:{self.threshold}"

"""One output of an engine held against PyTorch's, and what a miss says."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from elit_export.errors import ParityError
from elit_export.verify.metrics import Difference

NOTHING = Difference(math.inf, math.inf, -math.inf, math.nan)  # no answer at all


@dataclass(frozen=True)
class Comparison:
    """One output at one point. `part` is `profile NAME` or `trajectory NAME`, `point` where in it.

    `profiles` are those that a trajectory uses; `problem` is why an engine gave nothing to compare. `accepted` is the
    recipe's reason for which it may miss, as far down as `accepted_from_db`. `most_relative` is how far a single value
    may be off, as a share of the largest one, where that is demanded too. `case` is the index of a reference case.
    """

    part: str
    point: str
    found: Difference
    least_db: float
    profiles: tuple[str, ...] = ()
    problem: str = ""
    accepted: str = ""
    accepted_from_db: float = 0.0
    most_relative: float = math.inf
    case: int | None = None

    @property
    def met(self) -> bool:
        """Is it within its tolerance?"""
        return not list(self._misses())

    def _misses(self) -> Iterator[tuple[str, str]]:
        """What was needed, and what would have passed."""
        if not self.found.sqnr_db >= self.least_db:
            yield f"{self.least_db:g} dB", f"{np.floor(self.found.sqnr_db):g} dB"
        if not self.found.max_relative <= self.most_relative:
            enough = 1.05 * self.found.max_relative  # not less than that when it is told with two digits
            yield f"{self.most_relative:.0e} of the largest value", f"{enough:.1e} of it"

    @property
    def is_graph(self) -> bool:
        """Is it of a graph beside `step`, of which no miss is ever accepted?"""
        return self.part.startswith("graph ")

    @property
    def passed(self) -> bool:
        """A miss may be accepted, no answer or numbers that are not finite never."""
        return self.met or (bool(self.accepted) and self.found.sqnr_db >= self.accepted_from_db)

    @property
    def margin_db(self) -> float:
        return self.found.sqnr_db - self.least_db

    @property
    def verdict(self) -> str:
        """What was found, and for a miss the tolerance that would have passed, if any would."""
        told = f"{self._where}: SQNR {self.found.sqnr_db:.1f} dB"
        if self.met:
            return f"{told}, {self.margin_db:.1f} dB better than needed"
        if self.problem:
            return f"{self._where}: nothing to compare: {self.problem}"
        if not math.isfinite(self.found.sqnr_db):
            return f"{told}: no tolerance would have passed ({self._hopeless})"
        needed, enough = (" and ".join(words) for words in zip(*self._misses(), strict=True))
        return (
            f"{told} (max error {self.found.max_relative:.1e} of the largest value) misses {needed}; "
            f"a tolerance of {enough} would have passed"
        )

    @property
    def _where(self) -> str:
        used = f" (profiles {', '.join(self.profiles)})" if self.profiles else ""
        return f"{self.part}{used}, {self.point}"

    @property
    def _hopeless(self) -> str:
        if math.isinf(self.found.max_abs):
            return "values that are not finite, or another shape"
        return f"max error {self.found.max_abs:.1e} where PyTorch has zeros only"


def require(comparison: Comparison, remedy: str = "") -> Comparison:
    """Give it back if it passed, else raise ParityError."""
    if not comparison.passed:
        may_be_accepted = not comparison.problem and not comparison.is_graph
        keeping = 'accept_below_tolerance = "why" keeps it' if may_be_accepted else ""
        raise ParityError("; ".join(part for part in (comparison.verdict, remedy, keeping) if part))
    return comparison

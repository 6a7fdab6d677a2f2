"""The comparison of one engine output with PyTorch's, and the message for a miss."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from elit_export.errors import ParityError
from elit_export.verify.metrics import Difference

NO_OUTPUT = Difference(math.inf, math.inf, -math.inf, math.nan)  # the engine gave no output


@dataclass(frozen=True)
class Comparison:
    """The comparison of one output at one point.

    `part` is `profile NAME`, `trajectory NAME` or `graph NAME`, `point` the position in it. `found` is the measured
    difference, `least_db` the minimum SQNR. `profiles` are those that a trajectory uses. `problem` is the reason why an
    engine gave no output. `accepted` is the recipe's reason for an accepted miss, which must reach `accepted_from_db`.
    `most_relative` is the maximum error of a single value as a share of the largest value. `case` is the index of a
    reference case.
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
        """Whether the output is within its tolerance."""
        return not list(self._misses())

    def _misses(self) -> Iterator[tuple[str, str]]:
        """Yield for each miss the tolerance, and the tolerance that would have passed."""
        if not self.found.sqnr_db >= self.least_db:
            yield f"{self.least_db:g} dB", f"{np.floor(self.found.sqnr_db):g} dB"
        if not self.found.max_relative <= self.most_relative:
            sufficient = 1.05 * self.found.max_relative  # still sufficient when rounded to two digits
            yield f"{self.most_relative:.0e} of the largest value", f"{sufficient:.1e} of it"

    @property
    def is_graph(self) -> bool:
        """Whether the output is of a graph beside `step`, for which no miss is ever accepted."""
        return self.part.startswith("graph ")

    @property
    def passed(self) -> bool:
        """Whether the output is within tolerance or an accepted miss; missing or non-finite outputs never pass."""
        return self.met or (bool(self.accepted) and self.found.sqnr_db >= self.accepted_from_db)

    @property
    def margin_db(self) -> float:
        return self.found.sqnr_db - self.least_db

    @property
    def verdict(self) -> str:
        """The result in words, and for a miss the tolerance that would have passed, if any would."""
        result = f"{self._where}: SQNR {self.found.sqnr_db:.1f} dB"
        if self.met:
            return f"{result}, {self.margin_db:.1f} dB better than needed"
        if self.problem:
            return f"{self._where}: nothing to compare: {self.problem}"
        if not math.isfinite(self.found.sqnr_db):
            return f"{result}: no tolerance would have passed ({self._infinite_cause})"
        needed, sufficient = (" and ".join(words) for words in zip(*self._misses(), strict=True))
        return (
            f"{result} (max error {self.found.max_relative:.1e} of the largest value) misses {needed}; "
            f"a tolerance of {sufficient} would have passed"
        )

    @property
    def _where(self) -> str:
        profiles = f" (profiles {', '.join(self.profiles)})" if self.profiles else ""
        return f"{self.part}{profiles}, {self.point}"

    @property
    def _infinite_cause(self) -> str:
        if math.isinf(self.found.max_abs):
            return "values that are not finite, or another shape"
        return f"max error {self.found.max_abs:.1e} where PyTorch has zeros only"


def verdict_of(comparisons: Sequence[Comparison]) -> str:
    """Say how many passed, how many of these are misses that the recipe accepts, and the worst margin."""
    passed = [comparison for comparison in comparisons if comparison.passed]
    below = sum(not comparison.met for comparison in passed)
    accepted = f", {below} of these below tolerance and accepted" if below else ""
    worst_db = min(comparison.margin_db for comparison in comparisons)
    return f"{len(passed)} of {len(comparisons)} pass{accepted}, worst margin {worst_db:+.1f} dB"


def require(comparison: Comparison, remedy: str = "") -> Comparison:
    """Return the comparison if it passed, else raise ParityError."""
    if not comparison.passed:
        may_be_accepted = not comparison.problem and not comparison.is_graph
        acceptance = 'accept_below_tolerance = "why" keeps it' if may_be_accepted else ""
        raise ParityError(comparison.verdict, "; ".join(part for part in (remedy, acceptance) if part))
    return comparison

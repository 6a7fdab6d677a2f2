"""The base of all rules of a step cache: a value that says which steps compute.

The first step, the last and those of the warm-up always compute. To add a rule, write a file and a row in the table.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from elit_export.arrays import Float32
from elit_export.errors import InputError
from elit_export.spec import PROBE, REUSE

IsDue = Callable[[int, int], bool]  # (step, the last that computed) → does it compute?
TimeChanges = Callable[[], Sequence[float]]  # how much the embedding of t changes at each step but the first
DEFAULT_MAX_SKIP = 4


class Rule(ABC):
    """A rule: a frozen value that prints as the text it is read from.

    `needs` names the graphs that it calls. With `probe` among them it measures: the distance of each row from the step
    before is added up since the last computed step. If it is `calibrated`, the calibrated value of the distance is
    added instead.
    """

    needs: ClassVar[frozenset[str]] = frozenset({REUSE})
    calibrated: ClassVar[bool] = False

    @property
    def measures(self) -> bool:
        return PROBE in self.needs

    @property
    def max_skip(self) -> int:
        """The default of consecutive reuses after which a step computes anyway."""
        return DEFAULT_MAX_SKIP

    def check_steps(self, steps: int) -> None:
        """Raise InputError if the rule does not fit so many steps."""
        if steps < 2:
            raise InputError("a cache needs at least 2 steps: the first and the last always compute")

    @abstractmethod
    def due(self, steps: int, time_changes: TimeChanges) -> IsDue:
        """Return a function that says which steps compute, whatever is measured."""

    def is_reached(self, _accumulated: Float32) -> bool:  # (B,)
        """Return whether the measured changes add up to enough for a step to compute."""
        return False

    @abstractmethod
    def __str__(self) -> str: ...


# ---------------------------------------------------------------- rules as text


@dataclass(frozen=True)
class RuleText:
    """The input of a parser: the `value` after a prefix.

    `policy`, the whole text, and `usage`, the accepted forms, are for messages.
    """

    value: str
    policy: str
    usage: str

    def refusal(self, problem: str) -> InputError:
        return InputError(f"cache {self.policy!r}: {problem}")


@dataclass(frozen=True)
class Form:
    """A row of the table: the text of a rule is `prefix` and a value, in the usage shown as `placeholder`.

    `parse` returns None for a value of another form. `bench_values` are those that a bench compares.
    """

    prefix: str  # ends in : or @
    placeholder: str
    parse: Callable[[RuleText], Rule | None]
    bench_values: tuple[str, ...] = ()

    def matches(self, text: str) -> bool:
        return text.startswith(self.prefix) or text == self.prefix[:-1]


def threshold_of(text: RuleText) -> float:
    try:
        return float(text.value)
    except ValueError as error:
        raise text.refusal(f"the threshold {text.value!r} is not a number") from error


def check_threshold(text: str, threshold: float) -> None:
    if not 0 <= threshold < math.inf:
        raise InputError(f"cache {text}: the threshold must be a finite number, 0 or more")

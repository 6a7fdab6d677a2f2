"""`static:mask@1011…` and `static:FILE`: the steps that compute, one by one."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from elit_export.bundle.readers import read_text
from elit_export.errors import InputError
from elit_export.runtime.step_cache.base import IsDue, Rule, RuleText, TimeChanges


@dataclass(frozen=True)
class Mask(Rule):
    """A rule that lists the steps that compute, one by one."""

    computes: tuple[bool, ...]

    @classmethod
    def parse(cls, text: RuleText) -> Self:
        if not re.fullmatch("[01]+", text.value):
            raise text.refusal("a mask is one digit a step, 1 computes and 0 reuses")
        return cls(tuple(digit == "1" for digit in text.value))

    @property
    def max_skip(self) -> int:
        return len(self.computes)

    def check_steps(self, steps: int) -> None:
        super().check_steps(steps)
        if len(self.computes) != steps:
            raise InputError(f"cache mask has {len(self.computes)} digits, this sampling has {steps} steps")

    def due(self, _steps: int, _time_changes: TimeChanges) -> IsDue:
        return lambda step, _last: self.computes[step]

    def __str__(self) -> str:
        return f"static:mask@{''.join('1' if compute else '0' for compute in self.computes)}"


def mask_from_file(text: RuleText) -> Mask | None:
    """Read digits with any white space between them; returns None without the name of a file."""
    if not text.value:
        return None
    try:
        digits = read_text(Path(text.value), what="a mask", error=InputError)
    except InputError as error:
        raise InputError(f"cache {text.policy!r}: {error.problem}", error.remedy) from error
    except (OSError, ValueError) as error:  # no such file, no name of a file
        reason = error.strerror if isinstance(error, OSError) else "not the name of a file"
        raise text.refusal(f"no mask there ({reason}); use {text.usage}") from error
    return Mask.parse(replace(text, value="".join(digits.split())))

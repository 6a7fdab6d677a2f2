"""Budgets, their names, and the ranges of them that engines serve."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from elit_export.errors import InputError
from elit_export.spec import limits

BUDGET_NAMES = {"full": 1, "half": 2, "quarter": 4, "eighth": 8, "sixteenth": 16}
FRACTION_TOLERANCE = 1e-3  # of a latent; a trained fraction like 0.0781 for 5/64 misses by 1.6e-3


@dataclass(frozen=True, order=True)
class Budget:
    """`kept` of `of` latents per group run through the core, written `4of16`."""

    kept: int
    of: int

    def __post_init__(self) -> None:
        if not 1 <= self.kept <= self.of:
            raise InputError(
                f"budget {self.kept}of{self.of}: a model with {self.of} latents per group keeps 1 to {self.of} of them"
            )

    @classmethod
    def parse(cls, text: str | int | Budget, of: int) -> Budget:
        """Parse `4`, `4of16`, `quarter` or a fraction with a point (`0.25`) for a model with `of` latents.

        Raises InputError for anything that is not a whole number of latents.
        """
        if isinstance(text, Budget):
            return text._of(of)
        word = str(text).strip()
        if word in BUDGET_NAMES:
            return cls._named(word, of)
        if match := re.fullmatch(r"(\d{1,9})(?:of(\d{1,9}))?", word):
            return cls(int(match[1]), int(match[2] or of))._of(of)
        if re.fullmatch(r"\d{0,9}\.\d+|\d{1,9}\.", word):
            return cls._from_fraction(float(word), of)
        raise InputError(
            f"budget {word!r} is not a number of latents (4), a share (4of16, 0.25) "
            f"or a name ({', '.join(BUDGET_NAMES)})"
        )

    @classmethod
    def _named(cls, name: str, of: int) -> Budget:
        if of % BUDGET_NAMES[name]:
            raise InputError(
                f"budget {name!r}: {of} latents per group have no whole {name}", f"give a number of latents, 1 to {of}"
            )
        return cls(of // BUDGET_NAMES[name], of)

    @classmethod
    def _from_fraction(cls, fraction: float, of: int) -> Budget:
        kept = round(of * fraction)
        if abs(of * fraction - kept) <= FRACTION_TOLERANCE and 1 <= kept <= of:
            return cls(kept, of)
        below = int(of * fraction)
        neighbours = {min(max(kept, 1), of) for kept in (below, below + 1)}
        near = " or ".join(f"{kept}of{of} ({kept / of:g})" for kept in sorted(neighbours))
        raise InputError(f"budget {fraction:g} of {of} latents is not a whole number of latents", f"use {near}")

    def _of(self, of: int) -> Budget:
        if self.of != of:
            raise InputError(f"budget {self} does not fit a model with {of} latents per group")
        return self

    @property
    def share(self) -> float:
        """The share of latents that are kept, for display only."""
        return self.kept / self.of

    def __str__(self) -> str:
        return f"{self.kept}of{self.of}"


@dataclass(frozen=True)
class Range:
    """A dimension an engine accepts: min ≤ opt ≤ max, all at least 1."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}  # for recipes and manifests, which hold ranges as they are

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise InputError(f"range {self}: needs 1 <= min <= opt <= max")

    def __contains__(self, value: int) -> bool:
        return self.min <= value <= self.max

    def __str__(self) -> str:
        return f"{self.min}..{self.opt}..{self.max}"

    def corners(self) -> tuple[int, int, int]:
        """Return (min, opt, max), the points where an engine is checked."""
        return self.min, self.opt, self.max


@dataclass(frozen=True)
class Profile:
    """A named range of kept latents K, engine rows and (in models with text) tokens that one engine serves."""

    name: str
    latents: Range
    rows: Range
    text: Range | None = None

    def __post_init__(self) -> None:
        limits.ROWS.check(self.rows.max, f"profile {self.name}: rows.max", limits.OF_FILES)
        limits.BUDGETS.check(self.latents.max, f"profile {self.name}: latents.max", limits.OF_FILES)
        if self.text:
            limits.TEXT.check(self.text.max, f"profile {self.name}: text.max", limits.OF_FILES)

    def tokens(self, text: int) -> int:
        """Return the number of tokens that an engine runs on for a text of so many: shorter text is padded."""
        return max(text, self.text.min) if self.text else text


def covering(ranges: Sequence[Range]) -> Range:
    """Return the smallest range that holds several; its opt is their largest."""
    return Range(min(r.min for r in ranges), max(r.opt for r in ranges), max(r.max for r in ranges))


def covered_text(profiles: Sequence[Profile]) -> Range | None:
    """Return the range of text tokens that the profiles accept together; None in models without text."""
    texts = [profile.text for profile in profiles if profile.text]
    return covering(texts) if texts else None


def default_profiles(of: int, rows: Range, *, step: int = 1, text: Range | None = None) -> tuple[Profile, ...]:
    """Return profiles over (¾J, J], (¼J, ¾J], (⅛J, ¼J] and [1, ⅛J], tuned for J, J/2, J/4 and J/16.

    In a model that keeps only multiples of `step`, all bounds are multiples of it; ranges without one are left out.
    """
    bounds = {"full": (3 * of // 4, of), "half": (of // 4, 3 * of // 4), "quarter": (of // 8, of // 4)}
    bounds["sixteenth"] = (0, of // 8)
    ranges = {name: _multiples(low, high, of // BUDGET_NAMES[name], step) for name, (low, high) in bounds.items()}
    return tuple(Profile(name, latents, rows, text) for name, latents in ranges.items() if latents)


def _multiples(low: int, high: int, tuned: int, step: int) -> Range | None:
    """Return the multiples of `step` in (low, high], tuned for the one nearest to `tuned`; None if there is none."""
    smallest, largest = (low // step + 1) * step, high // step * step
    return Range(smallest, min(max(tuned // step * step, smallest), largest), largest) if smallest <= largest else None


def listed(budgets: Iterable[Budget]) -> str:
    """Format budgets: `1of16 to 16of16` if there are no gaps, else one by one."""
    ordered = sorted(budgets)
    if not ordered:
        return "none"
    first, last = ordered[0], ordered[-1]
    if len(ordered) > 2 and len(ordered) == last.kept - first.kept + 1:
        return f"{first} to {last}"
    return ", ".join(str(budget) for budget in ordered)

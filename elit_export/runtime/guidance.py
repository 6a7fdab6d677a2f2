"""Guidance: which branches an evaluation has, which of them share an engine call, and how they are combined.

    v = v_weak + scale · (v_strong − v_weak), where scale > 1 and low ≤ t ≤ high

With `norm`, v of each token is then scaled to the length that v_strong has there, as is usual for large text-to-image
models.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from elit_export.arrays import Float64, HostArray
from elit_export.errors import InputError
from elit_export.spec import Budget, ModelSpec


class Kind(StrEnum):
    """The kind of weak branch: none, no class, no class at a lower budget, same class at a lower budget."""

    NONE = "none"
    CFG = "cfg"
    CCFG = "ccfg"
    AUTOGUIDANCE = "autoguidance"


USAGE = {
    Kind.NONE: "none",
    Kind.CFG: "cfg:SCALE[,norm]",
    Kind.CCFG: "ccfg:SCALE@WEAK_BUDGET[,norm]",
    Kind.AUTOGUIDANCE: "autoguidance:SCALE@WEAK_BUDGET[,norm]",
}


STRONG, WEAK = "strong", "weak"  # roles


@dataclass(frozen=True)
class Branch:
    """One velocity of an evaluation, identified by its `role`."""

    role: str
    budget: Budget
    null_class: bool


@dataclass(frozen=True)
class Guidance:
    """A rule for the weak branch. `weak` is the budget of ccfg and autoguidance, None for the others.

    `norm`: the combined velocity keeps, token by token, the length of the strong branch's velocity.
    """

    kind: Kind = Kind.NONE
    scale: float = 1.0
    weak: Budget | None = None
    low: float = 0.0
    high: float = 1.0
    norm: bool = False

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale) or self.scale < 1:
            raise InputError(f"guidance scale {self.scale} must be a finite number, 1 (no guidance) or more")
        if not 0 <= self.low <= self.high <= 1:
            raise InputError(
                f"guidance interval {self.low} {self.high}: needs 0 <= low <= high <= 1",
                "give the lower t first; sampling starts at t = 1, noise, so 0.5 1.0 guides the first half",
            )
        needs_weak = self.kind in (Kind.CCFG, Kind.AUTOGUIDANCE)
        if needs_weak != (self.weak is not None):
            raise InputError(f"guidance {self.kind.value}: {USAGE[self.kind]}")

    @classmethod
    def parse(cls, text: str, spec: ModelSpec, *, interval: tuple[float, float] = (0.0, 1.0)) -> Guidance:
        """Read `none`, `cfg:3`, `ccfg:4@sixteenth`, `autoguidance:2@2` or `cfg:4,norm`; raises InputError."""
        text = text.strip()
        if text == "none":
            return cls(low=interval[0], high=interval[1])
        match = re.fullmatch(r"(\w+):([^@,]+)(?:@([^,]+))?(,norm)?", text)
        if not match or match[1] not in USAGE or match[1] == Kind.NONE:
            raise InputError(f"guidance {text!r} is none of: {', '.join(USAGE.values())}")
        try:
            scale = float(match[2])
        except ValueError as error:
            raise InputError(f"guidance scale {match[2]!r} is not a number") from error
        weak = spec.budget(match[3]) if match[3] else None
        return cls(Kind(match[1]), scale, weak, *interval, norm=bool(match[4]))

    @property
    def guides(self) -> bool:
        return self.kind is not Kind.NONE

    @property
    def one_budget(self) -> bool:
        """Whether every branch runs at the budget of the step."""
        return self.weak is None

    def with_weak(self, budget: Budget) -> Guidance:
        """Return the same guidance with a weak branch without class at another budget."""
        return replace(self, kind=Kind.CCFG, weak=budget)

    def active(self, t: float) -> bool:
        return self.guides and self.scale > 1 and self.low <= t <= self.high

    def branches(self, budget: Budget, t: float) -> tuple[Branch, ...]:
        """Return the strong branch, and the weak one if guidance is active at t."""
        strong = Branch(STRONG, budget, null_class=False)
        weak = Branch(WEAK, self.weak or budget, null_class=self.kind is not Kind.AUTOGUIDANCE)
        return (strong, weak) if self.active(t) else (strong,)

    def shares_batch(self, one: Branch, other: Branch) -> bool:
        """Return whether one engine call serves both branches: all rows of a call keep the same K."""
        return one.budget == other.budget

    def batches(self, budget: Budget, t: float) -> list[tuple[Branch, ...]]:
        """Return the branches of each engine call; calls and branches are in the order of `branches`."""
        batches: list[tuple[Branch, ...]] = []
        waiting = self.branches(budget, t)
        while waiting:
            batches.append(tuple(branch for branch in waiting if self.shares_batch(waiting[0], branch)))
            waiting = tuple(branch for branch in waiting if branch not in batches[-1])
        return batches

    def rows_per_image(self, budget: Budget) -> int:
        """Return the maximum of rows that an image takes in one engine call of a step at `budget`."""
        return max(len(batch) for batch in self.batches(budget, self.low))

    def combine(self, velocities: Sequence[HostArray], *, patch: int) -> Float64:  # of (B, C, H, W) float32
        """Combine the velocities of `branches`, in their order, into the guided velocity.

        A token is a square of `patch` × `patch` pixels in all channels.
        """
        if len(velocities) == 1:
            return velocities[0].astype(np.float64)
        strong, weak = velocities
        velocity: Float64 = np.subtract(strong, weak, dtype=np.float64)  # weak + scale · (strong − weak), in place
        velocity *= self.scale
        velocity += weak
        if self.norm:
            before, after = (_lengths(v, patch) for v in (strong, velocity))
            velocity *= np.divide(before, after, out=np.zeros_like(after), where=after > 0)
        return velocity

    def __str__(self) -> str:
        if self.kind is Kind.NONE:
            return "none"
        weak, norm = f"@{self.weak.kept}" if self.weak else "", ",norm" if self.norm else ""
        scale = repr(float(self.scale)).removesuffix(".0")
        return f"{self.kind.value}:{scale}{weak}{norm}"


def _lengths(velocity: npt.NDArray[Any], patch: int) -> Float64:
    """Return the length of each token's vector, repeated over its pixels: (B, 1, H, W)."""
    squares = np.square(velocity, dtype=np.float64).sum(axis=1)  # (B, H, W)
    rows, height, width = squares.shape
    tokens = squares.reshape(rows, height // patch, patch, width // patch, patch).sum(axis=(2, 4))
    lengths: Float64 = np.sqrt(tokens).repeat(patch, axis=1).repeat(patch, axis=2)[:, None]
    return lengths

"""What a sampling may choose, checked against a model before anything runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict, Unpack

import numpy as np
import numpy.typing as npt

from elit_export.arrays import Float64
from elit_export.errors import InputError
from elit_export.runtime.cache import CachePolicy
from elit_export.runtime.guidance import Branch, Guidance
from elit_export.runtime.noise import check_seed
from elit_export.runtime.samplers import sampler_named
from elit_export.runtime.samplers.base import Sampler
from elit_export.runtime.schedule import ScheduleLike, resolve_schedule
from elit_export.runtime.timegrid import warp
from elit_export.spec import Budget, ModelSpec


class Choices(TypedDict, total=False):
    """What a sampling may choose beside its subjects; what is left out takes the value in DEFAULTS."""

    steps: int
    schedule: ScheduleLike
    guidance: str | Guidance
    guidance_interval: tuple[float, float]
    sampler: str
    time_grid: str
    cache: str | CachePolicy
    seed: int
    noise: npt.ArrayLike  # (B, C, H, W) start noise, in place of the seed's
    step_noise: npt.ArrayLike  # (steps − 1, B, C, H, W) for stochastic samplers


DEFAULTS = Choices(
    steps=14,
    schedule="full",
    guidance="none",
    guidance_interval=(0.0, 1.0),
    sampler="ab3",
    time_grid="linear",
    cache="none",
    seed=0,
)


@dataclass(frozen=True)
class Chosen:
    """Choices that fit a model and one another: `times` are steps + 1 values of t, `schedule` has a budget a step."""

    sampler: Sampler
    times: Float64
    schedule: tuple[Budget, ...]
    guidance: Guidance
    cache: CachePolicy | None
    seed: int

    @property
    def needs_null(self) -> bool:
        """Whether any evaluation has a branch without a class, or of another prompt."""
        needed = branches_needed(self.sampler, self.times, self.schedule, self.guidance)
        return any(branch.null_class for branches in needed for branch in branches)


def branches_needed(
    sampler: Sampler, times: Float64, schedule: Sequence[Budget], guidance: Guidance
) -> Iterator[tuple[Branch, ...]]:
    """The branches of guidance in every evaluation of a sampling, in their order."""
    for step, budget in enumerate(schedule):
        yield guidance.branches(budget, float(times[step]))
        if sampler.evaluates_end(step, len(schedule)):
            yield guidance.branches(budget, float(times[step + 1]))


def checked_choices(spec: ModelSpec, **choices: Unpack[Choices]) -> Chosen:
    """Read the choices of one sampling, but for the arrays in them; raises InputError."""
    if unknown := sorted(set(choices) - set(Choices.__annotations__)):
        raise InputError(f"unknown choice {unknown[0]!r}; known: {', '.join(Choices.__annotations__)}")
    given = Choices(**{**DEFAULTS, **choices})
    _check_types(given)
    check_seed(given["seed"])
    sampler = sampler_named(given["sampler"])
    if given["steps"] < sampler.min_steps:
        raise InputError(f"sampler {sampler.name} needs at least {sampler.min_steps} steps, not {given['steps']}")
    if "step_noise" in given and not sampler.uses_noise:
        raise InputError(f"sampler {sampler.name} adds no noise: leave step_noise out")
    times = warp(sampler.times(given["steps"]), given["time_grid"])
    guidance, cache = given["guidance"], given["cache"]
    if isinstance(guidance, Guidance) and "guidance_interval" in choices:
        raise InputError("guidance is a value that has its interval: leave guidance_interval out")
    if isinstance(guidance, str):
        guidance = Guidance.parse(guidance, spec, interval=given["guidance_interval"])
    return Chosen(
        sampler=sampler,
        times=times,
        schedule=resolve_schedule(given["schedule"], [float(t) for t in times], spec),
        guidance=guidance,
        cache=CachePolicy.parse(cache) if isinstance(cache, str) else cache,
        seed=given["seed"],
    )


# What each choice may be, for callers without a type checker.
CHOICE_TYPES: dict[str, tuple[str, tuple[type, ...]]] = {
    "steps": ("a whole number", (int, np.integer)),
    "seed": ("a whole number", (int, np.integer)),
    "schedule": ("text, a budget or a list of budgets", (str, int, np.integer, Budget, list, tuple)),
    "guidance": ("text or a Guidance", (str, Guidance)),
    "guidance_interval": ("a pair of numbers", (tuple, list)),
    "sampler": ("text", (str,)),
    "time_grid": ("text", (str,)),
    "cache": ("text or a CachePolicy", (str, CachePolicy)),
}


def _check_types(given: Choices) -> None:
    for name, (wanted, types) in CHOICE_TYPES.items():
        value = given.get(name)
        if not isinstance(value, types) or isinstance(value, bool):
            raise InputError(f"{name} must be {wanted}, not {value!r}")
    interval = given["guidance_interval"]
    if len(interval) != 2 or not all(isinstance(t, int | float | np.floating) for t in interval):
        raise InputError(f"guidance_interval must be a pair of numbers, not {interval!r}")

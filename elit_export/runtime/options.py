"""The options of a sampling, each defined once.

Keyword arguments of the pipeline, options of the command line, their help and the table in docs/sampling.md are made
from the fields of SamplingOptions, and of SamplingArguments (`runtime/arguments.py`), which adds the preset.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from elit_export.arrays import Float64
from elit_export.errors import InputError
from elit_export.runtime.guidance import Branch, Guidance
from elit_export.runtime.noise import check_seed
from elit_export.runtime.samplers import SAMPLERS, sampler_named
from elit_export.runtime.samplers.base import Sampler
from elit_export.runtime.samplers.calibrated import (
    NO_SOLVERS,
    Place,
    Solvers,
    budgets_per_step,
    is_solver,
    selected_solver,
    solver_of,
)
from elit_export.runtime.schedule import ScheduleLike
from elit_export.runtime.step_cache.policy import CachePolicy
from elit_export.runtime.timegrid import warp
from elit_export.spec import Budget, ModelSpec
from elit_export.spec.limits import STEPS

Accepts = tuple[str, tuple[type, ...]]  # what an option may be, in words and in types
INTEGER: Accepts = "a whole number", (int, np.integer)
TEXT: Accepts = "text", (str,)
PAIR: Accepts = "a pair of numbers", (tuple, list, type(None))
DEFAULT_STEPS = 14
UNTYPED: Accepts = "", ()  # arrays and functions, which are not checked and cannot be typed on a command line


@dataclass(frozen=True)
class About:
    """The help of an option: its meaning and examples.

    `accepts` is checked at run time, for callers without a type checker.
    """

    text: str
    values: str
    accepts: Accepts

    @property
    def is_typed(self) -> bool:
        """Whether the option can be typed on a command line."""
        return self.accepts is not UNTYPED


def about(text: str, values: str, accepts: Accepts = UNTYPED) -> dict[str, About]:
    """Return the metadata of a field."""
    return {"about": About(text, values, accepts)}


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """The options of a sampling. Raises InputError for a value of another type."""

    steps: int | None = field(
        default=None,
        metadata=about(
            f"steps from noise to sample; without it {DEFAULT_STEPS}, or the calls of a solver table",
            "1 or more, 2 with a cache",
            ("a whole number", (int, np.integer, type(None))),
        ),
    )
    schedule: ScheduleLike = field(
        default="full",
        metadata=about(
            "budget of each step, by step, by share of the sampling, or by t, which falls from 1 (noise) to 0",
            "full; 4; 0-9:quarter,10-19:full; 0%-50%:quarter,50%-100%:full; 0.5-1.0:quarter,0.0-0.5:full",
            ("text, a budget or a list of budgets", (str, int, np.integer, Budget, list, tuple)),
        ),
    )
    guidance: str | Guidance = field(
        default="none",
        metadata=about(
            "which weak branch steers, and by how much",
            "none; cfg:3; ccfg:4@sixteenth; autoguidance:2@2; cfg:4,norm",
            ("text or a Guidance", (str, Guidance)),
        ),
    )
    guidance_interval: tuple[float, float] | None = field(
        default=None,
        metadata=about(
            "the lowest and the highest t that are guided; sampling starts at t = 1, noise",
            "0.2 0.8; all t without it",
            PAIR,
        ),
    )
    sampler: str = field(
        default="ab3",
        metadata=about(
            "solver of the ODE, or of the SDE; solver:CALLS is a table that was calibrated for the model",
            f"{', '.join(SAMPLERS)}, solver, solver:8",
            TEXT,
        ),
    )
    time_grid: str = field(
        default="linear", metadata=about("where the steps lie in t, from 1 (noise) to 0", "linear; shift:2.0", TEXT)
    )
    cache: str | CachePolicy = field(
        default="none",
        metadata=about(
            "which steps reuse what the blocks computed before",
            "none; teacache:0.1; static:every@2,order=0; static:time@0.3; static:mask@1011",
            ("text or a CachePolicy", (str, CachePolicy)),
        ),
    )
    seed: int = field(
        default=0,
        metadata=about("start noise, which for image number i is that of (seed, i)", "0 to 2**64 - 1", INTEGER),
    )
    first_image: int = field(
        default=0,
        metadata=about(
            "number of the first image: continues a numbering, the noise is that of (seed, number)",
            "0 to 2**63 - 1",
            INTEGER,
        ),
    )
    noise: npt.ArrayLike | None = field(
        default=None, metadata=about("start noise, in place of the seed's", "(B, C, H, W)")
    )
    step_noise: npt.ArrayLike | None = field(
        default=None, metadata=about("noise of the steps of a stochastic sampler", "(steps - 1, B, C, H, W)")
    )

    def __post_init__(self) -> None:
        for name, each in abouts(type(self)).items():
            value, (words, types) = getattr(self, name), each.accepts
            if types and (not isinstance(value, types) or (isinstance(value, bool) and bool not in types)):
                raise InputError(f"{name} must be {words}, not {value!r}")
        if self.steps is not None:
            STEPS.check(int(self.steps), "steps")
        interval = self.guidance_interval
        if interval is None:
            return
        if len(interval) != 2 or not all(isinstance(t, int | float | np.floating) for t in interval):
            raise InputError(f"guidance_interval must be a pair of numbers, not {interval!r}")

    @property
    def scalars(self) -> dict[str, str | float]:
        """The options that are text or numbers, as JSON holds them."""
        values = {name: value.item() if isinstance(value, np.generic) else value for name, value in vars(self).items()}
        return {name: value for name, value in values.items() if isinstance(value, str | int | float)}


def abouts(options: type[Any]) -> dict[str, About]:
    """Return the help of each option, by its name."""
    return {each.name: each.metadata["about"] for each in fields(options)}


# ---------------------------------------------------------------- resolved for a model


@dataclass(frozen=True, kw_only=True)
class ResolvedOptions:
    """Options that fit a model and each other: `times` has steps + 1 values of t, `schedule` a budget per step.

    `weak` is the budget of the weak branch in each step, where a solver table names it; otherwise the guidance does.
    """

    sampler: Sampler
    times: Float64
    schedule: tuple[Budget, ...]
    guidance: Guidance
    policy: CachePolicy | None
    seed: int
    weak: tuple[Budget, ...] | None = None
    first_image: int = 0
    start_noise: npt.ArrayLike | None = None
    step_noise: npt.ArrayLike | None = None

    @property
    def needs_null(self) -> bool:
        """Whether any evaluation has an unconditional branch, or one of a negative prompt."""
        return any(branch.null_class for batch in self.batches() for branch in batch)

    def guidance_at(self, step: int) -> Guidance:
        """Return the guidance of a step, with the weak budget of that step."""
        return self.guidance.with_weak(self.weak[step]) if self.weak else self.guidance

    def batches(self) -> Iterator[tuple[Branch, ...]]:
        """Yield the branches of guidance in each engine call, in order."""
        for t, step, _ in self.sampler.evaluations(self.times):
            yield from self.guidance_at(step).batches(self.schedule[step], t)


def resolve(
    spec: ModelSpec, options: SamplingOptions, solvers: Solvers = (), missing: str = NO_SOLVERS
) -> ResolvedOptions:
    """Parse the options of one sampling, except for arrays; raises InputError.

    `solvers` are the tables that were calibrated for the model; `missing` says why there are none. Warns where the one
    used was calibrated for other guidance or another budget.
    """
    check_seed(options.seed)
    if not 0 <= options.first_image < 1 << 63:
        raise InputError(f"first_image {options.first_image} is out of range", "choose one of 0 to 2**63 - 1")
    guidance = _guidance(spec, options)
    facts = None
    if is_solver(options.sampler):
        place = Place.of(guidance, options.schedule, spec)
        facts = selected_solver(solvers, options.sampler, options.steps, place, spec, missing)
    sampler = solver_of(facts.table) if facts else sampler_named(options.sampler)
    times = _times(sampler, options, facts.table.calls if facts else DEFAULT_STEPS)
    cache = options.cache
    policy = CachePolicy.parse(cache) if isinstance(cache, str) else cache
    if policy:
        policy.check_steps(len(times) - 1)
    schedule, weak = budgets_per_step(facts.table if facts else None, options.schedule, guidance, times, spec)
    return ResolvedOptions(
        sampler=sampler,
        times=times,
        schedule=schedule,
        weak=weak,
        guidance=guidance,
        policy=policy,
        seed=options.seed,
        first_image=options.first_image,
        start_noise=options.noise,
        step_noise=options.step_noise,
    )


def _times(sampler: Sampler, options: SamplingOptions, usual_steps: int) -> Float64:
    steps = usual_steps if options.steps is None else options.steps
    if steps < sampler.min_steps:
        raise InputError(f"sampler {sampler.name} needs at least {sampler.min_steps} steps, not {steps}")
    if options.step_noise is not None and not sampler.uses_noise:
        raise InputError(f"sampler {sampler.name} adds no noise", "leave step_noise out")
    if is_solver(sampler.name) and options.time_grid != "linear":
        raise InputError(f"sampler {sampler.name} has times of its own", "leave time_grid out")
    return warp(sampler.times(steps), options.time_grid)


def _guidance(spec: ModelSpec, options: SamplingOptions) -> Guidance:
    if isinstance(options.guidance, str):
        return Guidance.parse(options.guidance, spec, interval=options.guidance_interval or (0.0, 1.0))
    if options.guidance_interval is not None:
        raise InputError("guidance is a value that has its interval", "leave guidance_interval out")
    return options.guidance

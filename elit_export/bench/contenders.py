"""The sampling configs that are compared: a bundle's presets, and samplings that are named."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from elit_export.arrays import HostArray, Pixels
from elit_export.bundle.manifest import PlanSet
from elit_export.bundle.reading import Bundle
from elit_export.errors import InputError
from elit_export.runtime.guidance import Guidance
from elit_export.runtime.options import SamplingOptions
from elit_export.runtime.pipeline import Pipeline
from elit_export.runtime.presets import plan_set_of, preset_named
from elit_export.runtime.samplers import SAMPLERS
from elit_export.spec import SolverFacts
from elit_export.spec.limits import STEPS

EULER_STEPS = 50
REFERENCE_STEPS = 160  # of ab3: the solution that errors are relative to
USAGE = "SAMPLER:STEPS or SAMPLER:STEPS@SCHEDULE, e.g. ab3:14, solver:8 or ab3:14@half"


@dataclass(frozen=True)
class Contender:
    """A sampling config for the plans of one plan set."""

    name: str
    plan_set: PlanSet
    options: SamplingOptions


def contenders(
    bundle: Bundle,
    presets_of: Sequence[PlanSet],
    named_on: Sequence[PlanSet],
    *,
    named: Sequence[str],
    guidance: str,
    seed: int,
) -> list[Contender]:
    """List the presets that run on the plan sets `presets_of`, then each named sampling on each of `named_on`.

    Raises InputError if there are none, or if the images of the seed are those that a solver table was calibrated on.
    """
    Guidance.parse(guidance, bundle.manifest.model.spec)
    check_unseen(bundle.manifest.solvers, seed)
    samplings = [(text, named_options(text, guidance, seed)) for text in dict.fromkeys(named)]
    found = [*_of_presets(bundle, presets_of, seed)]
    found += [Contender(text, plan_set, options) for plan_set in named_on for text, options in samplings]
    if not found:
        raise InputError(
            f"{bundle.folder} has no presets of these plans to compare",
            f"make some: elit-export tune {bundle.folder} --speedup 10; or name samplings, e.g. --row ab3:14",
        )
    return found


def named_options(text: str, guidance: str, seed: int) -> SamplingOptions:
    """Read USAGE; raises InputError. What is not a sampler that takes any number of steps is the name of a solver."""
    named, _, schedule = text.partition("@")
    sampler, _, steps = named.partition(":")
    common = SamplingOptions(schedule=schedule or "full", guidance=guidance, seed=seed)
    if sampler not in SAMPLERS:
        return replace(common, sampler=named)
    if not steps.isdecimal():
        raise InputError(f"row {text!r} is not {USAGE}")
    if SAMPLERS[sampler].uses_noise:
        raise InputError(
            f"row {text!r}: {sampler} draws noise at every step, so its images could not be compared",
            "name a sampler that draws none",
        )
    return replace(common, sampler=sampler, steps=STEPS.whole(steps, f"row {sampler}: steps"))


def _of_presets(bundle: Bundle, plan_sets: Sequence[PlanSet], seed: int) -> Iterator[Contender]:
    """Yield a contender for each preset of these plan sets; raises BundleError for one that cannot be used."""
    names = {plan_set.name for plan_set in plan_sets}
    for preset in bundle.manifest.presets:
        plan_set = plan_set_of(bundle, preset_named(bundle, preset.name))
        if plan_set.name in names:
            options = SamplingOptions(**preset.options.model_dump(exclude_none=True), seed=seed)
            yield Contender(f"preset {preset.name}", plan_set, options)


def check_unseen(solvers: Iterable[SolverFacts], *seeds: int) -> None:
    """Raise InputError for images that a solver table was fitted to, or stopped by: it would look better than it is.

    A calibration fits to images of its seed, and those of the next seed tell it when to stop.
    """
    for solver in solvers:
        if seen := {solver.seed, solver.seed + 1}.intersection(seeds):
            raise InputError(f"{solver.name} was calibrated on images of seed {min(seen)}", "give another --seed")


# ---------------------------------------------------------------- ready to run


@dataclass(frozen=True)
class SamplingConfig:
    """A sampling config, ready to run. `decode` makes pictures of its samples; None where nothing here can."""

    name: str
    plan_set: str
    pipeline: Pipeline
    options: SamplingOptions
    decode: Callable[[HostArray], Pixels] | None


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What is measured: the time of `rows` images at once, the quality of `images`, which are 0 if only time is."""

    rows: int
    rounds: int
    images: int
    guidance: str
    seed: int

    @property
    def eager_options(self) -> SamplingOptions:
        return SamplingOptions(sampler="euler", steps=EULER_STEPS, guidance=self.guidance, seed=self.seed)

    @property
    def reference_options(self) -> SamplingOptions:
        return replace(self.eager_options, sampler="ab3", steps=REFERENCE_STEPS)

"""The ways to make an image that are compared: a bundle's presets, and samplings that are named."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from elit_export.arrays import HostArray, Pixels
from elit_export.bundle.manifest import Manifest, PlanSet
from elit_export.bundle.presets import Preset
from elit_export.errors import BundleError, InputError
from elit_export.runtime.guidance import Guidance
from elit_export.runtime.options import SamplingOptions
from elit_export.runtime.pipeline import Pipeline
from elit_export.runtime.samplers import SAMPLERS
from elit_export.spec.limits import STEPS

EULER_STEPS = 50
REFERENCE_STEPS = 160  # of ab3: the solution that errors are relative to
USAGE = "SAMPLER:STEPS or SAMPLER:STEPS@SCHEDULE, e.g. ab3:14, solver:8 or ab3:14@half"


@dataclass(frozen=True)
class Contender:
    """A way to make images with the plans of one plan set."""

    name: str
    plan_set: PlanSet
    options: SamplingOptions


def contenders(
    manifest: Manifest,
    presets_of: Sequence[PlanSet],
    named_on: Sequence[PlanSet],
    *,
    named: Sequence[str],
    guidance: str,
    seed: int,
) -> list[Contender]:
    """List the presets that run on the plan sets `presets_of`, then each named sampling on each of `named_on`.

    Raises InputError if there are none, or if the images of the seed are those that a solver table was fitted to.
    """
    Guidance.parse(guidance, manifest.model.spec)
    _check_unseen(manifest, seed)
    samplings = [(text, named_options(text, guidance, seed)) for text in dict.fromkeys(named)]
    found = [*_of_presets(manifest, presets_of, seed)]
    found += [Contender(text, plan_set, options) for plan_set in named_on for text, options in samplings]
    if not found:
        raise InputError(
            "there are no presets of these plans to compare",
            "make some: elit-export tune BUNDLE; or name samplings, e.g. --row ab3:14",
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


def _of_presets(manifest: Manifest, plan_sets: Sequence[PlanSet], seed: int) -> Iterator[Contender]:
    for preset in manifest.presets:
        if preset.checkpoint_sha256 != manifest.model.checkpoint_sha256:
            raise BundleError(f"preset {preset.name} is of another checkpoint", f"make it again: {preset.command}")
        for plan_set in plan_sets:
            if (preset.target, preset.precision) == (plan_set.target, plan_set.precision):
                yield Contender(f"preset {preset.name}", plan_set, preset_options(preset, seed))


def preset_options(preset: Preset, seed: int) -> SamplingOptions:
    """Return what a preset sets, for the images of a seed."""
    options = preset.options.model_dump(exclude_none=True)
    return SamplingOptions(**options, seed=seed)


def _check_unseen(manifest: Manifest, seed: int) -> None:
    """Raise InputError for images that a solver table may have been fitted to: it would look better than it is."""
    for solver in manifest.solvers:
        if solver.seed == seed:
            raise InputError(f"{solver.name} was fitted to images of seed {seed}", "give another --seed")


# ---------------------------------------------------------------- ready to run


@dataclass(frozen=True)
class Way:
    """A way to make images, ready to run. `decode` makes pictures of its samples; None where nothing here can."""

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

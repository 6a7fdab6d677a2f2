"""The presets of a bundle, as samplings use them: which of them hold here, by which plan set, with which options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from elit_export.bundle.manifest import PlanSet, described
from elit_export.bundle.presets import Preset
from elit_export.bundle.reading import Bundle
from elit_export.errors import BundleError, InputError, did_you_mean
from elit_export.runtime.arguments import Chosen, Given
from elit_export.runtime.opening import matching, select_plan_set


@dataclass(frozen=True)
class Presets:
    """The presets of a bundle for samplings by one of its plan sets.

    `default` is that of samplings that neither name one nor say that they want none. Raises as `options_of` for it.
    """

    bundle: Bundle
    plan_set: PlanSet
    default: str | None = None

    def __post_init__(self) -> None:
        if self.default is not None:
            self.options_of(self.default)

    def options_of(self, name: str) -> dict[str, Any]:
        """Return the options that a preset sets; raises InputError or BundleError if it cannot be used here."""
        preset = preset_named(self.bundle, name)
        plan_set = plan_set_of(self.bundle, preset)
        if plan_set.name != self.plan_set.name:
            raise InputError(
                f"preset {name!r} samples by {described((plan_set,))}, what is open is {described((self.plan_set,))}",
                f"load the bundle with it: Pipeline.load({str(self.bundle.folder)!r}, preset={name!r})",
            )
        return preset.options.model_dump(exclude_none=True)


def merged(given: Given[Chosen], presets: Presets | None) -> Chosen:
    """Return the options of a sampling: what was given, and of its preset what was not.

    `presets` is None where no bundle is. Raises InputError, or BundleError for a preset that cannot be used.
    """
    asked = given.over({})
    name = asked.preset if "preset" in given.values or presets is None else presets.default
    if name is None:
        return asked
    if presets is None:
        raise InputError(
            f"no preset {name!r}: these engines were not loaded from a bundle",
            f"load one that has it: Pipeline.load(BUNDLE, preset={name!r})",
        )
    return given.over(presets.options_of(name) | {"preset": name})


def chosen_plan_set(bundle: Bundle, target: str | None, precision: str | None, preset: str | None) -> PlanSet:
    """Return the plan set of a preset, or else what `select_plan_set` does.

    Raises InputError or BundleError, also for a target or a precision that is not the preset's.
    """
    if preset is None:
        return select_plan_set(bundle.manifest.plan_sets, target, precision)
    plan_set = plan_set_of(bundle, preset_named(bundle, preset))
    if not matching((plan_set,), target, precision):
        asked = {"target": target, "precision": precision}
        words = " ".join(f"{name}={value!r}" for name, value in asked.items() if value is not None)
        raise InputError(
            f"preset {preset!r} samples by {described((plan_set,))}, not by {words}",
            "leave target and precision out, or choose another preset",
        )
    return plan_set


def preset_named(bundle: Bundle, name: str) -> Preset:
    """Return a preset of this checkpoint; raises InputError if there is none of this name, BundleError if it is old."""
    named = {preset.name: preset for preset in bundle.manifest.presets}
    if not named:
        raise InputError(
            f"no preset {name!r}: {bundle.folder} has none", f"make some: elit-export tune {bundle.folder} --speedup 10"
        )
    if name not in named:
        hint = did_you_mean(name, named)
        raise InputError(f"no preset {name!r} in {bundle.folder}", f"{hint} presets: {', '.join(named)}".lstrip())
    if problem := bundle.manifest.model.other_checkpoint(named[name].checkpoint_sha256):
        raise BundleError(
            f"preset {name!r} of {bundle.folder} is {problem}", f"make it again: {named[name].tune_line(bundle.folder)}"
        )
    return named[name]


def plan_set_of(bundle: Bundle, preset: Preset) -> PlanSet:
    """Return the plan set that a preset samples by; raises BundleError if the bundle does not have it."""
    plan_sets = bundle.manifest.plan_sets
    if found := matching(plan_sets, preset.target, preset.precision.value):
        return found[0]
    raise BundleError(
        f"preset {preset.name!r} samples by target={preset.target!r} precision={preset.precision.value!r}, which "
        f"{bundle.folder} lacks; it has {described(plan_sets)}",
        f"build it: elit-export build RECIPE --target {preset.target} --out {bundle.folder}; "
        f"or make the preset again: {preset.tune_line(bundle.folder)}",
    )


def usability_problem(bundle: Bundle, preset: Preset) -> str:
    """Say why a preset cannot be used, and what to do; empty if it can."""
    try:
        plan_set_of(bundle, preset_named(bundle, preset.name))
    except BundleError as error:
        return str(error)
    return ""

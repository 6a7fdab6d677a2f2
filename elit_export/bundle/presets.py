"""Presets as a manifest holds them: named sampling configs, what was measured of each, and how it was made."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from elit_export.bundle.artifacts import Facts, Name
from elit_export.spec import ModelSpec, Precision
from elit_export.spec.limits import STEPS

Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Steps = Annotated[int, Field(ge=1, le=int(STEPS.maximum), strict=True)]
Count = Annotated[int, Field(ge=1)]


MADE_BY = ("elit-export", "tune", "BUNDLE")  # how a stored command begins; it is shown with the bundle's folder
MADE_WITH = (  # the options that it may have, each with a value: none writes another file, none trusts plans
    *("--latency", "--speedup", "--min-sqnr", "--rows", "--guidance", "--classifier", "--images", "--trials"),
    *("--name", "--seed", "--targets", "--precision"),
)


def _one_command(text: str) -> str:
    """Check that a line, which people are told to type, searches presets and does nothing else."""
    words = shlex.split(text)
    if tuple(words[:2]) != MADE_BY[:2] or len(words) % 2 == 0 or shlex.join(words) != text:
        raise ValueError("a preset is made by one command `elit-export tune BUNDLE`, quoted as shlex.join does")
    if other := [word for word in words[3::2] if word not in MADE_WITH]:
        raise ValueError(f"a preset is not made with {other[0]}; the options are {', '.join(MADE_WITH)}")
    return text


Command = Annotated[str, AfterValidator(_one_command)]


class PresetOptions(Facts):
    """The options of SamplingOptions that a preset sets, as its fields take them."""

    sampler: str
    steps: Steps | None = None  # None: as many as the sampler says
    schedule: str = "full"
    guidance: str = "none"
    guidance_interval: tuple[Finite, Finite] | None = None
    time_grid: str = "linear"
    cache: str = "none"


class Measured(Facts):
    """What a preset cost and how good its images were, on images that no search saw.

    `ms` is the median wall time of one sampling of `rows` images, with the decoder; `speedup` is that of Euler's 50
    steps at the full budget with the same guidance and plans over it. `sqnr_db` compares samples, pooled, with the
    reference solution at full budget and the same guidance; None where the preset runs smaller budgets, which have
    another solution. `distance` and its standard error are those of `evaluator`, None without one.
    """

    rows: Count
    ms: Positive
    speedup: Positive
    engine_calls: Count
    images: Count
    seed: int
    sqnr_db: Finite | None = None
    worst_sqnr_db: Finite | None = None
    evaluator: str | None = None
    distance: Finite | None = None
    distance_error: Finite | None = None
    machine: str
    date: str


class Preset(Facts):
    """A named sampling config for one plan set, for one checkpoint. `command` makes it again, in any folder."""

    name: Name
    checkpoint_sha256: str
    target: str
    precision: Precision
    options: PresetOptions
    measured: Measured
    command: Command

    def tune_line(self, folder: Path) -> str:
        """Return the command that makes it again in a bundle."""
        words = shlex.split(self.command)
        return shlex.join([*words[:2], str(folder), *words[len(MADE_BY) :]])

    def command_line(self, folder: Path, spec: ModelSpec) -> str:
        """Return the command that samples by it; of a model with text, for a prompt that is still to be filled in."""
        shown = ("--prompt", "TEXT", "--encoder", "FOLDER") if spec.takes_text else ()
        return shlex.join(["elit-export", "sample", str(folder), "--preset", self.name, *shown])

    def python_line(self, folder: Path, spec: ModelSpec) -> str:
        """Return the same in Python."""
        shown = "prompts" if spec.takes_text else "[0]"
        return f"Pipeline.load({str(folder)!r}, preset={self.name!r}).sample({shown})"


def _named_once(presets: tuple[Preset, ...]) -> tuple[Preset, ...]:
    if len({preset.name for preset in presets}) < len(presets):
        raise ValueError(f"two presets have one name: {', '.join(preset.name for preset in presets)}")
    return presets


StoredPresets = Annotated[tuple[Preset, ...], AfterValidator(_named_once)]

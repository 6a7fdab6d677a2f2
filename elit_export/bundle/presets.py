"""Presets as a manifest holds them: named ways to sample, what was measured of each, and how it was made."""

from __future__ import annotations

from pydantic import Field

from elit_export.bundle.artifacts import Facts, Name
from elit_export.spec import Precision


class PresetOptions(Facts):
    """The options of SamplingOptions that a preset sets, as its fields take them."""

    sampler: str
    steps: int | None = Field(default=None, ge=1)  # None: as many as the solver table has calls
    schedule: str = "full"
    guidance: str = "none"
    guidance_interval: tuple[float, float] | None = None
    time_grid: str = "linear"
    cache: str = "none"


class Measured(Facts):
    """What a preset cost and how good its images were, on images that no search saw.

    `ms` is the median wall time of one sampling of `rows` images, with the decoder; `speedup` is that of Euler's 50
    steps at the full budget with the same guidance and plans over it. `sqnr_db` compares samples, pooled, with the
    reference solution at full budget and the same guidance; None where the preset runs smaller budgets, which have
    another solution. `distance` and its standard error are those of `evaluator`, None without one.
    """

    rows: int
    ms: float
    speedup: float
    engine_calls: int
    images: int
    seed: int
    sqnr_db: float | None = None
    worst_sqnr_db: float | None = None
    evaluator: str | None = None
    distance: float | None = None
    distance_error: float | None = None
    machine: str
    date: str


class Preset(Facts):
    """A named way to sample by one plan set, for one checkpoint. `command` makes it again."""

    name: Name
    checkpoint_sha256: str
    target: str
    precision: Precision
    options: PresetOptions
    measured: Measured
    command: str

"""What a search found, as numbers that JSON holds."""

from __future__ import annotations

from dataclasses import dataclass

FOUND = "found"  # the family of what is no control


@dataclass(frozen=True)
class TunedRow:
    """Describes a sampling config, measured on images that no search saw.

    `family` is that of a control, or "found". `predicted_ms` comes from the times of single calls, `ms` is the median
    wall time of one sampling with its decoder; `speedup` is the baseline's time of the same plan set over it.
    `keeps_solution` says whether the dB compare it with its own solution; where it does not, they are None. The
    distance is None without an evaluator.
    """

    name: str
    family: str
    plan_set: str
    options: dict[str, object]
    predicted_ms: float
    ms: float
    speedup: float
    engine_calls: int
    keeps_solution: bool
    sqnr_db: float | None
    median_sqnr_db: float | None
    worst_sqnr_db: float | None
    distance: float | None
    distance_error: float | None
    on_front: bool


@dataclass(frozen=True)
class PresetResult:
    """Describes a preset, and how it held when it was measured again.

    `goal` says what it must reach. `remeasured_ms` is its time in the last measurement. `worse_than` are the controls
    at equal or more time that have significantly better images; `accepted` is true where there are none of these;
    the goal is met within 5 % in any case.
    """

    name: str
    row: str
    plan_set: str
    goal: str
    remeasured_ms: float
    remeasured_speedup: float
    compared_with: int
    worse_than: list[str]
    accepted: bool
    command: str
    python: str


@dataclass(frozen=True)
class TuneResult:
    """All rows, the presets, and what the search was of.

    `trials` counts those of each stage, earlier runs included. `rows` is the number of images of a timed sampling.
    """

    target: str
    guidance: str
    largest_budget: str
    rows: int
    images: int
    error_images: int
    seed: int
    final_seed: int
    reference: str
    evaluator: str | None
    trials: dict[str, int]
    baseline_ms: dict[str, float]
    smallest_ms: float
    found: list[TunedRow]
    presets: list[PresetResult]
    notes: list[str]

"""What a search found → tables for people."""

from __future__ import annotations

from collections.abc import Iterator

from elit_export.cli.tables.layout import Table, digits, table
from elit_export.tune.result import FOUND, PresetResult, TunedRow, TuneResult

FRONT, CONTROL = "front", "control"


def tune_tables(result: TuneResult) -> Iterator[Table]:
    """Tables of all that was measured on unseen images, and of the presets."""
    of_distance = ["distance"] if result.evaluator else []
    several = len({row.plan_set for row in result.found}) > 1
    yield table(
        f"time and quality of one sampling of {result.rows} images, guidance {result.guidance}",
        (
            *(["plan set"] if several else []),
            *("sampling", "is", "calls", "ms", "predicted", "speed-up", "dB pooled", "median", "worst", *of_distance),
        ),
        [(*([row.plan_set] if several else []), *_cells(row, result)) for row in result.found],
        list(_notes(result)),
    )
    yield table(
        f"presets, measured again; target: {result.target}",
        ("preset", "sampling", "plan set", "goal", "ms", "speed-up", "verdict"),
        [_preset_cells(preset) for preset in result.presets],
        result.notes,
    )


def _cells(row: TunedRow, result: TuneResult) -> tuple[str, ...]:
    words = [*([FRONT] if row.on_front else []), *([CONTROL] if row.family != FOUND else [])]
    words += [preset.name for preset in result.presets if (preset.row, preset.plan_set) == (row.name, row.plan_set)]
    return (
        row.name,
        ", ".join(words),
        str(row.engine_calls),
        digits(row.ms),
        digits(row.predicted_ms),
        f"{row.speedup:.2f}",
        *(_db(value) for value in (row.sqnr_db, row.median_sqnr_db, row.worst_sqnr_db)),
        *([_distance(row)] if result.evaluator else []),
    )


def _db(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _distance(row: TunedRow) -> str:
    return "–" if row.distance is None else f"{row.distance:.2f} ± {row.distance_error:.2f}"


def _notes(result: TuneResult) -> Iterator[str]:
    trials = ", ".join(f"{count} {where}" for where, count in result.trials.items())
    yield f"trials: {trials}; the search saw images of seed {result.seed}, this table those of {result.final_seed}"
    yield (
        f"dB: {result.error_images} images against the reference solution, ab3 with 160 steps at budget "
        f"{result.largest_budget} and guidance {result.guidance} by {result.reference}; – where another budget or "
        "guidance has another solution"
    )
    if result.evaluator:
        yield f"distance: Fréchet, of {result.images} images from real ones, by {result.evaluator}; less is better"
    yield "front: nothing measured is as fast and better; control: needs no search"
    yield "; ".join(f"{name}: 50 Euler steps take {digits(ms)} ms" for name, ms in result.baseline_ms.items())


def _preset_cells(preset: PresetResult) -> tuple[str, ...]:
    return (
        preset.name,
        preset.row,
        preset.plan_set,
        preset.goal,
        digits(preset.remeasured_ms),
        f"{preset.remeasured_speedup:.2f}",
        _verdict(preset),
    )


def _verdict(preset: PresetResult) -> str:
    if preset.accepted:
        return f"accepted: meets its goal, no worse than {preset.compared_with} controls"
    return f"meets its goal, but is worse than {len(preset.worse_than)} of {preset.compared_with} controls"


def preset_lines(result: TuneResult) -> Iterator[tuple[str, list[str]]]:
    """The lines to copy for each preset: of the command line and of Python."""
    for preset in result.presets:
        yield f"preset {preset.name}", [preset.command, preset.python]
        if preset.worse_than:
            yield f"better than {preset.name} at equal or more time", preset.worse_than

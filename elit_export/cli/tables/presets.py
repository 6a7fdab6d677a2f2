"""The presets and solver tables of a bundle → tables for people."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from elit_export.cli.tables.layout import Table, digits, table

Facts = dict[str, Any]
DASH = "–"


def preset_tables(presets: Sequence[Facts]) -> Iterator[Table]:
    """What each preset sets, and what was measured of it; nothing where there are none."""
    if not presets:
        return
    yield table(
        "presets: how each samples",
        ("preset", "target", "precision", "sampler", "steps", "schedule", "guidance", "guided t", "time grid", "cache"),
        [_options_row(preset) for preset in presets],
        [f"{preset['name']} is refused: {preset['problem']}" for preset in presets if preset["problem"]],
    )
    yield table(
        "presets: what was measured, on images that no search saw",
        ("preset", "rows", "ms", "× Euler 50", "calls", "SQNR dB", "worst dB", "distance", "images"),
        [_measured_row(preset) for preset in presets],
        [
            "ms: one sampling of so many rows, decoded, median",
            "SQNR: of all samples together and of the worst one, against the reference solution at full budget",
            *_grouped((_origin_text(preset), preset["name"]) for preset in presets),
        ],
    )


def preset_lines(presets: Sequence[Facts]) -> Iterator[tuple[str, list[str]]]:
    """Yield a title and lines to be copied for each preset: those that use it, or the one that makes it again."""
    for preset in presets:
        if preset["problem"]:
            yield f"preset {preset['name']} made again", [preset["command"]]
        else:
            yield f"preset {preset['name']}", [preset["command_line"], preset["python_line"]]


def _options_row(preset: Facts) -> tuple[str, ...]:
    options, target = preset["options"], preset["target"]
    steps = "of the sampler" if options["steps"] is None else str(options["steps"])
    interval = _interval_text(options["guidance_interval"])
    texts = (options["time_grid"], options["cache"])
    shown = (options["sampler"], steps, options["schedule"], options["guidance"], interval, *texts)
    return preset["name"], target, preset["precision"], *shown


def _measured_row(preset: Facts) -> tuple[str, ...]:
    measured = preset["measured"]
    distance = _number(measured["distance"])
    if measured["distance_error"] is not None:
        distance += f" ± {_number(measured['distance_error'])}"
    return (
        preset["name"],
        str(measured["rows"]),
        digits(measured["ms"]),
        digits(measured["speedup"]),
        str(measured["engine_calls"]),
        _db(measured["sqnr_db"]),
        _db(measured["worst_sqnr_db"]),
        distance,
        str(measured["images"]),
    )


def _origin_text(preset: Facts) -> str:
    """Say where and how a preset was measured."""
    measured = preset["measured"]
    evaluator = f", evaluator {measured['evaluator']}" if measured["evaluator"] else ""
    return (
        f"on {measured['machine']}, {measured['date']}, checkpoint {preset['checkpoint_sha256'][:12]}, seed "
        f"{measured['seed']}{evaluator}, by {preset['command']}"
    )


def _grouped(facts: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Yield each text once, after the names that it holds for."""
    names: dict[str, dict[str, None]] = {}
    for text, name in facts:
        names.setdefault(text, {})[name] = None
    for text, each in names.items():
        yield f"{', '.join(each)}: {text}"


def solver_tables(solvers: Sequence[Facts]) -> Iterator[Table]:
    """The error of each solver, and below it of what it was compared with; nothing where there are none."""
    if not solvers:
        return
    yield table(
        "solver tables: error against the reference solution, on images that they were not fitted to",
        (
            *("solver", "guidance", "guided t", "schedule", "method", "steps", "calls"),
            *("median dB", "pooled dB", "worst dB", "images"),
        ),
        [row for solver in solvers for row in _solver_rows(solver)],
        [
            *_grouped((_fitted_text(solver), solver["name"]) for solver in solvers),
            *(f"{solver['name']} is not used: it is {solver['problem']}" for solver in solvers if solver["problem"]),
        ],
    )


def _fitted_text(solver: Facts) -> str:
    return (
        f"fitted to {solver['images']} images from seed {solver['seed']}, target {solver['target']}, "
        f"{solver['precision']}, checkpoint {solver['checkpoint_sha256'][:12]}"
    )


def _solver_rows(solver: Facts) -> Iterator[tuple[str, ...]]:
    for error in (solver["error"], *solver["compared"]):
        yield (
            solver["name"],
            solver["guidance"],
            _interval_text(solver["guidance_interval"]),
            solver["schedule"],
            error["sampler"],
            str(error["steps"]),
            str(error["calls"]),
            *(_db(error[name]) for name in ("median_db", "pooled_db", "worst_db")),
            str(solver["held_out_images"]),
        )


def _interval_text(interval: Sequence[float] | None) -> str:
    return "all" if interval is None else f"{interval[0]:g}..{interval[1]:g}"


def _db(value: float | None) -> str:
    return DASH if value is None else f"{value:.1f}"


def _number(value: float | None) -> str:
    return DASH if value is None else digits(value)

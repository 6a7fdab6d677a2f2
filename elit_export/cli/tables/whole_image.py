"""Whole images beside PyTorch's → tables for people."""

from __future__ import annotations

from collections.abc import Iterator

from elit_export.bench.contenders import EULER_STEPS, REFERENCE_STEPS
from elit_export.bench.whole_image import ImageRow, WholeImageResult
from elit_export.cli.tables.layout import Table, digits, table
from elit_export.verify.metrics import SampleError


def whole_image_tables(result: WholeImageResult) -> Iterator[Table]:
    """A table of times, and one of quality if that was measured."""
    images = "one image" if result.rows == 1 else f"{result.rows} images at once"
    yield table(
        f"whole images: {images}, guidance {result.guidance}, in turn, rounds: {result.rounds}",
        (
            *("sampling", "plan set", "engine calls", "ms per image", "10-90 %", "speed-up"),
            *("speed-up / lead per call", "outside engines"),
        ),
        [_time_cells(row) for row in result.configs],
        list(_time_notes(result)),
    )
    if not result.images:
        return
    judged = result.evaluator is not None
    yield table(
        f"{result.images} images of seed {result.seed}, guidance {result.guidance}",
        (
            *("sampling", "plan set", "dB, all", "dB, median image", "dB, worst image"),
            *(("Fréchet", "change of Fréchet") if judged else ()),
        ),
        [_quality_cells(row, judged=judged) for row in result.configs],
        list(_quality_notes(result)),
    )


def _time_cells(row: ImageRow) -> tuple[str, ...]:
    timing = row.timing
    return (
        row.name,
        row.plan_set,
        str(row.engine_calls),
        digits(timing.median_ms),
        f"{digits(timing.low_ms)}-{digits(timing.high_ms)}",
        f"{row.speedup:.2f}",
        "" if row.over_lead is None else f"{row.over_lead:.2f}",
        f"{row.outside_engines:.2%}",
    )


def _time_notes(result: WholeImageResult) -> Iterator[str]:
    eager = result.configs[0].name
    yield f"{eager}: {EULER_STEPS} Euler steps at the full budget, as the reference implementation samples"
    for call in result.calls:
        yield (
            f"lead per call of {call.plan_set}: {call.lead:.2f}; a call of {call.rows} rows at {call.budget} takes "
            f"{digits(call.engine.median_ms)} ms, {eager} {digits(call.eager.median_ms)}"
        )
    yield from (f"{name} not measured: {reason}" for name, reason in result.skipped.items())


def _quality_cells(row: ImageRow, *, judged: bool) -> tuple[str, ...]:
    cells = (row.name, row.plan_set, *_db_cells(row.error))
    if not judged:
        return cells
    distance = row.distance
    if distance is None:
        return (*cells, "–", "–")
    change = f"{distance.change:+.2f} ± {distance.change_error:.2f}"
    return (*cells, f"{distance.value:.2f} ± {distance.error:.2f}", change)


def _db_cells(error: SampleError | None) -> tuple[str, str, str]:
    if error is None:
        return "–", "–", "–"
    return f"{error.pooled_db:.1f}", f"{error.median_db:.1f}", f"{error.worst_db:.1f}"


def _quality_notes(result: WholeImageResult) -> Iterator[str]:
    yield (
        f"dB: against ab3 at {REFERENCE_STEPS} steps and the full budget by {result.reference}; – where budgets or "
        f"guidance are others, whose dB say nothing of quality"
    )
    if result.evaluator is None:
        yield f"no distance from real images: {result.no_distance}"
    else:
        yield f"Fréchet: distance from real images as {result.evaluator} sees them, ± is one standard error"
        yield f"changes are to {result.configs[0].name} and paired"

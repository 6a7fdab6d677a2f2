"""What was measured → tables for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from elit_export.bench.backends import BackendRow, BackendsResult, BackendTime
from elit_export.bench.cache import CONTROLS, SweepResult, SweepRow
from elit_export.bench.engines import ENGINE, BenchResult, BudgetResult
from elit_export.bench.memory import BankMemory
from elit_export.bench.samplers import SamplerError
from elit_export.bench.samplings import FAST, SamplingResult
from elit_export.bench.soak import SoakResult
from elit_export.bench.timing import Timing
from elit_export.cli.tables.layout import Table, digits, size, table
from elit_export.cost.flops import flops
from elit_export.evaluate.paired import Estimate
from elit_export.evaluate.quality import QualityResult, QualityRow
from elit_export.evaluate.statistics import EvaluatorFacts
from elit_export.spec import Budget, ModelSpec

NOT_QUALITY = "more dB is closer to the reference, not a better picture: for quality, elit-export evaluate"

# ---------------------------------------------------------------- bench


def cost_table(spec: ModelSpec, text: int) -> Table:
    """Show how FLOPs of one image's forward pass divide into parts; `text` tokens are 0 without any."""
    parts = ("head", "read", "core", "write", "tail", "other", "total")
    rows = []
    for name, budget in spec.named_budgets.items():
        cost = flops(spec, budget, text=text)
        rows.append((budget_text(name, budget), *(f"{getattr(cost, part) / 1e9:.3g}" for part in parts)))
    text_note = f", {text} tokens of text" if text else ""
    return table(f"cost in GFLOP (one image, one forward pass{text_note})", ("budget", *parts), rows)


def budget_text(name: str, budget: Budget | str) -> str:
    """`full (16of16)`, and `3of16` for a budget without a name of its own."""
    return name if name == str(budget) else f"{name} ({budget})"


def bench_tables(result: BenchResult) -> Iterator[Table]:
    """Tables of the budgets and of whole samplings; the notes are about the engines together."""
    largest = result.budgets[0]
    others = list(largest.speedups)
    relative = (f"time / {largest.name}", f"FLOPs / {largest.name}")
    columns = ("budget", "ms per call", "10-90 %", "forward passes/s", "GFLOP/s", "of peak", *relative)
    yield table(
        f"one engine call of {result.rows} rows",
        (*columns, *(f"{name} / {ENGINE}" for name in others)),
        [_budget_cells(budget, others) for budget in result.budgets],
        list(_bench_notes(result)),
    )
    if not result.samplings:
        return
    yield table(
        f"how close samples at each budget come to the reference solution at {largest.name}",
        ("budget", f"dB to the reference at {largest.name}"),
        [(_budget_name(budget), _db(budget.sample_sqnr_db)) for budget in result.budgets],
        [f"of {FAST.sampler} {FAST.steps} at each budget; {NOT_QUALITY}"],
    )
    yield table(
        "whole samplings",
        (
            *("sampling", "ms per image", "speed-up", "GFLOP per image", "outside engines", "ms of it a step"),
            f"dB to the reference at {largest.name}",
        ),
        [_sampling_cells(sampling) for sampling in result.samplings],
        [NOT_QUALITY],
    )


def _bench_notes(result: BenchResult) -> Iterator[str]:
    yield f"matrix-product peak {result.peak_gflops:.0f} GFLOP/s"
    yield f"alternating budgets takes {result.switching:.2f} of running each by itself"
    yield f"the plans take {size(result.plan_bytes)} on disk"
    if result.bank_bytes is not None and result.bank_memory_ratio is not None:
        yield f"all engines hold {size(result.bank_bytes)}, {result.bank_memory_ratio:.2f} of one"
    if result.resident_bytes is not None:
        yield f"the whole process holds {size(result.resident_bytes)}"
    if decode := result.decode:
        yield f"decoding {decode.images} at once takes {decode.ms_per_image:.1f} ms per image"
        yield f"the plan of the decoder takes {size(decode.plan_bytes)} on disk more"


def _budget_cells(budget: BudgetResult, others: Sequence[str]) -> tuple[str, ...]:
    engine = budget.timings[ENGINE]
    return (
        _budget_name(budget),
        digits(engine.median_ms),
        _spread(engine),
        digits(budget.forward_passes_per_s),
        digits(budget.gflops_per_s),
        f"{budget.share_of_peak:.0%}",
        f"{budget.time_over_largest:.2f}",
        f"{budget.flops_over_largest:.2f}",
        *(f"{budget.speedups[name]:.2f}" for name in others),
    )


def _budget_name(budget: BudgetResult) -> str:
    return budget_text(budget.name, budget.budget)


def _spread(timing: Timing) -> str:
    return f"{digits(timing.low_ms)}-{digits(timing.high_ms)}"


def _db(sqnr_db: float | None) -> str:
    return "–" if sqnr_db is None else f"{sqnr_db:.1f}"


def _sampling_cells(sampling: SamplingResult) -> tuple[str, ...]:
    return (
        sampling.name,
        f"{sampling.ms_per_image:.1f}",
        f"{sampling.speedup:.2f}",
        f"{sampling.flops_per_image / 1e9:.3g}",
        f"{sampling.outside_engines:.1%}",
        f"{sampling.outside_ms_per_step:.2f}",
        f"{sampling.sqnr_db:.1f}",
    )


def sweep_tables(result: SweepResult) -> Iterator[Table]:
    """Tables of the samplings without a cache, and of the cached ones beside the controls at their time."""
    title = f"schedule {result.schedule}, guidance {result.guidance}, {result.images} images"
    columns = ("sampling", "calls", "reused", "probes", "ms/image", "time/calls", "speed-up", "dB")
    plain = [_sweep_cells(row) for row in result.rows if not row.control_db]
    cached = [_sweep_cells(row) for row in result.rows if row.control_db]
    yield table(title, columns, plain)
    yield table(
        f"cached, and what the controls have in the same engine time: {title}",
        (*columns, *(f"dB of {name}" for name in CONTROLS)),
        cached,
        [
            f"dB: against Heun at {result.fine_steps} steps; {NOT_QUALITY}",
            "time/calls is 1 where a run costs what its calls do",
            f"reuse takes {result.reuse_over_step:.1%} of a step, probe {result.probe_over_step:.1%}",
            *(f"the cheapest within {level} of 50 Euler steps: {name}" for level, name in result.best.items()),
        ],
    )


def _sweep_cells(row: SweepRow) -> tuple[str, ...]:
    controls = map(_db, row.control_db.values())
    return (
        row.name,
        str(row.computed),
        str(row.reused),
        str(row.probes),
        f"{row.ms_per_image:.1f}",
        f"{row.over_parts:.2f}",
        f"{row.speedup:.2f}",
        _db(row.sqnr_db),
        *controls,
    )


def backends_tables(result: BackendsResult) -> Iterator[Table]:
    """A row for each plan set, then each at each budget."""
    largest, *_ = next(iter(result.backends)).times
    yield table(
        f"plan sets that run here, by time at {largest}",
        ("plan set", "backend", f"ms at {largest}", "10-90 %", "plans", "memory", "dB to PyTorch"),
        [
            _backend_cells(row, largest)
            for row in sorted(result.backends, key=lambda row: row.times[largest].timing.median_ms)
        ],
        list(_backend_notes(result)),
    )
    yield table(
        f"one call of {result.rows} rows",
        ("plan set", "budget", "ms", "10-90 %", f"{result.baseline} / it", "GFLOP/s", "of peak", "time over FLOPs"),
        [_backend_time_cells(row, *named) for row in result.backends for named in row.times.items()],
    )


def _backend_cells(row: BackendRow, largest: str) -> tuple[str, ...]:
    timing = row.times[largest].timing
    return (
        row.name,
        row.backend,
        digits(timing.median_ms),
        _spread(timing),
        size(row.plan_bytes),
        "unknown" if row.held_bytes is None else size(row.held_bytes),
        "not compared"
        if row.parity_db is None
        else f"{row.parity_db:.0f}" + (" (accepted)" if row.accepted_miss else ""),
    )


def _backend_time_cells(row: BackendRow, name: str, time: BackendTime) -> tuple[str, ...]:
    return (
        row.name,
        budget_text(name, time.budget),
        digits(time.timing.median_ms),
        _spread(time.timing),
        f"{time.speedup:.2f}",
        digits(time.gflops_per_s),
        "" if time.share_of_peak is None else f"{time.share_of_peak:.0%}",
        f"{time.time_over_flops:.2f}",
    )


def _backend_notes(result: BackendsResult) -> Iterator[str]:
    yield from (f"{precision} matrix-product peak {peak:.0f} GFLOP/s" for precision, peak in result.peaks.items())
    yield from (
        f"{row.name} is below tolerance, accepted: {row.accepted_miss}" for row in result.backends if row.accepted_miss
    )
    yield from (f"{name} not measured: {reason}" for name, reason in result.skipped.items())


def soak_table(result: SoakResult) -> Table:
    """Memory over many samplings, in one row."""
    growth = result.growth_bytes_per_sampling
    return table(
        f"resident memory, the first {result.warmup} samplings left out",
        ("samplings", "seconds", "after warm-up", "at end", "growth, bytes per sampling"),
        [
            (
                str(result.samplings),
                f"{result.seconds:.1f}",
                *("unknown" if held is None else size(held) for held in (result.start_bytes, result.end_bytes)),
                "unknown" if growth is None else f"{growth:.1f}",
            )
        ],
    )


# ---------------------------------------------------------------- quality


def quality_table(result: QualityResult) -> Table:
    """A row per plan set, sampler config and budget; what real images reach is in the notes."""
    first = result.rows[0]
    columns = (
        "target",
        "precision",
        "sampling",
        "budget",
        "agreement",
        "change of agreement",
        "Fréchet",
        "change of Fréchet",
        "dB",
    )
    return table(
        f"{result.images} images, guidance {result.guidance}, as a classifier sees them",
        columns,
        [_quality_cells(row) for row in result.rows],
        [
            f"agreement: predicted class is the asked one (of real test images {result.real_agreement:.3f})",
            f"Fréchet: distance of {result.features} features to {result.real_images} real test images (one half of "
            f"these to the other {result.halves_floor.distance:.3g}, {result.floor.images} of them to the rest "
            f"{result.floor.distance:.3g} ± {result.floor.spread:.2g})",
            f"changes are to {first.way} at {first.name} in {first.precision} and paired, ± is one standard error",
            f"dB: samples against those of the same sampling at {first.name} in {first.precision}",
            *(f"not measured: {name}: {reason}" for name, reason in result.skipped.items()),
        ],
    )


def baselines_table(facts: EvaluatorFacts) -> Table:
    """The real-vs-real baseline, by how many images there are."""
    return table(
        f"{facts.test_images} test images, accuracy {facts.test_accuracy:.4f}",
        ("images", "Fréchet distance to the other test images", "± between draws"),
        [(str(baseline.images), f"{baseline.distance:.3f}", f"{baseline.spread:.3f}") for baseline in facts.floors],
        ["the last line compares two halves; evenly of all classes"],
    )


def _quality_cells(row: QualityRow) -> tuple[str, ...]:
    return (
        row.target,
        row.precision,
        row.way,
        budget_text(row.name, row.budget),
        _with_error(row.agreement, ".3f"),
        _with_error(row.agreement_change, "+.3f"),
        _with_error(row.frechet, ".2f"),
        _with_error(row.frechet_change, "+.2f"),
        _db(row.sqnr_db),
    )


def _with_error(estimate: Estimate, form: str) -> str:
    return f"{estimate.value:{form}} ± {estimate.error:{form.removeprefix('+')}}"


def samplers_table(title: str, errors: Sequence[SamplerError]) -> Table:
    """A row per sampler and step count."""
    rows = [(error.sampler, str(error.steps), str(error.calls), f"{error.sqnr_db:.1f}") for error in errors]
    return table(title, ("sampler", "steps", "calls", "dB to the reference"), rows, [NOT_QUALITY])


def memory_table(held: BankMemory | None, plan_bytes: int) -> Table:
    """Show the memory of all engines in one row."""
    cells = (size(held.whole_bytes), size(held.one_bytes), f"{held.ratio:.2f}") if held else ("unknown",) * 3
    columns = ("plans on disk", "all engines", "that of the largest budgets", "ratio")
    return table("resident memory of the engines", columns, [(size(plan_bytes), *cells)])

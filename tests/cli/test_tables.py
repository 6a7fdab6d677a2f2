"""What tables say, and that at any width all of it is there."""

from __future__ import annotations

import inspect as source
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.cells import cell_len
from rich.console import Console

from elit_export.bench.backends import BackendsResult
from elit_export.bench.cache import CONTROLS, SweepResult, SweepRow
from elit_export.bench.engines import ENGINE, BenchResult, DecodeResult, budget_results
from elit_export.bench.memory import BankMemory
from elit_export.bench.samplers import SamplerError
from elit_export.bench.soak import SoakResult
from elit_export.bench.timing import Timing
from elit_export.bench.whole_image import WholeImageResult
from elit_export.bundle.manifest import CacheCalibration, CacheFit
from elit_export.bundle.reading import Bundle
from elit_export.cli import main
from elit_export.cli.tables import bench, deployment, inspect, presets, tune, whole_image
from elit_export.cli.tables.bench import bench_tables, quality_table
from elit_export.cli.tables.layout import WHOLE, Table, blocks_of, digits, laid_out, table
from elit_export.cost.flops import flops
from elit_export.evaluate.paired import Estimate
from elit_export.evaluate.quality import QualityResult, QualityRow
from elit_export.evaluate.statistics import Baseline
from elit_export.report.inspection import bundle_facts, inspect_path
from elit_export.spec import Budget, Fit
from elit_export.tune.result import TuneResult
from elit_export.verify.compare import Comparison, verdict_of
from tests.cli.examples import LONG_NAME, example_of
from tests.helpers import a_preset, a_solver, tiny_spec

SPEC = tiny_spec()


def result_of(budgets: dict[str, Budget]) -> BenchResult:
    """Nothing sampled; the engine's times follow the FLOPs."""
    timed = {}
    for name, budget in budgets.items():
        engine_ms = flops(SPEC, budget).total / 1e6
        timed[name] = {name: Timing(factor * engine_ms, 0.0, 0.0, 1) for name, factor in ((ENGINE, 1), ("eager", 2))}
    results = list(budget_results(SPEC, budgets, timed, rows=2, text=0, peak=100.0))
    return BenchResult(
        rows=2,
        peak_gflops=100.0,
        budgets=results,
        switching=1.0,
        samplings=[],
        plan_bytes=4_000,
        bank_bytes=2_000_000,
        bank_memory_ratio=1.25,
        resident_bytes=3_000_000,
        decode=None,
    )


def lines_at(width: int, shown: Table) -> list[str]:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(laid_out(shown, width))
    return capture.get().splitlines()


def printed(shown: Table) -> str:
    return " ".join(" ".join(lines_at(200, shown)).split())


# ---------------------------------------------------------------- every table at every width


def bench_result() -> BenchResult:
    result = example_of(BenchResult)
    timed = [replace(budget, timings={ENGINE: example_of(Timing)}) for budget in result.budgets]
    return replace(result, budgets=timed)


def sweep_result() -> SweepResult:
    rows = [
        example_of(SweepRow, control_db={}),
        example_of(SweepRow, control_db=dict(zip(CONTROLS, (11.25, None, 12345.5), strict=True))),
    ]
    return example_of(SweepResult, rows=rows)


def calibration() -> CacheCalibration:
    fit = CacheFit(
        kept=None,
        fit=Fit((1.234567, -22.34567, 3345.678, -4.5e-05, 5.25), 0.01234, 12.345),
        pairs=123456,
        held_out_error=0.01234,
        r2=0.91,
        r2_same_steps=0.71,
        rank_same_steps=-0.5,
    )
    return CacheCalibration(
        checkpoint_sha256="0" * 64, fits=(fit,), images=64, steps=(10, 25), budgets=(4,), guidance=("cfg:2",), seed=0
    )


def preset_examples() -> list[dict[str, Any]]:
    """One with all there is, one that cannot be used, and one with as little as may be."""
    long = a_preset(schedule="0-9:quarter,10-19:full", cache="static:mask@10110111", target=LONG_NAME)
    bare = a_preset(steps=None, sampler="solver:8", guidance="none", guidance_interval=None)
    unmeasured = dict.fromkeys(("sqnr_db", "worst_sqnr_db", "evaluator", "distance", "distance_error"))
    bare = bare.model_copy(update={"measured": bare.measured.model_copy(update=unmeasured)})
    problems = ("", "preset 'fast' is of another checkpoint; make it again: elit-export tune bundle", "")
    examples = zip((long, a_preset(name="best"), bare), problems, strict=True)
    return [one.model_dump(mode="json") | {"problem": problem or None} for one, problem in examples]


RECIPE = Path(__file__).parents[2] / "engines" / "fashion.toml"
# Every function of `cli.tables` that makes tables; the others are shown through their commands.
EXAMPLES: dict[Callable[..., Any], Callable[[], Table | Iterable[Table]]] = {
    bench.cost_table: lambda: bench.cost_table(SPEC, 0),
    bench.bench_tables: lambda: bench.bench_tables(bench_result()),
    bench.sweep_tables: lambda: bench.sweep_tables(sweep_result()),
    bench.backends_tables: lambda: bench.backends_tables(example_of(BackendsResult)),
    bench.soak_table: lambda: bench.soak_table(example_of(SoakResult)),
    bench.quality_table: lambda: bench.quality_table(example_of(QualityResult)),
    bench.samplers_table: lambda: bench.samplers_table(LONG_NAME, [example_of(SamplerError)]),
    bench.memory_table: lambda: bench.memory_table(example_of(BankMemory), 123456),
    whole_image.whole_image_tables: lambda: whole_image.whole_image_tables(example_of(WholeImageResult)),
    inspect.calibration_table: lambda: inspect.calibration_table(calibration()),
    inspect.parity_tables: lambda: inspect.parity_tables([example_of(Comparison)]),
    inspect.file_tables: lambda: inspect.file_tables(inspect_path(str(RECIPE))),
    inspect.inspection_tables: lambda: inspect.inspection_tables(inspect_path("ELIT-SiT-XL/2")),
    deployment.deployment_tables: lambda: deployment.deployment_tables(inspect_path("ELIT-SiT-XL/2")),
    tune.tune_tables: lambda: tune.tune_tables(example_of(TuneResult)),
    presets.preset_tables: lambda: presets.preset_tables(preset_examples()),
    presets.solver_tables: lambda: presets.solver_tables(
        [{"name": "solver:2", **asdict(a_solver()), "problem": "of another checkpoint (a, not b)"}]
    ),
}
OTHERS = {"baselines_table", "plan_set_tables"}


def whole(shown: Table, width: int) -> None:
    """Hold that all of a table is there: cells that may not be broken as they are, of others every word."""
    lines = lines_at(width, shown)
    assert max(map(cell_len, lines)) <= width
    said = "\n".join(lines)
    assert "…" not in said
    for row in shown.rows:
        for column, cell in enumerate(row):
            parts = cell.split() if column < shown.keys or len(cell) > WHOLE else [cell]
            lost = [part for part in parts if len(part) < width / 3 and part not in said]
            assert not lost, f"{shown.title}: {lost} of {cell!r} at {width}"
    told = (shown.title, *shown.columns, *shown.notes)
    assert all(word in said for text in told for word in text.split() if len(word) < width / 2)


@pytest.mark.parametrize("width", [60, 80, 140])
@pytest.mark.parametrize("make", EXAMPLES.values(), ids=[function.__name__ for function in EXAMPLES])
def test_no_table_loses_a_digit_or_a_header(make: Callable[[], Any], width: int) -> None:
    made = make()
    for shown in [made] if isinstance(made, Table) else made:
        whole(shown, width)


def test_every_table_is_among_the_examples() -> None:
    makers = {
        function
        for module in (bench, deployment, inspect, presets, tune, whole_image)
        for name, function in source.getmembers(module, source.isfunction)
        if function.__module__ == module.__name__
        and not name.startswith("_")
        and "Table" in str(function.__annotations__.get("return"))
    }
    assert {function.__name__ for function in makers - set(EXAMPLES)} == OTHERS


def test_columns_that_do_not_fit_follow_beside_the_first_one() -> None:
    shown = table("t", ("name", *(f"column {n}" for n in range(6))), [("all", *(f"{n}.{'5' * 20}" for n in range(6)))])
    assert list(blocks_of(shown, 200)) == [(0, 1, 2, 3, 4, 5, 6)]
    assert list(blocks_of(shown, 60)) == [(0, 1, 2), (0, 3, 4), (0, 5, 6)]
    assert sum("all" in line for line in lines_at(60, shown)) == 3


def test_columns_that_name_a_row_together_stand_in_each_block() -> None:
    rows = [("profile full", point, "1" * 20, "2" * 20) for point in ("t 0.25", "t 0.5")]
    shown = table("t", ("part", "point", "max abs", "margin"), rows)
    assert shown.keys == 2
    assert list(blocks_of(shown, 140)) == [(0, 1, 2, 3)]
    assert list(blocks_of(shown, 60)) == [(0, 1, 2), (0, 1, 3)]
    assert list(blocks_of(shown, 30)) == [(0, 1), (0, 2), (0, 3)]  # where there is no room for both, numbers go first


@pytest.mark.parametrize(
    ("rows", "keys"),
    [
        ([("a", "x", "1")], 1),
        ([("a", "x", "1"), ("b", "x", "1")], 1),
        ([("a", "x", "1"), ("a", "y", "1")], 2),
        ([("a", "x", "1"), ("a", "x", "2")], 1),
        ([("a", "x", "1"), ("a", "x", "1")], 1),
        ([], 1),
    ],
)
def test_the_leading_columns_that_differ_are_the_keys(rows: list[tuple[str, ...]], keys: int) -> None:
    assert table("t", ("one", "two", "value"), rows).keys == keys


def test_quality_can_be_read_across_at_80_columns() -> None:
    shown = quality_table(quality_of())
    assert len(set(shown.columns)) == len(shown.columns)
    blocks = list(blocks_of(shown, 80))
    assert len(blocks) > 1
    assert all(block[:4] == (0, 1, 2, 3) for block in blocks)  # target, precision, sampling and budget


def test_notes_are_indented_and_end_where_their_text_does() -> None:
    notes = [line for line in lines_at(60, table("t", ("one",), [("1",)], ["word " * 20, "short"])) if "word" in line]
    assert len(notes) == 2
    assert lines_at(60, table("t", ("one",), [("1",)], ["short"]))[-1] == "  short"
    assert all(line.startswith("  word") and line == line.rstrip() for line in notes)


def test_a_word_that_is_wider_than_the_line_is_folded_and_not_cut() -> None:
    shown = table("t", ("fact", "value"), [("checkpoint_sha256", "0123456789abcdef" * 4)])
    said = "".join(part for line in lines_at(60, shown) for part in line.split("│")[2:3])
    assert "".join(said.split()) == "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("value", "count", "said"),
    [
        (0.6386, 2, "0.64"),
        (1.24, 2, "1.2"),
        (1234.4, 2, "1234"),
        (0.0, 2, "0"),
        (0.0123, 3, "0.0123"),
        (25.0, 3, "25.0"),
    ],
)
def test_digits_are_significant_ones(value: float, count: int, said: str) -> None:
    assert digits(value, count) == said


def numbers_of(facts: Any) -> Iterable[int]:
    """The whole numbers of some facts, which tables show as they are."""
    if isinstance(facts, Mapping | list):
        for value in facts.values() if isinstance(facts, Mapping) else facts:
            yield from numbers_of(value)
    elif isinstance(facts, int) and not isinstance(facts, bool):
        yield facts


@pytest.mark.parametrize("columns", ["60", "80"])
def test_a_command_shows_every_number_at_the_width_of_the_terminal(tiny_bundle: Bundle, columns: str) -> None:
    done = CliRunner().invoke(main, ["inspect", str(tiny_bundle.folder)], env={"COLUMNS": columns})
    shown_as_tables, _ = done.output.split("the same engines by trtexec")  # what follows is to be copied
    assert max(map(cell_len, shown_as_tables.splitlines())) <= int(columns)
    facts = bundle_facts(tiny_bundle)
    shown = {value for value in numbers_of({"spec": facts["spec"], "shapes": facts["shapes"]}) if value}
    assert all(str(value) in done.output.split() for value in shown)


def test_a_verdict_counts_and_names_the_worst_margin() -> None:
    good = example_of(Comparison, least_db=100.0, most_relative=1e9)
    near, below = (replace(good, found=replace(good.found, sqnr_db=db)) for db in (105.25, 90.0))
    assert verdict_of([good, near]) == "2 of 2 pass, worst margin +5.2 dB"
    accepted = replace(below, accepted="why", accepted_from_db=80.0)
    assert verdict_of([good, accepted]) == "2 of 2 pass, 1 of these below tolerance and accepted, worst margin -10.0 dB"
    assert verdict_of([good, replace(below, accepted="")]) == "1 of 2 pass, worst margin -10.0 dB"


# ---------------------------------------------------------------- what they say


def test_columns_say_what_times_are_relative_to() -> None:
    (full,) = bench_tables(result_of({"full": Budget(4, 4), "half": Budget(2, 4)}))
    assert {"time / full", "FLOPs / full", "eager / engine"} <= set(full.columns)
    (partial,) = bench_tables(result_of({"3of4": Budget(3, 4), "half": Budget(2, 4)}))
    headers = set(partial.columns)
    assert {"time / 3of4", "FLOPs / 3of4"} <= headers
    assert "time / full" not in headers


def test_the_notes_tell_the_memory_where_it_is_known() -> None:
    result = result_of({"full": Budget(4, 4)})
    (known,) = bench_tables(result)
    told = "the plans take 4 kB on disk all engines hold 2 MB, 1.25 of one the whole process holds 3 MB"
    assert told in printed(known)
    (unknown,) = bench_tables(replace(result, bank_bytes=None, bank_memory_ratio=None, resident_bytes=None))
    assert "hold" not in printed(unknown)
    assert "decod" not in printed(known)
    (decoding,) = bench_tables(replace(result, decode=DecodeResult(images=2, ms_per_image=12.34, plan_bytes=5_000)))
    assert "decoding 2 at once takes 12.3 ms per image the plan of the decoder takes 5 kB on disk" in printed(decoding)


def test_a_bench_names_each_budget_once_and_forward_passes_as_such() -> None:
    (shown,) = bench_tables(result_of({"full": Budget(4, 4), "3of4": Budget(3, 4)}))
    assert [row[0] for row in shown.rows] == ["full (4of4)", "3of4"]
    assert "forward passes/s" in shown.columns
    assert not any("image" in column or "SQNR" in column for column in shown.columns)


def test_distances_from_a_reference_are_not_told_as_quality() -> None:
    _, budgets, samplings = bench_tables(bench_result())
    for shown in (budgets, samplings):
        assert any(column.startswith("dB to the reference at") for column in shown.columns)
        assert any("for quality, elit-export evaluate" in note for note in shown.notes)


def test_parity_is_told_in_decibels_and_not_by_a_cosine_of_one() -> None:
    for shown in inspect.parity_tables([example_of(Comparison)]):
        assert "cosine" not in shown.columns


def quality_of(**changes: Any) -> QualityResult:
    row = QualityRow(
        target="cpu",
        precision="fp32",
        name="full",
        budget="4of4",
        way="ab3 14",
        calls=15,
        agreement=Estimate(0.75, 0.02),
        agreement_change=Estimate(0.0, 0.0),
        frechet=Estimate(20.0, 1.5),
        frechet_change=Estimate(0.0, 0.0),
        sqnr_db=None,
    )
    smaller = replace(row, name="half", budget="2of4", frechet_change=Estimate(-2.5, 0.25), sqnr_db=12.34)
    facts = {"images": 512, "guidance": "cfg:2", "seed": 0, "features": 48, "real_images": 10_000}
    facts |= {"real_agreement": 0.92, "halves_floor": Baseline(5000, 0.19, 0.03), "floor": Baseline(512, 1.02, 0.15)}
    return QualityResult(**{**facts, "rows": [row, smaller], "skipped": {}, **changes})  # type: ignore[arg-type]


def test_quality_is_told_with_errors_and_what_real_images_reach() -> None:
    said = printed(quality_table(quality_of()))
    assert "0.750 ± 0.020 │ +0.000 ± 0.000 │ 20.00 ± 1.50 │ +0.00 ± 0.00 │ – │" in said
    assert "-2.50 ± 0.25 │ 12.3 │" in said
    assert "real test images 0.920" in said
    assert "one half of these to the other 0.19, 512 of them to the rest 1.02 ± 0.15" in said
    assert "changes are to ab3 14 at full in fp32" in said
    assert "not measured" not in said


def test_plan_sets_that_cannot_run_are_told() -> None:
    said = printed(quality_table(quality_of(skipped={"rtx fp8": "no GPU"})))
    assert "not measured: rtx fp8: no GPU" in said

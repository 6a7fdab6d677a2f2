"""calibrate solver: few calls whose times and weights are fitted to the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from elit_export.bundle.atomic import sha256_of
from elit_export.cli.common import (
    FOLDER,
    JSON_OPTION,
    OUTPUT,
    TRUST_OPTION,
    Count,
    progress_bar,
    say,
    show,
    write_json,
)
from elit_export.cli.opened import Opened, opened_once
from elit_export.cli.prompts import EMBEDDED, prompts_in
from elit_export.errors import InputError
from elit_export.runtime.options import SamplingOptions
from elit_export.spec import limits

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from elit_export.calibrate.flow import Method
    from elit_export.calibrate.solver import References, SolverConfig, TableFit
    from elit_export.calibrate.solver_budgets import Pattern, Screened
    from elit_export.calibrate.solver_state import State
    from elit_export.spec import SolverError, SolverFacts


def _numbers(_ctx: click.Context, _param: click.Parameter, text: str) -> tuple[int, ...]:
    calls = [limits.STEPS.whole(each.strip(), "--calls") for each in text.split(",") if each.strip().isdecimal()]
    if len(calls) != len(text.split(",")):
        raise InputError(f"--calls {text!r}: give numbers, e.g. 6,8,10")
    return tuple(dict.fromkeys(calls))


@click.command()
@click.argument("bundle", type=FOLDER)
@click.option("--calls", default="6,8,10", show_default=True, callback=_numbers, help="Of each table.")
@click.option("--guidance", default="cfg:2", show_default=True, help="What the tables are for.")
@click.option("--guidance-interval", type=(float, float), metavar="LOW HIGH", help="The t that are guided.")
@click.option("--schedule", "budget", default="full", show_default=True, help="A budget, that of every call.")
@click.option(
    "--budgets",
    type=click.Choice(["one", "auto"]),
    default="one",
    show_default=True,
    help="auto: search cheaper calls, and more of them, in the time of so many full ones.",
)
@click.option("--images", type=Count(limits.TRAJECTORIES), default=64, show_default=True, help="To fit to, 32 or more.")
@click.option("--seed", default=SamplingOptions.seed, show_default=True, help="Seeds seed to seed + 2 are used.")
@click.option("--rows", type=Count(limits.ROWS), help="At most so many images at once.")
@click.option("--restart", is_flag=True, help="Begin again where an earlier run was interrupted.")
@click.option("--plot", type=OUTPUT, help="Draw error against calls, beside samplers that are not calibrated.")
@click.option("--target", help="Needed if the bundle has several.")
@click.option("--precision", help="Needed if the target has several.")
@EMBEDDED
@TRUST_OPTION
@JSON_OPTION
def solver(
    bundle: Path,
    calls: tuple[int, ...],
    budgets: str,
    restart: bool,
    plot: Path | None,
    target: str | None,
    precision: str | None,
    trust: bool,
    json_to: str | None,
    file: Path | None,
    **options: Any,
) -> None:
    """Fit tables of few calls to the model, for `--sampler solver`, and store those that beat ab3."""
    from elit_export.bundle.store import check_recordable
    from elit_export.calibrate.solver import References, SolverConfig, beats_all, best_of_each_name, record
    from elit_export.calibrate.solver_budgets import check_searched
    from elit_export.calibrate.solver_state import discard
    from elit_export.cli.tables.calibration import solver_facts, solvers_tables

    if plot is not None:  # before anything is measured, as it needs matplotlib
        from elit_export.report.plots import check_format, plot_solvers

        check_format(plot)
    config = SolverConfig(calls, interval=options.pop("guidance_interval"), **options)
    opened = opened_once(bundle, target, precision, trust=trust)
    with opened.pipeline as pipeline, progress_bar() as bar:
        config = replace(config, prompts=prompts_in(file, pipeline.spec))
        if budgets == "auto":
            check_searched(config, pipeline.spec)
        check_recordable(opened.bundle.folder)
        stage = bar.add_task("reference", total=None)
        references = References(pipeline, config, lambda what: bar.update(stage, description=what))
        state = _state(opened, config, sha256_of(file) if file else "", restart=restart)
        patterns = _patterns(references, state) if budgets == "auto" else {}
        methods = [(fit, _calibrated(fit, state, bar)) for fit in _fits(references)]
        mixed = _mixed(references, patterns, state, bar)
        compared = _compared(references, bar)
        solvers = _all_made(methods, mixed, compared, opened)
    stored = best_of_each_name([facts for facts in solvers if beats_all(facts)])
    if stored:
        record(opened.bundle, stored)
    discard(opened.bundle.folder)
    if plot is not None:
        plot_solvers([facts.error for facts in solvers if not facts.table.budgets], compared, plot)
    show(*solvers_tables(solvers, compared, mixed.screened), json_to=json_to)
    write_json(solver_facts(solvers, compared, mixed.screened), json_to)
    for facts in solvers:
        if facts not in stored:
            rivals = " and ".join(error.sampler for error in facts.compared[:-1])
            say(f"{facts.name} is not stored: it must beat {rivals} in as much time", json_to=json_to)
    if stored:
        say(_next(bundle, opened, stored), json_to=json_to)


def _state(opened: Opened, config: SolverConfig, prompts: str, *, restart: bool) -> State:
    """What an earlier run reached, if it was of the same calibration."""
    from elit_export.calibrate.solver_state import State, discard

    if restart:
        discard(opened.bundle.folder)
    identity = {name: value for name, value in vars(config).items() if name not in ("calls", "rows", "prompts")}
    plan_set = opened.plan_set
    identity |= {"target": plan_set.target, "precision": plan_set.precision.value, "prompts": prompts}
    return State(opened.bundle.folder, identity | {"checkpoint": opened.bundle.manifest.model.checkpoint_sha256})


def _fits(references: References) -> Iterator[TableFit]:
    from elit_export.calibrate.solver import TableFit

    yield from (TableFit(references, calls) for calls in references.config.calls)


def _calibrated(fit: TableFit, state: State, bar: Bar) -> Method:
    """Fit one table, from where an earlier run was interrupted; every iteration is kept at once."""
    from elit_export.calibrate.solver import MOST_ITERATIONS

    what = f"{fit.calls} calls{' of several budgets' if fit.budgets.strong else ''}"
    task = bar.add_task(f"{what}: start", total=MOST_ITERATIONS)
    progress = state.progress(fit) or fit.start()
    state.note(fit, progress)
    for reached in fit.iterations(progress):
        state.note(fit, progress := reached)
        bar.update(task, completed=progress.iterations, description=f"{what}: {progress.best_db:.1f} dB")
    bar.update(task, completed=MOST_ITERATIONS)
    return progress.best


def _compared(references: References, bar: Bar) -> list[SolverError]:
    from elit_export.calibrate.solver import FIXED

    calls = references.config.calls
    measured = references.fixed_errors(calls)
    return list(bar.track(measured, total=len(FIXED) * len(calls) + 1, description="other samplers"))


@dataclass(frozen=True)
class Mixed:
    """The patterns of budgets that were tried in the time of so many full calls, and the best of each time, fitted."""

    screened: dict[int, list[Screened]] = field(default_factory=dict)
    methods: dict[int, tuple[TableFit, Method]] = field(default_factory=dict)


def _patterns(references: References, state: State) -> dict[int, list[Pattern]]:
    """The patterns of budgets to try in the time of each number of full calls; all of them can run."""
    from elit_export.calibrate.solver_budgets import measured_cost, patterns_of, used_pairs

    return patterns_of(references, state.cost(lambda: measured_cost(references), used_pairs(references)))


def _mixed(references: References, patterns: dict[int, list[Pattern]], state: State, bar: Bar) -> Mixed:
    """Screen patterns of budgets in the time of each number of full calls, and fit the best one."""
    mixed = Mixed()
    for calls, each in patterns.items():
        tried = (_screened(references, pattern, state) for pattern in each)
        found = list(bar.track(tried, total=len(each), description=f"budgets in the time of {calls} calls"))
        mixed.screened[calls] = found
        if found:
            best = max(found, key=lambda each: each.progress.best_db)
            mixed.methods[calls] = best.fit, _calibrated(best.fit, state, bar)
    return mixed


def _screened(references: References, pattern: Pattern, state: State) -> Screened:
    from elit_export.calibrate.least_squares import FEW_SHAPES
    from elit_export.calibrate.solver import TableFit
    from elit_export.calibrate.solver_budgets import Screened

    fit = TableFit(references, pattern.calls, pattern.budgets)
    progress = state.progress(fit) or fit.start(FEW_SHAPES)
    state.note(fit, progress)
    return Screened(pattern, fit, progress)


def _all_made(
    methods: list[tuple[TableFit, Method]], mixed: Mixed, compared: list[SolverError], opened: Opened
) -> list[SolverFacts]:
    """Beside a table stand `ab3` with as many calls, and Euler's 50 steps; beside a mixed one the full table too."""
    from elit_export.calibrate.solver import made

    full, of_ab3 = {}, [each for each in compared if each.sampler == "ab3"]
    for fit, method in methods:
        ab3 = max((each for each in of_ab3 if each.calls <= fit.calls), key=lambda each: each.calls)
        full[fit.calls] = made(fit, method, (ab3, compared[-1]), opened.bundle, opened.plan_set)
    others = [
        made(fit, method, (full[calls].error, *full[calls].compared), opened.bundle, opened.plan_set)
        for calls, (fit, method) in mixed.methods.items()
    ]
    return [*full.values(), *others]


def _next(bundle: Path, opened: Opened, stored: list[SolverFacts]) -> str:
    from elit_export.cli.advice import sample_command

    best = max(stored, key=lambda facts: facts.error.pooled_db)
    more = ["--sampler", best.name, "--guidance", best.guidance]
    if best.guidance_interval:
        more += ["--guidance-interval", *(f"{t:g}" for t in best.guidance_interval)]
    if best.schedule != "full":
        more += ["--schedule", best.schedule]
    advice = sample_command(bundle, opened.bundle.manifest, opened.plan_set, *more)
    return f"wrote {', '.join(facts.name for facts in stored)} into {bundle}; next: {advice}"

"""Solver tables: multistep methods whose times and weights were fitted to a model (`calibrate/solver.py`).

A step is x_{i+1} = x_i + Σ_{j ≤ i} w_ij·v_j: one evaluation, and all velocities before it again.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from elit_export.arrays import Float64
from elit_export.errors import InputError
from elit_export.runtime.guidance import Guidance, Kind
from elit_export.runtime.samplers.base import Noise, Sampler, Velocity
from elit_export.runtime.schedule import ScheduleLike, resolve_schedule
from elit_export.spec import Budget, ModelSpec, SolverFacts, SolverTable
from elit_export.spec.solver import MAX_CALLS, MIN_CALLS, MIXED

Solvers = Sequence[SolverFacts]
NAME = "solver"
NO_SOLVERS = "this bundle has no solver tables"
NO_ORDER = 0  # a table holds for one number of steps, so there is no rate at which its error falls


def run(table: SolverTable, velocity: Velocity, x: Float64, times: Float64, _noise: Noise) -> Iterator[Float64]:
    history: list[Float64] = []
    for step, weights in enumerate(table.weights):
        history.append(velocity(x, times[step], step, 0))
        x = x + sum(weight * v for weight, v in zip(weights, history, strict=True) if weight)
        yield x


def table_times(table: SolverTable, steps: int) -> Float64:
    assert steps == table.calls
    return np.array(table.times, np.float64)


def solver_of(table: SolverTable) -> Sampler:
    """Return the sampler of a table; it has as many steps as the table has calls."""
    calls = table.calls
    return Sampler(table.name, partial(run, table), NO_ORDER, min_steps=calls, times=partial(table_times, table))


# ---------------------------------------------------------------- which table a sampling takes


def is_solver(sampler: str) -> bool:
    return sampler.partition(":")[0] == NAME


@dataclass(frozen=True)
class Place:
    """What a table is calibrated for: a guidance, and one budget for all calls; None if a schedule has several."""

    guidance: Guidance
    budget: Budget | None

    @classmethod
    def of(cls, guidance: Guidance, schedule: ScheduleLike, spec: ModelSpec) -> Place:
        try:
            return cls(guidance, spec.budget(schedule) if isinstance(schedule, str | int | Budget) else None)
        except InputError:  # a schedule of several budgets, which is checked where it is read
            return cls(guidance, None)

    def holds(self, facts: SolverFacts, spec: ModelSpec) -> bool:
        """Whether a table was calibrated for this; one that names its budgets has no other."""
        return is_for(facts, self.guidance) and (
            facts.table.budgets is not None or self.budget == spec.budget(facts.schedule)
        )

    def __str__(self) -> str:
        guidance, budget = self.guidance, self.budget or "several"
        interval = (guidance.low, guidance.high)
        limited = f" at t in {list(interval)}" if guidance.guides and interval != (0.0, 1.0) else ""
        return f"guidance {guidance}{limited}, budget {budget}"

    @property
    def options(self) -> str:
        """How a calibration for it is typed."""
        low, high = self.guidance.low, self.guidance.high
        limited = f" --guidance-interval {low:g} {high:g}" if (low, high) != (0.0, 1.0) else ""
        is_smaller = self.budget is not None and self.budget.kept < self.budget.of
        budget = f" --schedule {self.budget.kept}" if self.budget and is_smaller else ""
        return f"--guidance {self.guidance}{limited}{budget}"


def selected_solver(
    solvers: Solvers, sampler: str, steps: int | None, place: Place, spec: ModelSpec, missing: str
) -> SolverFacts:
    """Return the table of `solver:CALLS`, or of `solver` that of `steps` calls, or without steps of the most calls.

    One whose calls have budgets of their own is `solver:CALLS,mixed`. Of several it takes one for the guidance and
    budget asked for. Raises InputError if there is none, and `missing` says why a bundle has none at all; warns if it
    was calibrated for something else.
    """
    calls, is_mixed = _calls_of(sampler, steps), sampler.endswith(MIXED)
    if not solvers:
        raise InputError(f"sampler {sampler}: {missing}", remedy(sampler, calls, place))
    own = [facts for facts in solvers if bool(facts.table.budgets) == is_mixed]
    fitting = [facts for facts in own if facts.table.calls == calls or calls is None]
    if not fitting:
        has = ", ".join(dict.fromkeys(facts.name for facts in solvers))
        raise InputError(f"sampler {sampler}: there is no such table; there are {has}", remedy(sampler, calls, place))
    best = max(fitting, key=lambda facts: (place.holds(facts, spec), facts.table.calls))
    if not place.holds(best, spec):
        what = f"{best.name} was calibrated for {_place_of(best, spec)}, and is used with {place}"
        warnings.warn(f"{what}: {remedy(best.name, best.table.calls, place)}", UserWarning, stacklevel=2)
    return best


def _place_of(facts: SolverFacts, spec: ModelSpec) -> Place:
    guidance = Guidance.parse(facts.guidance, spec, interval=facts.guidance_interval or (0.0, 1.0))
    return Place.of(guidance, facts.schedule, spec)


def remedy(sampler: str, calls: int | None, place: Place) -> str:
    asked = " --budgets auto" if sampler.endswith(MIXED) else f" --calls {calls}" if calls else ""
    return f"elit-export calibrate solver BUNDLE{asked} {place.options}"


def _calls_of(sampler: str, steps: int | None) -> int | None:
    _, colon, number = sampler.removesuffix(MIXED).partition(":")
    if not colon:
        return steps
    if not (number.isdecimal() and number.isascii() and len(number) < 6):
        raise InputError(f"sampler {sampler!r} is not solver:CALLS or solver:CALLS,mixed, e.g. solver:8")
    if not MIN_CALLS <= int(number) <= MAX_CALLS:
        raise InputError(f"sampler {sampler}: tables have {MIN_CALLS} to {MAX_CALLS} calls", "choose another number")
    if steps not in (None, int(number)):
        raise InputError(f"sampler {sampler} has {int(number)} steps, not {steps}", "leave steps out")
    return int(number)


def is_for(facts: SolverFacts, guidance: Guidance) -> bool:
    """Whether a table was calibrated for this guidance."""
    interval = facts.guidance_interval or (0.0, 1.0)
    return facts.guidance == str(guidance) and (not guidance.guides or interval == (guidance.low, guidance.high))


def budgets_per_step(
    table: SolverTable | None, schedule: ScheduleLike, guidance: Guidance, times: Float64, spec: ModelSpec
) -> tuple[tuple[Budget, ...], tuple[Budget, ...] | None]:
    """Return the budget of each step, and that of its weak branch if a table names it; raises InputError."""
    if table is None or table.budgets is None:
        return resolve_schedule(schedule, [float(t) for t in times], spec), None
    if schedule != "full":
        raise InputError(f"{table.name} names the budget of each of its calls", "leave the schedule out")
    budgets = tuple(spec.budget(kept) for kept in table.budgets)
    if table.weak_budgets is None or not guidance.guides:
        return budgets, None
    if guidance.kind is not Kind.CFG:
        raise InputError(f"{table.name} names the weak budget of each of its calls", "choose guidance cfg:SCALE")
    return budgets, tuple(spec.budget(kept) for kept in table.weak_budgets)

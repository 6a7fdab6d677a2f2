"""Solver tables as samplers: what a table says is computed, which table a sampling takes, and what is refused."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import numpy as np
import pytest

from elit_export.errors import InputError
from elit_export.runtime.options import SamplingOptions, resolve
from elit_export.runtime.samplers.adams_bashforth import AB2, step_weights
from elit_export.runtime.samplers.calibrated import solver_of
from elit_export.spec import Precision, SolverError, SolverFacts, SolverTable
from tests.helpers import tiny_spec

SPEC = tiny_spec()
NOT_GUIDED = "none"


def ab2_table(steps: int) -> SolverTable:
    """Adams–Bashforth of order 2 on a warped grid, written as a table."""
    times = np.linspace(1, 0, steps + 1) ** 1.5
    rows = []
    for step, weights in enumerate(step_weights(times, order=2)):
        row = np.zeros(step + 1)
        row[step - np.arange(len(weights))] = weights
        rows.append(tuple(row.tolist()))
    return SolverTable(tuple(times.tolist()), tuple(rows))


def facts_of(table: SolverTable, guidance: str = NOT_GUIDED, **changed: Any) -> SolverFacts:
    error = SolverError(sampler="solver", steps=table.calls, calls=table.calls, median_db=1, pooled_db=1, worst_db=1)
    facts = SolverFacts(
        checkpoint_sha256="0" * 64,
        table=table,
        guidance=guidance,
        guidance_interval=None,
        schedule="full",
        target="cpu",
        precision=Precision.FP32,
        images=64,
        held_out_images=32,
        seed=1,
        error=error,
        compared=(error,),
    )
    return dataclasses.replace(facts, **changed)


SOLVERS = (facts_of(ab2_table(4)), facts_of(ab2_table(6)), facts_of(ab2_table(6), "cfg:2"))


def resolved(solvers: tuple[SolverFacts, ...] = SOLVERS, **options: Any) -> Any:
    return resolve(SPEC, SamplingOptions(**options), solvers)


def test_a_table_of_ab2_samples_as_ab2() -> None:
    def velocity(x: np.ndarray, t: float, _step: int, _stage: int) -> np.ndarray:
        return np.sin(3 * t) - x * (1 + t)

    def no_noise() -> np.ndarray:
        raise AssertionError

    table, start = ab2_table(7), np.linspace(-1, 1, 5)
    sampler = solver_of(table)
    times = sampler.times(7)
    expected = list(AB2.run(velocity, start, times, no_noise))
    found = list(sampler.run(velocity, start, times, no_noise))
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert (sampler.name, sampler.calls(7)) == ("solver:7", 7)


@pytest.mark.parametrize(
    ("options", "calls", "guidance"),
    [
        ({"sampler": "solver:4"}, 4, "none"),
        ({"sampler": "solver:6"}, 6, "none"),
        ({"sampler": "solver:6", "steps": 6}, 6, "none"),
        ({"sampler": "solver", "steps": 4}, 4, "none"),
        ({"sampler": "solver"}, 6, "none"),
        ({"sampler": "solver", "guidance": "cfg:2"}, 6, "cfg:2"),
    ],
)
def test_which_table_a_sampling_takes(options: dict[str, Any], calls: int, guidance: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = resolved(**options)
    assert (found.sampler.name, len(found.schedule)) == (f"solver:{calls}", calls)
    assert str(found.guidance) == guidance
    assert found.times.tolist() == list(ab2_table(calls).times)


def test_without_a_table_there_are_fourteen_steps() -> None:
    assert len(resolved(sampler="euler").schedule) == 14


def test_other_guidance_than_the_tables_warns() -> None:
    with pytest.warns(
        UserWarning, match=r"solver:4 was calibrated for guidance none.*cfg:3.*calibrate solver .* --guidance cfg:3$"
    ):
        resolved(sampler="solver:4", guidance="cfg:3")
    with pytest.warns(
        UserWarning,
        match=r"used with guidance cfg:2 at t in \[0.2, 0.8\].* --guidance-interval 0.2 0.8$",
    ):
        resolved(SOLVERS[2:], sampler="solver:6", guidance="cfg:2", guidance_interval=(0.2, 0.8))


def test_another_budget_than_the_tables_warns_too() -> None:
    half = facts_of(ab2_table(4), schedule="half")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolved((SOLVERS[0], half), sampler="solver:4", schedule="half").schedule[0].kept == 2
        assert resolved((half, SOLVERS[0]), sampler="solver:4").schedule[0].kept == 4
    with pytest.warns(UserWarning, match=r"budget 2of4, and is used with .*budget 4of4: .*--calls 4 --guidance none$"):
        resolved((half,), sampler="solver:4")
    with pytest.warns(UserWarning, match=r"used with guidance none, budget several"):
        resolved((half,), sampler="solver:4", schedule="0-1:half,2-3:full")


@pytest.mark.parametrize(
    ("solvers", "options", "problem", "remedy"),
    [
        ((), {"sampler": "solver:8"}, "has no solver tables", "calibrate solver BUNDLE --calls 8 --guidance none"),
        (SOLVERS, {"sampler": "solver:8"}, "no such table; there are solver:4, solver:6", "--calls 8"),
        (SOLVERS, {"sampler": "solver", "steps": 5}, "there is no such table", "--calls 5"),
        (SOLVERS, {"sampler": "solver:6", "steps": 4}, "has 6 steps, not 4", "leave steps out"),
        (SOLVERS, {"sampler": "solver:x"}, "is not solver:CALLS", ""),
        (SOLVERS, {"sampler": "solver:1"}, "tables have 2 to 32 calls", "choose another number"),
        (SOLVERS, {"sampler": "solver:4", "time_grid": "shift:2"}, "has times of its own", "leave time_grid out"),
    ],
)
def test_what_cannot_be_is_refused(
    solvers: tuple[SolverFacts, ...], options: dict[str, Any], problem: str, remedy: str
) -> None:
    with pytest.raises(InputError) as refused:
        resolved(solvers, **options)
    assert problem in refused.value.problem
    assert remedy in refused.value.remedy


# ---------------------------------------------------------------- budgets per call


def with_budgets(weak: tuple[int, ...] | None = (1, 1, 4, 1)) -> tuple[SolverFacts, ...]:
    table = dataclasses.replace(ab2_table(4), budgets=(2, 4, 4, 4), weak_budgets=weak)
    return (facts_of(table, "cfg:2"),)


def test_a_table_names_the_budgets_of_its_calls() -> None:
    found = resolved(with_budgets(), sampler="solver:4,mixed", guidance="cfg:2")
    assert [budget.kept for budget in found.schedule] == [2, 4, 4, 4]
    calls = [[(branch.role, branch.budget.kept) for branch in batch] for batch in found.batches()]
    strong, weak = [("strong", 4)], [("weak", 1)]
    assert calls == [[("strong", 2)], weak, strong, weak, [("strong", 4), ("weak", 4)], strong, weak]


def test_tables_with_budgets_have_a_name_of_their_own() -> None:
    both = (*with_budgets(), facts_of(ab2_table(4), "cfg:2"))
    assert [facts.name for facts in both] == ["solver:4,mixed", "solver:4"]
    assert resolved(both, sampler="solver:4", guidance="cfg:2").weak is None
    assert resolved(both, sampler="solver:4,mixed", guidance="cfg:2").weak is not None
    with pytest.raises(InputError, match=r"there are solver:4,mixed; .*calibrate solver BUNDLE --calls 4"):
        resolved(with_budgets(), sampler="solver:4", guidance="cfg:2")
    with pytest.raises(InputError, match=r"there are solver:4; .*--budgets auto"):
        resolved(both[1:], sampler="solver:4,mixed", guidance="cfg:2")


def test_without_weak_budgets_both_branches_have_that_of_the_step() -> None:
    found = resolved(with_budgets(weak=None), sampler="solver:4,mixed", guidance="cfg:2")
    assert [{branch.budget.kept for branch in batch} for batch in found.batches()] == [{2}, {4}, {4}, {4}]


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"guidance": "cfg:2", "schedule": "2"}, "leave the schedule out"),
        ({"guidance": "ccfg:2@1"}, "choose guidance cfg:SCALE"),
    ],
)
@pytest.mark.filterwarnings("ignore:solver")
def test_budgets_are_named_once(options: dict[str, Any], remedy: str) -> None:
    with pytest.raises(InputError) as refused:
        resolved(with_budgets(), sampler="solver:4,mixed", **options)
    assert refused.value.remedy == remedy


# ---------------------------------------------------------------- tables


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"times": (1.0, 0.0), "weights": ((-1.0,),)}, "2 to 32 calls, not 1"),
        ({"times": (1.0, 0.5, 0.5, 0.2, 0.0)}, "must fall from 1 to 0"),
        ({"times": (1.0, 0.5, 0.7, 0.2, 0.0)}, "must fall from 1 to 0"),
        ({"times": (0.9, 0.7, 0.5, 0.2, 0.0)}, "must fall from 1 to 0"),
        ({"times": (1.0, float("nan"), 0.5, 0.2, 0.0)}, "must fall from 1 to 0"),
        ({"weights": ab2_table(4).weights[:3]}, "row i of a solver table's weights"),
        ({"weights": (*ab2_table(4).weights[:3], (1.0, 2.0, float("nan"), 0.0))}, "must be finite"),
        ({"budgets": (4, 4)}, "budgets of a solver table"),
        ({"weak_budgets": (4, 4, 0, 4)}, "weak_budgets of a solver table"),
    ],
)
def test_a_damaged_table_is_none(changed: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError) as refused:
        dataclasses.replace(ab2_table(4), **changed)
    assert problem in refused.value.problem

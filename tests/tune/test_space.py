"""Choices of a trial as sampling configs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from elit_export.bundle.reading import Bundle
from elit_export.runtime.opening import unopened
from elit_export.runtime.request import Unopened, prepared
from elit_export.spec import SolverFacts, SolverTable
from elit_export.tune.space import CACHES, Config, Space, cache_text, sampling_options, schedule_text, space_of
from tests.helpers import a_solver


@pytest.fixture
def on(tiny_bundle: Bundle) -> Unopened:
    return unopened(tiny_bundle, tiny_bundle.manifest.plan_sets[0])


@pytest.fixture
def space(on: Unopened) -> Space:
    return space_of({"cpu fp32": on}, "cfg:2")


class Random:
    """Chooses at random."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def suggest_categorical(self, name: str, choices: Sequence[Any], /) -> Any:
        return choices[self._rng.integers(len(choices))]

    def suggest_int(self, name: str, low: int, high: int, /) -> int:
        return int(self._rng.integers(low, high + 1))


def test_the_space_is_that_of_the_model_and_the_guidance(space: Space, on: Unopened) -> None:
    assert space.budgets[0] == "full"
    assert space.weak == tuple(f"ccfg:2@{on.spec.budget(name).kept}" for name in space.budgets[1:])
    assert space.caches == CACHES
    assert "euler-maruyama" not in space.samplers
    assert {"euler", "heun", "ab2", "ab3", "abm3"} <= set(space.samplers)
    unguided = space_of({"cpu fp32": on}, "none")
    assert unguided.weak == ()
    without = replace(on, coverage=replace(on.coverage, graphs=frozenset()))
    assert space_of({"a": on, "b": without}, "none").caches == ()


@pytest.mark.parametrize("any_budget", [False, True])
def test_every_choice_can_be_sampled_and_is_read_back(space: Space, on: Unopened, any_budget: bool) -> None:
    keeps = set()
    intervals = set()
    for seed in range(60):
        config = space.choose(Random(seed), any_budget=any_budget)
        prepared(on, [0], sampling_options(config.options))
        assert Config.of_key(config.key) == config
        keeps.add(space.keeps_solution(config))
        intervals.add(config.options.guidance_interval)
    assert (False in keeps) == any_budget
    assert ({(0.0, 0.9), (0.0, 0.75), None} <= intervals) == any_budget


def test_first_choices_are_choices(space: Space, on: Unopened) -> None:
    class Fixed:
        def __init__(self, choices: dict[str, Any]) -> None:
            self._choices = choices

        def suggest_categorical(self, name: str, choices: Sequence[Any], /) -> Any:
            assert self._choices[name] in choices
            return self._choices[name]

        def suggest_int(self, name: str, low: int, high: int, /) -> int:
            assert low <= self._choices[name] <= high
            return int(self._choices[name])

    for any_budget in (False, True):
        for choices in space.first_choices(any_budget=any_budget):
            prepared(on, [0], sampling_options(space.choose(Fixed(choices), any_budget=any_budget).options))


def test_controls_change_one_thing_alone(space: Space, on: Unopened) -> None:
    assert {control.family for control in space.controls()} == {
        *("euler", "ab3", "abm3"),
        *("smaller budget alone", "cache alone"),
    }
    for control in space.controls():
        prepared(on, [0], sampling_options(control.config.options))
        options = control.config.options
        changes = (options.schedule != "full", options.cache != "none", options.steps != 50)
        assert sum(changes) <= 1 or options.sampler in ("ab3", "abm3")


def test_texts_of_schedules_and_caches() -> None:
    assert schedule_text("half", "full", "25") == "0%-25%:half,25%-100%:full"
    assert schedule_text("half", "half", "25") == "half"
    assert cache_text(CACHES[0], 8) == "static:every@2"
    assert cache_text(CACHES[1], 8) == "static:every@3"
    assert cache_text(CACHES[2], 8) == "static:mask@11111011"
    assert cache_text(CACHES[3], 8) == "static:mask@10101111"
    assert cache_text(CACHES[2], 2) == "none"


def solver_facts(calls: int, guidance: str, budgets: tuple[int, ...] | None = None) -> SolverFacts:
    """A table with the weights of Euler's method."""
    times = tuple(1 - step / calls for step in range(calls + 1))
    weights = tuple((0.0,) * step + (-1 / calls,) for step in range(calls))
    return a_solver(guidance=guidance, table=SolverTable(times=times, weights=weights, budgets=budgets))


def test_solver_tables_for_the_guidance_are_choices(on: Unopened) -> None:
    at_half = replace(solver_facts(5, "cfg:2"), schedule="half")
    solvers = (solver_facts(3, "cfg:2"), solver_facts(4, "none"), solver_facts(3, "cfg:2", (1, 2, 4)), at_half)
    with_tables = replace(on, coverage=replace(on.coverage, solvers=solvers))
    found = space_of({"cpu fp32": with_tables}, "cfg:2")
    (plain, mixed) = (solvers[0].name, solvers[2].name)
    assert (found.tables, found.budget_tables) == ((plain,), (mixed,))
    sampled = {found.choose(Random(seed), any_budget=True) for seed in range(150)}
    of_tables = [config for config in sampled if config.options.steps is None]
    assert {config.options.sampler for config in of_tables} == {plain, mixed}
    for config in of_tables:  # none warns that the table is of another guidance or budget
        prepared(with_tables, [0], sampling_options(config.options))
        assert (config.options.guidance, config.options.guidance_interval) == ("cfg:2", None)
    assert not any(found.keeps_solution(config) for config in of_tables if config.options.sampler == mixed)
    assert found.keeps_solution(found.config("cpu fp32", plain, None))
    assert mixed not in {found.choose(Random(seed), any_budget=False).options.sampler for seed in range(60)}

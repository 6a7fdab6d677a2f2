"""The sampling configs that a search may try: as values, as choices of a trial, and as the controls beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Protocol, Self

from elit_export.bench.engines import measured_budgets
from elit_export.bundle.presets import PresetOptions
from elit_export.runtime.guidance import Guidance, Kind
from elit_export.runtime.options import SamplingOptions
from elit_export.runtime.request import Samplable
from elit_export.runtime.samplers import SAMPLERS, sampler_named
from elit_export.runtime.samplers.calibrated import Place, is_solver
from elit_export.spec import REUSE, ModelSpec, SolverFacts

MIN_CALLS, MAX_CALLS = 1, 50
BASELINE_STEPS = 50  # of Euler, at the largest budget: what a speed-up is relative to
NO_CACHE = "none"
CACHES = ("every 2nd", "every 3rd", "2nd half: every 2nd", "1st half: every 2nd")
SHARES = ("25", "50", "75")  # per cent of the steps before the budget changes
LOWS = ("0", "0.1", "0.2", "0.3", "0.4")  # of the interval that is guided
HIGHS = ("1", "0.9", "0.75")
FEWER_STEPS, SMALLER_BUDGET, CACHE = "euler", "smaller budget alone", "cache alone"  # families of controls
MULTISTEP = ("ab3", "abm3")  # and the samplers of others
EULER_STEPS = (1, 2, 4, 8, 12, 16, 25, BASELINE_STEPS)
MULTISTEP_STEPS = (2, 3, 4, 5, 6, 7, 8, 9, 11, 13, 16, 20)


@dataclass(frozen=True)
class Config:
    """A sampling config: the name of a plan set, and the options that a preset holds."""

    plan_set: str
    options: PresetOptions

    @property
    def key(self) -> str:
        """Write the config as text."""
        return json.dumps({"plan_set": self.plan_set, "options": self.options.model_dump(mode="json")})

    @classmethod
    def of_key(cls, key: str) -> Self:
        values = json.loads(key)
        return cls(values["plan_set"], PresetOptions.model_validate(values["options"]))

    def __str__(self) -> str:
        options = self.options
        steps = "" if options.steps is None else f" {options.steps}"
        low, high = options.guidance_interval or (0.0, 1.0)
        parts = [
            f"{options.sampler}{steps}",
            *([] if options.schedule == "full" else [options.schedule]),
            *([] if options.guidance == "none" else [options.guidance]),
            *([f"guided at t {low:g} to {high:g}"] if options.guidance_interval else []),
            *([] if options.cache == NO_CACHE else [options.cache]),
        ]
        return ", ".join(parts)


@dataclass(frozen=True)
class Control:
    """A sampling config that needs no search, which presets are compared with."""

    family: str
    config: Config


class Chooser(Protocol):
    """Protocol of what chooses: a trial of a study, or a test."""

    def suggest_categorical(self, name: str, choices: Sequence[Any], /) -> Any: ...

    def suggest_int(self, name: str, low: int, high: int, /) -> int: ...


@dataclass(frozen=True)
class Space:
    """Holds the choices of one bundle with one guidance. `budgets` are names, the largest first.

    `tables` are solver tables for the guidance, by the names that samplers have; `budget_tables` those that name the
    budgets of their calls themselves.
    """

    plan_sets: tuple[str, ...]
    samplers: tuple[str, ...]
    tables: tuple[str, ...]
    budget_tables: tuple[str, ...]
    budgets: tuple[str, ...]
    weak: tuple[str, ...]  # guidance with a weak branch at a smaller budget
    guidance: str
    caches: tuple[str, ...]
    max_calls: int = MAX_CALLS

    @property
    def largest(self) -> str:
        return self.budgets[0]

    def config(self, plan_set: str, sampler: str, steps: int | None, **changes: Any) -> Config:
        """Return a config at the largest budget with the guidance of the search, but for `changes`."""
        options = {"schedule": self.largest, "guidance": self.guidance} | changes
        return Config(plan_set, PresetOptions(sampler=sampler, steps=steps, **options))

    def baseline(self, plan_set: str) -> Config:
        return self.config(plan_set, "euler", BASELINE_STEPS)

    def cheapest(self, plan_set: str, *, any_budget: bool) -> Iterator[Config]:
        """Yield samplings of one call, among which is the fastest that there is."""
        for budget in self.budgets if any_budget else self.budgets[:1]:
            yield self.config(plan_set, "euler", 1, schedule=budget)

    def keeps_solution(self, config: Config) -> bool:
        """Say whether a config approximates the reference solution, so that its error in dB means something.

        Budgets, weak budgets and intervals of guidance make another trajectory; samplers and caches do not.
        """
        options = config.options
        if options.sampler in self.budget_tables:
            return False
        return (options.schedule, options.guidance, options.guidance_interval) == (self.largest, self.guidance, None)

    # ---------------------------------------------------------------- trials

    def choose(self, chooser: Chooser, *, any_budget: bool) -> Config:
        """Let a trial choose a config: at the largest budget, or with `any_budget` of all that there are."""
        plan_set = chooser.suggest_categorical("plan set", self.plan_sets)
        names = (*self.samplers, *self.tables, *(self.budget_tables if any_budget else ()))
        name = chooser.suggest_categorical("sampler", names)
        calls = chooser.suggest_int("calls", MIN_CALLS, self.max_calls)
        changes = self._changes(chooser, name) if any_budget else {}
        steps = None if is_solver(name) else _steps(name, calls)
        cache = chooser.suggest_categorical("cache", (NO_CACHE, *self.caches))
        return self.config(plan_set, name, steps, **changes, cache=cache_text(cache, steps or calls_of_table(name)))

    def _changes(self, chooser: Chooser, sampler: str) -> dict[str, Any]:
        """Choose budgets and guidance where the sampler is not a table: those are for one guidance and budget."""
        if is_solver(sampler):
            return {}
        first = chooser.suggest_categorical("first budget", self.budgets)
        last = chooser.suggest_categorical("last budget", self.budgets)
        share = chooser.suggest_categorical("share of the first", SHARES)
        changes: dict[str, Any] = {"schedule": schedule_text(first, last, share)}
        if self.weak:
            changes["guidance"] = chooser.suggest_categorical("guidance", (self.guidance, *self.weak))
        if self.guidance != "none":
            low = chooser.suggest_categorical("guided from", LOWS)
            high = chooser.suggest_categorical("guided to", HIGHS)
            changes["guidance_interval"] = None if (low, high) == ("0", "1") else (float(low), float(high))
        return changes

    def first_choices(self, *, any_budget: bool) -> Iterator[dict[str, Any]]:
        """Yield what is tried before anything is searched: usual samplings, as the choices of a trial."""
        for plan_set in self.plan_sets:
            yield from self._cheaper(plan_set) if any_budget else self._usual(plan_set)

    def _usual(self, plan_set: str) -> Iterator[dict[str, Any]]:
        yield self._choice(plan_set, "euler", MIN_CALLS)
        for name in self.tables:
            yield self._choice(plan_set, name, MIN_CALLS)
        for steps, name in product(MULTISTEP_STEPS, MULTISTEP):
            if (calls := sampler_named(name).calls(steps)) <= self.max_calls:
                yield self._choice(plan_set, name, calls)

    def _cheaper(self, plan_set: str) -> Iterator[dict[str, Any]]:
        """Yield a usual sampling with each weak branch, with each budget, and with each before the largest one."""
        yield from (self._choice(plan_set, name, MIN_CALLS) for name in self.budget_tables)
        usual = self._choice(plan_set, "abm3", min(10, self.max_calls)) | {"share of the first": "50"}
        usual |= {"first budget": self.largest, "last budget": self.largest}
        usual |= {"guidance": self.guidance} if self.weak else {}
        usual |= {"guided from": LOWS[0], "guided to": HIGHS[0]} if self.guidance != "none" else {}
        least = usual | self._choice(plan_set, "euler", MIN_CALLS)
        yield least | {"first budget": self.budgets[-1], "last budget": self.budgets[-1]}
        yield from (usual | {"guided to": high} for high in HIGHS[1:] if self.guidance != "none")
        yield from (usual | {"guidance": guidance} for guidance in self.weak)
        for budget in self.budgets[1:]:
            yield usual | {"first budget": budget}
            yield usual | {"first budget": budget, "last budget": budget}

    def _choice(self, plan_set: str, name: str, calls: int) -> dict[str, Any]:
        return {"plan set": plan_set, "sampler": name, "calls": calls, "cache": NO_CACHE}

    # ---------------------------------------------------------------- controls

    def controls(self) -> Iterator[Control]:
        """Yield the controls of every plan set: fewer steps, a smaller budget, a cache, each alone."""
        for plan_set in self.plan_sets:
            for steps in EULER_STEPS:
                yield Control(FEWER_STEPS, self.config(plan_set, "euler", steps))
            for name, steps in product(MULTISTEP, MULTISTEP_STEPS):
                yield Control(name, self.config(plan_set, name, steps))
            for budget in dict.fromkeys((*self.budgets[1:3], self.budgets[-1])) if len(self.budgets) > 1 else ():
                yield Control(SMALLER_BUDGET, self.config(plan_set, "euler", BASELINE_STEPS, schedule=budget))
            for cache in self.caches[:2]:
                text = cache_text(cache, BASELINE_STEPS)
                yield Control(CACHE, self.config(plan_set, "euler", BASELINE_STEPS, cache=text))


def _steps(sampler: str, calls: int) -> int:
    """As many steps as so many calls allow, at least the fewest that the sampler takes."""
    method = sampler_named(sampler)
    return max(method.steps_within(calls), method.min_steps)


def calls_of_table(name: str) -> int:
    """`solver:8` and `solver:8,mixed` → 8."""
    return int(name.partition(":")[2].partition(",")[0])


def schedule_text(first: str, last: str, share: str) -> str:
    return first if first == last else f"0%-{share}%:{first},{share}%-100%:{last}"


def cache_text(choice: str, steps: int) -> str:
    """Return the policy of a step cache for a sampling with so many steps; none where it would reuse nothing."""
    if choice == NO_CACHE or steps < 3:
        return NO_CACHE
    if choice in CACHES[:2]:
        return f"static:every@{2 + CACHES.index(choice)}"
    in_second_half = choice == CACHES[2]
    digits = [
        "0" if (step >= steps / 2) == in_second_half and step % 2 and 0 < step < steps - 1 else "1"
        for step in range(steps)
    ]
    return f"static:mask@{''.join(digits)}" if "0" in digits else NO_CACHE


# ---------------------------------------------------------------- of a bundle


def space_of(plan_sets: Mapping[str, Samplable], guidance: str) -> Space:
    """Return the choices that all of some plan sets of a model allow; raises InputError for wrong guidance."""
    first, *others = plan_sets.values()
    parsed = Guidance.parse(guidance, first.spec)
    budgets = tuple(name for name in measured_budgets(first) if all(name in measured_budgets(on) for on in others))
    smaller = budgets[1:] if parsed.kind is Kind.CFG else ()
    tables = solver_tables(first, parsed, budgets[0])
    return Space(
        plan_sets=tuple(plan_sets),
        samplers=samplers_of(),
        tables=tuple(name for name, facts in tables.items() if facts.table.budgets is None),
        budget_tables=tuple(name for name, facts in tables.items() if facts.table.budgets is not None),
        budgets=budgets,
        weak=tuple(str(parsed.with_weak(first.spec.budget(name))) for name in smaller),
        guidance=str(parsed),
        caches=CACHES if all(REUSE in on.coverage.graphs for on in plan_sets.values()) else (),
    )


def solver_tables(on: Samplable, guidance: Guidance, largest: str) -> dict[str, SolverFacts]:
    """Return by name the tables that samplings with a guidance use at the largest budget: the first of each name."""
    place = Place.of(guidance, largest, on.spec)
    tables = dict[str, SolverFacts]()
    for facts in on.coverage.solvers:
        if place.holds(facts, on.spec):
            tables.setdefault(facts.name, facts)
    return tables


def samplers_of() -> tuple[str, ...]:
    """List the samplers that solve the ODE: what draws noise at every step has no error in dB."""
    return tuple(name for name, sampler in SAMPLERS.items() if not sampler.uses_noise)


def usual_guidance(spec: ModelSpec) -> str:
    return "none" if spec.takes_text else "cfg:2"


def sampling_options(options: PresetOptions, **more: Any) -> SamplingOptions:
    """Return the options of a preset as those of a sampling; `more` are the seed and the like."""
    return SamplingOptions(**options.model_dump(), **more)

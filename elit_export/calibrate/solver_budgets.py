"""Searches the budgets of a solver's calls: do cheaper calls, and more of them, pay in the time of a few full ones?

Every pattern takes at most the time of so many full calls, by the measured time of a call at each budget. Its start by
least squares tells what it is worth; the best ones are fitted as other tables are.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from elit_export.calibrate.flow import Flow
from elit_export.calibrate.solver import Budgets, Progress, References, SolverConfig, TableFit
from elit_export.errors import CalibrationError
from elit_export.runtime.guidance import Guidance, Kind
from elit_export.spec import Budget, ModelSpec
from elit_export.spec.solver import MAX_CALLS

CHEAP = ("half", "quarter", "sixteenth")
PLACES = ("first", "last", "alternating")  # where the cheaper calls are
CHEAP_CALLS = (2, 4)
ROUNDS = 5  # of the time of a call; the median counts
TIMED_IMAGES = 8

Cost = Mapping[tuple[Budget, Budget], float]  # ms of a guided call by the budgets of its branches


@dataclass(frozen=True)
class Pattern:
    """The budgets of each call; `name` tells them to people, `share` is its time in that of the full calls."""

    name: str
    budgets: Budgets
    calls: int
    share: float


def patterns(full_calls: int, full: Budget, cheap: Mapping[str, Budget], cost: Cost, *, guided: bool) -> list[Pattern]:
    """Return every pattern that fits into the time of `full_calls` full calls and uses it as far as whole calls can."""
    time_of_all = full_calls * cost[full, full]
    found = []
    for name, budget in cheap.items():
        for count in CHEAP_CALLS:
            rest = int((time_of_all - count * cost[budget, budget]) / cost[full, full])
            if rest >= 1:
                found += [_placed(name, budget, count, rest, full, place) for place in PLACES]
        if guided and (calls := int(time_of_all / cost[full, budget])) > full_calls:
            found.append(Pattern(f"weak at {name}", Budgets((full,) * calls, (budget,) * calls), calls, 0.0))
    return [
        replace(pattern, share=_time(pattern, cost) / time_of_all)
        for pattern in dict.fromkeys(found)
        if pattern.calls <= MAX_CALLS
    ]


def _placed(name: str, budget: Budget, count: int, rest: int, full: Budget, place: str) -> Pattern:
    calls = count + rest
    order = {
        "first": [*range(calls)],
        "last": [*reversed(range(calls))],
        "alternating": [*range(0, calls, 2), *range(1, calls, 2)],
    }
    cheap_calls = order[place][:count]
    strong = tuple(budget if call in cheap_calls else full for call in range(calls))
    return Pattern(f"{count} at {name} {place}", Budgets(strong, strong), calls, 0.0)


def _time(pattern: Pattern, cost: Cost) -> float:
    assert pattern.budgets.strong is not None
    weak = pattern.budgets.weak or pattern.budgets.strong
    return sum(cost[pair] for pair in zip(pattern.budgets.strong, weak, strict=True))


def used_pairs(references: References) -> list[tuple[Budget, Budget]]:
    """Return the budgets of the two branches in each sort of call that a pattern has."""
    full, pairs = references.pipeline.spec.full, []
    for budget in cheap_budgets(references).values():
        pairs += [(budget, budget), (full, budget)]
    return [(full, full), *pairs]


def measured_cost(references: References) -> dict[tuple[Budget, Budget], float]:
    """Measure the time in ms of each sort of call, in rounds."""
    some, pipeline = replace(references.config.fitted, images=TIMED_IMAGES), references.pipeline
    flows = {pair: Flow(pipeline, some, 1, budgets=pair[:1], weak=pair[1:]) for pair in used_pairs(references)}
    times: dict[tuple[Budget, Budget], list[float]] = {pair: [] for pair in flows}
    for _ in range(ROUNDS + 1):
        for pair, flow in flows.items():
            began = time.perf_counter()
            flow.evaluate(flow.start, 0.5, 0)
            times[pair].append((time.perf_counter() - began) * 1e3)
    return {pair: float(np.median(each[1:])) for pair, each in times.items()}  # the first call warms up


def cheap_budgets(references: References) -> dict[str, Budget]:
    """Return the named budgets below the full one that the engines run."""
    pipeline = references.pipeline
    named = pipeline.spec.named_budgets
    covered = pipeline.coverage.covered
    return {name: named[name] for name in CHEAP if name in named and named[name] in covered}


def check_searched(config: SolverConfig, spec: ModelSpec) -> Guidance:
    """Return the guidance, each branch of which may have a budget in each call.

    Raises CalibrationError for other guidance, and where the budget of all calls is given.
    """
    guidance, parsed = config.guidance, Guidance.parse(config.guidance, spec)
    if spec.budget(config.budget) != spec.full:
        raise CalibrationError(
            f"budgets are searched beside the full one, not {config.budget}",
            "leave out --schedule or --budgets auto",
        )
    if parsed.kind not in (Kind.NONE, Kind.CFG):
        raise CalibrationError(
            f"guidance {guidance} names the budget of the weak branch itself",
            "give --guidance cfg:SCALE, or leave out --budgets auto",
        )
    return parsed


def patterns_of(references: References, cost: Cost) -> dict[int, list[Pattern]]:
    """Return the patterns in the time of each number of full calls that is calibrated; `cost` is `measured_cost`.

    Raises InputError if the engines cannot run one of them.
    """
    cheap, spec, config = cheap_budgets(references), references.pipeline.spec, references.config
    guided = check_searched(config, spec).guides
    found = {calls: patterns(calls, spec.full, cheap, cost, guided=guided) for calls in config.calls}
    for pattern in (pattern for tried in found.values() for pattern in tried):
        TableFit(references, pattern.calls, pattern.budgets).check()
    return found


@dataclass(frozen=True, eq=False)
class Screened:
    """A pattern, and what its start by least squares reached."""

    pattern: Pattern
    fit: TableFit
    progress: Progress

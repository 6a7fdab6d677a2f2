"""Measures candidates and controls on images that no search saw, and accepts presets among them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median

from elit_export.errors import CalibrationError
from elit_export.tune.costs import off_by, rounds_within
from elit_export.tune.images import Images
from elit_export.tune.pareto import (
    Candidate,
    Goal,
    Quality,
    is_significant,
    nearest_slower,
    pooled_db,
    worse_in_db,
    worse_in_distance,
)
from elit_export.tune.result import FOUND
from elit_export.tune.search import Search, SearchResult
from elit_export.tune.space import SMALLER_BUDGET, Config, Control
from elit_export.tune.target import TOLERANCE, TOLERANCE_DB, rounded_up

ERROR_IMAGES = 64  # at most so many, for the reference solution takes long
TRIED = 3  # candidates of each goal that are measured
FRONT = 6  # configs of the search's front that are measured too, for the table
TIMED_MS = 15_000.0  # about what one plan set's samplings may take together
AGAIN_MS = 5_000.0  # and those of one candidate beside its baseline


@dataclass(frozen=True, eq=False)
class Measured:
    """Holds what was measured of a config on unseen images.

    `speedup` is the baseline's time of its plan set over its own.
    """

    config: Config
    family: str
    predicted_ms: float
    ms: float
    speedup: float
    engine_calls: int
    quality: Quality


@dataclass(frozen=True, eq=False)
class Selection:
    """Holds a config that meets a goal, measured again, and the controls that are better at equal or more time."""

    goal: Goal
    measured: Measured
    compared_with: int
    worse_than: list[str]

    @property
    def is_accepted(self) -> bool:
        return not self.worse_than


@dataclass(frozen=True)
class Verdict:
    """Says how many controls a config was compared with, and which have significantly better images."""

    compared_with: int
    worse_than: list[str]


def verdict(one: Measured, controls: Sequence[Measured]) -> Verdict:
    """Compare with the controls at equal or more time.

    By distance with all of them. In dB, which more steps always raise, with the fastest such control of each family,
    where both have the reference's solution.
    """
    slower = [each for each in controls if each.ms >= one.ms and each.config != one.config]
    by_distance = [each for each in slower if is_farther(one.quality, each.quality) is not None]
    near = [slower[place] for place in nearest_slower(one.ms, [(each.family, each.ms) for each in slower])]
    by_db = [each for each in near if has_more_error(one.quality, each.quality) is not None]
    worse = [each for each in by_distance if is_farther(one.quality, each.quality)]
    worse += [each for each in by_db if has_more_error(one.quality, each.quality)]
    compared = {id(each) for each in (*by_distance, *by_db)}
    return Verdict(len(compared), list(dict.fromkeys(str(each.config) for each in worse)))


def is_farther(one: Quality, other: Quality) -> bool | None:
    """Say whether one is significantly farther from real images; None where that was not measured."""
    if one.distance is None or other.distance is None:
        return None
    return is_significant(worse_in_distance(one.distance, other.distance))


def has_more_error(one: Quality, other: Quality) -> bool | None:
    """Say whether one has significantly fewer dB; None where one of them has another solution."""
    if one.errors is None or other.errors is None:
        return None
    return is_significant(worse_in_db(one.errors, other.errors))


# ---------------------------------------------------------------- measurements


class Finals:
    """Measures configs once each, on the images of another seed than the search's."""

    def __init__(self, search: Search, images: Images, on_stage: Callable[[str, int, int], None]) -> None:
        self._search, self._images, self._on_stage = search, images, on_stage
        self._job, self._space = search.job, search.space
        self.measured: dict[Config, Measured] = {}

    @property
    def error_images(self) -> int:
        return min(ERROR_IMAGES, self._job.images)

    @property
    def plan_sets(self) -> list[str]:
        """List the plan sets of what was measured."""
        return list(dict.fromkeys(config.plan_set for config in self.measured))

    @property
    def controls(self) -> list[Measured]:
        return [each for each in self.measured.values() if each.family != FOUND]

    def measure(self, configs: Iterable[Config]) -> None:
        """Measure some configs, and the controls of their plan sets, each plan set's in turn."""
        new = [config for config in dict.fromkeys(configs) if config not in self.measured]
        for plan_set in dict.fromkeys(config.plan_set for config in new):
            own = [Control(FOUND, config) for config in new if config.plan_set == plan_set]
            others = [each for each in self._controls(plan_set) if each.config not in self.measured]
            controls = {each.config for each in others}
            self._measure_plan_set(plan_set, [*others, *(each for each in own if each.config not in controls)])

    def _controls(self, plan_set: str) -> list[Control]:
        every = [each for each in self._space.controls() if each.config.plan_set == plan_set]
        runnable = set(self._search.costs[plan_set].runnable(each.config for each in every))
        return [
            each for each in every if each.config in runnable and (self._job.evaluator or each.family != SMALLER_BUDGET)
        ]

    def _measure_plan_set(self, plan_set: str, rows: Sequence[Control]) -> None:
        times = self._timed(plan_set, [each.config for each in rows], TIMED_MS)
        baseline_ms = times[self._space.baseline(plan_set)]
        for place, row in enumerate(rows):
            self._on_stage(f"final images of {plan_set}", place, len(rows))
            ms = times[row.config]
            self.measured[row.config] = Measured(
                config=row.config,
                family=row.family,
                predicted_ms=self._search.predicted_ms(row.config),
                ms=ms,
                speedup=baseline_ms / ms,
                engine_calls=len(self._search.costs[plan_set].calls(row.config)),
                quality=self._quality(row.config),
            )

    def _timed(self, plan_set: str, configs: Sequence[Config], budget_ms: float) -> dict[Config, float]:
        """Time configs in turn, beside the baseline of their plan set."""
        self._on_stage(f"times of {plan_set}", 0, 1)
        every = list(dict.fromkeys([self._space.baseline(plan_set), *configs]))
        rounds = rounds_within(sum(map(self._search.predicted_ms, every)), budget_ms)
        times = self._search.costs[plan_set].timed({each.key: each for each in every}, rounds=rounds)
        return {each: times[each.key] for each in every}

    def _quality(self, config: Config) -> Quality:
        errors = self._images.errors(config, self.error_images) if self._space.keeps_solution(config) else None
        if self._job.evaluator is None:
            return Quality(errors)
        return Quality(errors, self._images.distance(config, self._job.images, self._job.evaluator))

    # ---------------------------------------------------------------- goals

    def cost_over_predicted(self, one: Measured) -> float:
        """By what factor a config costs more than the search took it to cost."""
        is_time = self._job.target.is_time
        cost = one.ms / (self._job.target.limit_ms(one.ms * one.speedup) if is_time else 1.0)
        return cost / self._search.cost(one.config)

    def meets(self, goal: Goal, one: Measured) -> bool:
        """Say whether a goal is met within the tolerance."""
        if goal.min_db is not None:
            return pooled_db(one.quality) >= goal.min_db - TOLERANCE_DB
        limit_ms = self._job.target.limit_ms(one.ms * one.speedup)
        return one.ms <= goal.max_cost * limit_ms * (1 + TOLERANCE)

    def best_controls(self, goal: Goal) -> list[Config]:
        """List the best controls that meet a goal, for where nothing that was found is better."""
        met = [each for each in self.controls if self.meets(goal, each)]
        found = SearchResult(
            [each.config for each in met], [Candidate(i, each.ms, each.quality) for i, each in enumerate(met)]
        )
        return found.ranked(replace(goal, max_cost=math.inf))[:TRIED]

    def _again(self, one: Measured) -> Measured:
        """Return the same with its time measured again, beside the baseline."""
        plan_set = one.config.plan_set
        times = self._timed(plan_set, [one.config], AGAIN_MS)
        ms = times[one.config]
        return replace(one, ms=ms, speedup=times[self._space.baseline(plan_set)] / ms)

    def chosen(self, goal: Goal, candidates: Sequence[Config]) -> Selection | None:
        """Return the first candidate that is accepted; else the first that meets the goal; None if there is none.

        Only those that no control was better than are timed again, or the one that is left.
        """
        met = [each for each in dict.fromkeys(candidates) if self.meets(goal, self.measured[each])]
        good = [each for each in met if not verdict(self.measured[each], self.controls).worse_than]
        left = list[Selection]()
        for config in (*good, *(each for each in met if each not in good)):
            one = self._again(self.measured[config])
            if not self.meets(goal, one):
                continue
            against = verdict(one, self.controls)
            left.append(Selection(goal, one, against.compared_with, against.worse_than))
            if left[-1].is_accepted or config not in good:
                break
        return next((each for each in left if each.is_accepted), left[0] if left else None)


# ---------------------------------------------------------------- all goals


def final_choices(found: SearchResult, finals: Finals, goals: Sequence[Goal]) -> list[Selection]:
    """Choose for each goal that something reaches.

    Times are predicted again by what the first measurement says of predictions. Where all candidates of a goal have
    fewer dB on unseen images than the search saw, others with more to spare are tried.
    """
    finals.measure([*(each for goal in goals for each in found.ranked(goal)[:TRIED]), *found.front(FRONT)])
    factor, more_db = corrections(finals, found)
    candidates = {goal: found.ranked(goal, factor=factor)[:TRIED] for goal in goals}
    finals.measure(each for some in candidates.values() for each in some)
    chosen = {goal: finals.chosen(goal, [*candidates[goal], *finals.best_controls(goal)]) for goal in goals}
    for goal in goals:
        if chosen[goal] is None and more_db:
            more = found.ranked(goal, factor=factor, more_db=more_db)[:TRIED]
            finals.measure(more)
            chosen[goal] = finals.chosen(goal, more)
    return [each for each in chosen.values() if each]


def corrections(finals: Finals, found: SearchResult) -> tuple[float, float]:
    """By what factor samplings took longer than predicted, and how many dB fewer unseen images have."""
    measured = list(finals.measured.values())
    factor = median(map(finals.cost_over_predicted, measured))
    screened = {found.configs[each.index]: pooled_db(each.quality) for each in found.candidates}
    losses = [
        screened[each.config] - pooled_db(each.quality)
        for each in measured
        if each.config in screened and each.quality.errors and pooled_db(each.quality) > 0
    ]
    return factor, max([0.0, *losses])


def refuse_unmet(search: Search, finals: Finals) -> None:
    """Raise CalibrationError naming what comes nearest to a target that nothing meets."""
    target = search.job.target
    measured = list(finals.measured.values())
    if target.min_sqnr_db is not None:
        raise _too_few_db(target.min_sqnr_db, search.job.goals, measured)
    share = max(goal.max_cost for goal in search.job.goals)
    if target.latency_ms is not None:
        nearest = min(measured, key=lambda each: each.ms)
        option = f"--latency {rounded_up(nearest.ms * (1 + TOLERANCE) / share)}ms"
    else:
        nearest = max(measured, key=lambda each: each.speedup)
        option = f"--speedup {nearest.speedup * share * (1 - TOLERANCE):.3g}"
    within = "" if share == 1 else f" within {share:.0%} of its time"
    raise CalibrationError(
        f"nothing that was found is {target}{within}; {nearest.config} comes nearest with "
        f"{rounded_up(nearest.ms)} ms, {nearest.speedup:.3g} times as fast",
        f"give {option}",
    )


def _too_few_db(asked_db: float, goals: Iterable[Goal], measured: Iterable[Measured]) -> CalibrationError:
    """Say which config has the most dB on unseen images, and what of them the least of the goals leaves."""
    least_db = min(goal.min_db for goal in goals if goal.min_db is not None)
    nearest = max(measured, key=lambda each: pooled_db(each.quality))
    most_db = pooled_db(nearest.quality)
    possible = math.floor(most_db - (least_db - asked_db))
    return CalibrationError(
        f"nothing that was found has {least_db:g} dB; {nearest.config} comes nearest with {most_db:.1f} dB",
        f"give --min-sqnr {possible} or less, or more --trials" if possible > 0 else "give more --trials",
    )


def mispredicted(chosen: Selection) -> str:
    """Say by how much the time of a preset misses its prediction; empty where that is within 5 %."""
    one = chosen.measured
    off = off_by(one.predicted_ms, one.ms)
    if off <= TOLERANCE:
        return ""
    return (
        f"{chosen.goal.name}: {rounded_up(one.predicted_ms)} ms were predicted, measured again it takes "
        f"{rounded_up(one.ms)} ms "
        f"({off:.0%} off); what was measured counts"
    )

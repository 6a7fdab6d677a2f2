"""Searches a space: first at the largest budget by errors in dB, then at all budgets by an evaluator, then halving."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from elit_export.errors import CalibrationError, InputError
from elit_export.evaluate.protocol import ImageEvaluator
from elit_export.runtime.pipeline import Pipeline
from elit_export.tune.costs import Costs
from elit_export.tune.images import Images, reference_config
from elit_export.tune.pareto import Candidate, Errors, Goal, Quality, by_quality, front, survivors
from elit_export.tune.space import Config, Space
from elit_export.tune.study import Objective, Outcome, Study
from elit_export.tune.target import TOLERANCE, Target, rounded_up

SCREENED = 16  # images whose errors in dB a search goes by
SLACK = 0.3  # a config may be predicted to cost so much more than the target and is still looked at
EVALUATED_SHARE = 0.4  # of the trials, where there is an evaluator
MAX_EVALUATED = 24  # configs that go into the halving
LARGEST, ALL = "at the largest budget", "at all budgets"
OnStage = Callable[[str, int, int], None]  # what, done, of how many


@dataclass(frozen=True, kw_only=True)
class Job:
    """Says what is searched: the space, the target, and how much work to spend; it needs no engines.

    `reference` names the plan set that computes the reference solution; it need not be in the space. `no_evaluator`
    says why there is none, and what to do.
    """

    space: Space
    reference: str
    evaluator: ImageEvaluator | None
    target: Target
    names: tuple[str, ...]
    rows: int
    images: int
    trials: int
    seed: int
    no_evaluator: str = ""

    @property
    def goals(self) -> list[Goal]:
        return self.target.goals(self.names)

    @property
    def searches_all_budgets(self) -> bool:
        """Say whether other budgets are searched too: an evaluator measures them, and the target is not in dB."""
        return self.evaluator is not None and self.target.is_time

    @property
    def trial_counts(self) -> dict[str, int]:
        evaluated = round(self.trials * EVALUATED_SHARE) if self.searches_all_budgets else 0
        return {LARGEST: self.trials - evaluated} | ({ALL: evaluated} if self.searches_all_budgets else {})


@dataclass(frozen=True)
class SearchResult:
    """Holds the configs that a search looked at, by index, and what it knows of each."""

    configs: list[Config]
    candidates: list[Candidate]

    def ranked(self, goal: Goal, *, factor: float = 1.0, more_db: float = 0.0) -> list[Config]:
        """Order what reaches a goal, if it costs `factor` times what was predicted, with `more_db` to spare."""
        costly = [replace(each, cost=each.cost * factor) for each in self.candidates]
        harder = goal if goal.min_db is None else replace(goal, min_db=goal.min_db + more_db)
        return [self.configs[each.index] for each in harder.candidates(costly)]

    def front(self, most: int) -> list[Config]:
        """Return at most so many of the Pareto front of cost and quality, evenly taken."""
        order = {id(each): place for place, each in enumerate(by_quality(self.candidates))}
        chosen = front([(each.cost, float(order[id(each)])) for each in self.candidates])
        every = [self.configs[self.candidates[place].index] for place in chosen]
        return every[:: -(-len(every) // most)] if every else []


class Search:
    """One search. Times are measured when it begins; trials and images are kept in the study."""

    def __init__(self, job: Job, pipelines: Mapping[str, Pipeline], study: Study, on_stage: OnStage) -> None:
        """Take the opened plan sets of the space and of the reference, by name."""
        self.job, self.pipelines, self._study, self._on_stage = job, pipelines, study, on_stage
        self.space = job.space
        self.costs = {name: Costs(pipelines[name], job.rows) for name in job.space.plan_sets}
        self.baseline_ms: dict[str, float] = {}
        self.smallest: tuple[float, Config] | None = None
        reference = reference_config(job.space, job.reference)
        self._images = Images(pipelines, reference, seed=job.seed, keep=study.kept)

    # ---------------------------------------------------------------- times

    def measure(self) -> None:
        """Measure the calls of every plan set; raises InputError for a target that no sampling can reach."""
        for place, (name, costs) in enumerate(self.costs.items()):
            self._on_stage(f"times of {name}", place, len(self.costs))
            costs.measure(name, self.space)
            self.baseline_ms[name] = costs.predicted_ms(self.space.baseline(name))
        single = [
            each
            for name, costs in self.costs.items()
            for each in costs.runnable(self.space.cheapest(name, any_budget=self.job.searches_all_budgets))
        ]
        self.smallest = min(((self.predicted_ms(each), each) for each in single), key=lambda pair: pair[0])
        nearest = min(single, key=self.cost)
        self._check_reachable(nearest)
        cheapest = self.cost(nearest)
        most = int((1 + SLACK) / cheapest) if self.job.target.is_time else self.space.max_calls
        limited = max(2, min(self.space.max_calls, most))
        self.space = replace(self.space, max_calls=int(self._study.kept("calls", lambda: limited)))

    def _check_reachable(self, config: Config) -> None:
        """Raise InputError where the sampling that is nearest to a target of time does not reach it."""
        smallest_ms, target = self.predicted_ms(config), self.job.target
        if not target.is_time or self.cost(config) <= 1 + TOLERANCE:
            return
        shown = f"the fastest sampling, one call ({config} on {config.plan_set}), takes {rounded_up(smallest_ms)} ms"
        if target.latency_ms is not None:
            raise InputError(
                f"{target.latency_ms:g} ms is below a single call: {shown}",
                f"give --latency {rounded_up(smallest_ms)}ms or more",
            )
        most = self.baseline_ms[config.plan_set] / smallest_ms
        raise InputError(
            f"{target.speedup:g} times as fast is below a single call: {shown}", f"give --speedup {most:.3g} or less"
        )

    def predicted_ms(self, config: Config) -> float:
        return self.costs[config.plan_set].predicted_ms(config)

    def cost(self, config: Config) -> float:
        """Return the predicted time: relative to what the target allows, or in ms where the target is not of time."""
        predicted = self.predicted_ms(config)
        if not self.job.target.is_time:
            return predicted
        return predicted / self.job.target.limit_ms(self.baseline_ms[config.plan_set])

    # ---------------------------------------------------------------- trials

    def run(self) -> SearchResult:
        """Search, and return all that was looked at with the quality that it was compared by."""
        counts = self.job.trial_counts
        configs = self._searched(LARGEST, counts[LARGEST], self._loss_db, any_budget=False)
        found = self._candidates(configs, [Quality(errors=self._errors(config)) for config in configs])
        if not self.job.searches_all_budgets:
            return found
        evaluated = self._searched(ALL, counts[ALL], self._loss_distance, any_budget=True)
        return self._halved(self._to_evaluate(found, evaluated))

    def refuse_empty(self) -> NoReturn:
        """Raise CalibrationError naming what comes nearest, where no trial is within the target."""
        assert self.smallest
        keys = [key for name in self.job.trial_counts if (key := self._study.nearest(name)) is not None]
        configs = [Config.of_key(key) for key in keys] or [self.smallest[1]]
        nearest = min(configs, key=self.cost)
        raise CalibrationError(
            f"no trial is within the target ({self.job.target}); the nearest, {nearest}, is predicted to take "
            f"{rounded_up(self.predicted_ms(nearest))} ms",
            "give more --trials",
        )

    def _searched(self, name: str, trials: int, loss: Callable[[Config], float], *, any_budget: bool) -> list[Config]:
        made = self._study.search(
            name,
            self._objective(loss, any_budget=any_budget),
            trials=trials,
            first=list(self.space.first_choices(any_budget=any_budget))[: trials // 2],
            on_trial=lambda done: self._on_stage(f"search {name}", done, trials),
        )
        return [Config.of_key(each) for each in made]

    def _objective(self, loss: Callable[[Config], float], *, any_budget: bool) -> Objective:
        def objective(trial: Any) -> Outcome | None:
            config = self.space.choose(trial, any_budget=any_budget)
            try:
                cost = self.cost(config)
            except (InputError, CalibrationError):  # no profile takes it
                return None
            if self.job.target.is_time and cost > 1 + SLACK:
                return Outcome(cost, 0.0, cost - 1 - SLACK, config.key)
            return Outcome(cost, loss(config), 0.0, config.key)

        return objective

    def _loss_db(self, config: Config) -> float:
        return -self._errors(config).pooled_db

    def _errors(self, config: Config) -> Errors:
        return self._images.errors(config, min(SCREENED, self.job.images))

    def _loss_distance(self, config: Config) -> float:
        assert self.job.evaluator
        return self._images.distance(config, self.rungs[0], self.job.evaluator).value

    # ---------------------------------------------------------------- halving

    @property
    def rungs(self) -> list[int]:
        """List the numbers of images on which a shrinking number of configs is evaluated."""
        assert self.job.evaluator
        rungs = list[int]()
        for images in (self.job.images // 4, self.job.images // 2):
            try:
                self.job.evaluator.check(self.pipelines[self.job.reference], images)
            except InputError:  # too few
                continue
            rungs.append(images)
        return [*rungs, self.job.images]

    def _to_evaluate(self, found: SearchResult, evaluated: Sequence[Config]) -> list[Config]:
        """Return the best at the largest budget for each goal, and of the others those nearest to real images."""
        best = [config for goal in self.job.goals for config in found.ranked(goal)[:3]]
        nearest = sorted(evaluated, key=self._loss_distance)[:MAX_EVALUATED]
        return list(dict.fromkeys([*best, *nearest]))

    def _halved(self, configs: Sequence[Config]) -> SearchResult:
        remaining = list(configs)
        found = self._evaluated(remaining, self.rungs[0])
        for images in self.rungs[1:]:
            remaining = [found.configs[each.index] for each in survivors(found.candidates, self.job.goals)]
            found = self._evaluated(remaining, images)
        return found

    def _evaluated(self, configs: Sequence[Config], images: int) -> SearchResult:
        assert self.job.evaluator
        qualities = list[Quality]()
        for place, config in enumerate(configs):
            self._on_stage(f"evaluating {images} images of each", place, len(configs))
            errors = self._errors(config) if self.space.keeps_solution(config) else None
            qualities.append(Quality(errors, self._images.distance(config, images, self.job.evaluator)))
        return self._candidates(configs, qualities)

    def _candidates(self, configs: Sequence[Config], qualities: Iterable[Quality]) -> SearchResult:
        costs = map(self.cost, configs)
        candidates = [Candidate(*each) for each in zip(range(len(configs)), costs, qualities, strict=True)]
        return SearchResult(list(configs), candidates)

"""Calibrates solver tables on a bundle's engines: few calls whose times and weights were fitted to the model.

Each table starts from least squares (`least_squares.py`) and is improved by Gauss–Newton (`gauss_newton.py`) until its
error on images that it is not fitted to stops falling. What is reported and stored is its error on yet other images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property

from elit_export.arrays import Float64
from elit_export.bundle import recording
from elit_export.bundle.manifest import Manifest, PlanSet
from elit_export.bundle.reading import Bundle
from elit_export.calibrate.flow import Flow, Method, Trajectories
from elit_export.calibrate.gauss_newton import Iterate, improved
from elit_export.calibrate.least_squares import SHAPES, fitted, grids
from elit_export.calibrate.reference import Curve, resolved_steps, solution, traced
from elit_export.callbacks import noop
from elit_export.errors import CalibrationError
from elit_export.runtime.guidance import Guidance
from elit_export.runtime.options import resolve
from elit_export.runtime.pipeline import Pipeline
from elit_export.runtime.prompts import Prompts
from elit_export.runtime.samplers import SAMPLERS
from elit_export.spec import Budget, SolverError, SolverFacts, SolverTable
from elit_export.spec.limits import TRAJECTORIES
from elit_export.spec.solver import MAX_CALLS, MIN_CALLS
from elit_export.verify.metrics import sample_error

MIN_IMAGES = 32
CURVE_BYTES = 1 << 30
START_IMAGES = 32  # of those, to whose whole trajectories the start is fitted
FIRST_IMAGES = 48  # that the first iteration uses; each uses twice as many as the one before, until all are used
MOST_ITERATIONS = 8
LEAST_GAIN_DB = 0.05  # on the images that tell when to stop
EULER_STEPS = 50  # compared with, as the sampler of most published results
FIXED = ("ab3", "abm3", "ab2", "heun", "euler")  # compared with at equal calls


@dataclass(frozen=True)
class SolverConfig:
    """What is calibrated: tables of so many `calls` each, fitted to `images` of `seed`; raises CalibrationError."""

    calls: tuple[int, ...]
    images: int
    seed: int
    guidance: str
    interval: tuple[float, float] | None
    budget: str
    rows: int | None
    prompts: Prompts | None = None

    def __post_init__(self) -> None:
        for calls in self.calls:
            if not MIN_CALLS <= calls <= MAX_CALLS:
                raise CalibrationError(f"a table of {calls} calls", f"choose {MIN_CALLS} to {MAX_CALLS} calls")
        if self.images < MIN_IMAGES:
            raise CalibrationError(
                f"{self.images} images are too few: a table would fit them and no others",
                f"give --images {MIN_IMAGES} or more",
            )
        TRAJECTORIES.check(self.images, "images")

    def trajectories(self, images: int, offset: int) -> Trajectories:
        own = self.guidance, self.interval, self.budget, self.rows, self.prompts
        return Trajectories(images, self.seed + offset, *own)

    def images_of(self, iteration: int) -> int:
        """How many images an iteration uses."""
        return min(self.images, FIRST_IMAGES << iteration)

    @property
    def fitted(self) -> Trajectories:
        """The images that tables are fitted to."""
        return self.trajectories(self.images, 0)

    @property
    def stopping(self) -> Trajectories:
        """The images that tell when to stop."""
        return self.trajectories(max(MIN_IMAGES, self.images // 2), 1)

    @property
    def held_out(self) -> Trajectories:
        """The images on which errors are measured."""
        return self.trajectories(max(2 * MIN_IMAGES, self.images), 2)


@dataclass(frozen=True)
class Budgets:
    """The budget of each call and of its weak branch; without them it is the same in all calls and branches."""

    strong: tuple[Budget, ...] | None = None
    weak: tuple[Budget, ...] | None = None


FULL = Budgets()


@dataclass(frozen=True, eq=False)
class Progress:
    """How far the fit of one table is: the last iterate, the best on the stopping images, and whether it ended."""

    now: Iterate
    best: Method
    best_db: float
    iterations: int = 0
    ended: bool = False

    def after(self, now: Iterate, reached_db: float, *, used_all: bool) -> Progress:
        """Return the progress after an iteration that reached so much on the stopping images."""
        is_better, done = reached_db > self.best_db, self.iterations + 1
        gained = reached_db >= self.best_db + LEAST_GAIN_DB
        return Progress(
            now=now,
            best=now.method if is_better else self.best,
            best_db=max(reached_db, self.best_db),
            iterations=done,
            ended=done >= MOST_ITERATIONS or (used_all and not gained),
        )


class References:
    """The reference solutions of three sets of images, sampled once, when they are first needed.

    Tables are fitted to one set, another tells when to stop, and errors are measured on the third.
    """

    def __init__(self, pipeline: Pipeline, config: SolverConfig, on_stage: Callable[[str], None] = noop) -> None:
        """Check that the engines can run it all; raises InputError. `on_stage` hears what is sampled."""
        self.pipeline, self.config, self._on_stage = pipeline, config, on_stage
        pipeline.spec.budget(config.budget)  # it is one
        TableFit(self, MIN_CALLS).check()

    @cached_property
    def _resolved(self) -> tuple[int, Float64]:
        def on_steps(steps: int) -> None:
            self._on_stage(f"reference of {steps} steps")

        return resolved_steps(self.pipeline, self.config.fitted, on_steps)

    @property
    def steps(self) -> int:
        return self._resolved[0]

    @property
    def fitted(self) -> Float64:
        return self._resolved[1]

    @cached_property
    def curve(self) -> Curve:
        """The trajectories of the first images, to which starts are fitted."""
        return traced(Flow(self.pipeline, self.starting, self.steps), self.steps)

    @property
    def starting(self) -> Trajectories:
        image_bytes = 2 * self.steps * math.prod(self.pipeline.spec.sample_shape) * 8  # of states and velocities
        return replace(self.config.fitted, images=max(1, min(START_IMAGES, CURVE_BYTES // image_bytes)))

    @cached_property
    def stopping(self) -> Float64:
        return self._solution(self.config.stopping)

    @cached_property
    def held_out(self) -> Float64:
        return self._solution(self.config.held_out)

    def _solution(self, trajectories: Trajectories) -> Float64:
        self._on_stage(f"reference of {trajectories.images} other images")
        return solution(self.pipeline, trajectories, self.steps)

    def sampler_error(self, sampler: str, steps: int) -> SolverError:
        """Return the error of a sampler without calibration."""
        trajectories = self.config.held_out
        options = resolve(self.pipeline.spec, trajectories.options(sampler=sampler, steps=steps))
        samples = self.pipeline.run(trajectories.request(self.pipeline, options)).latents
        return error_of(sampler, steps, SAMPLERS[sampler].calls(steps), samples, self.held_out)

    def fixed_errors(self, calls: Sequence[int]) -> Iterator[SolverError]:
        """Yield the errors of samplers with at most so many calls each, and that of Euler's 50 steps."""
        for most in calls:
            for name in FIXED:
                if steps := SAMPLERS[name].steps_within(most):
                    yield self.sampler_error(name, steps)
        yield self.sampler_error("euler", EULER_STEPS)


@dataclass(frozen=True, eq=False)
class TableFit:
    """The fit of one table of so many calls, each at a budget."""

    references: References
    calls: int
    budgets: Budgets = FULL

    @property
    def key(self) -> str:
        """What tells it from the fits of other tables."""
        kept = [str(_kept(each)) for each in (self.budgets.strong, self.budgets.weak) if each]
        return " ".join([str(self.calls), *kept])

    def flow(self, trajectories: Trajectories) -> Flow:
        pipeline, budgets = self.references.pipeline, self.budgets
        return Flow(pipeline, trajectories, self.calls, budgets=budgets.strong, weak=budgets.weak)

    def check(self) -> None:
        """Raise InputError if the engines cannot run every set of images that a fit samples."""
        config = self.references.config
        fitted_to = (config.images_of(iteration) for iteration in range(MOST_ITERATIONS))
        for images in {START_IMAGES, *fitted_to, config.images}:
            self.flow(replace(config.fitted, images=images))
        for trajectories in (config.stopping, config.held_out):
            self.flow(trajectories)

    def start(self, shapes: Sequence[tuple[float, float]] = SHAPES) -> Progress:
        """Select the best start by least squares over a family of time grids."""
        curve, flow = self.references.curve, self.flow(self.references.starting)
        starts = [fitted(flow, curve, times) for times in grids(self.calls, shapes)]
        method, _ = max(starts, key=lambda start: middle_db(start[1], curve.states[-1]))
        return Progress(Iterate(method), method, self.stopping_db(method))

    def stopping_db(self, method: Method) -> float:
        """Return the mean of median and pooled SQNR on the images that tell when to stop."""
        samples = self.flow(self.references.config.stopping).samples(method)
        return middle_db(samples, self.references.stopping)

    def iterations(self, progress: Progress) -> Iterator[Progress]:
        """Improve the table until its error on the stopping images no longer falls; yields after each iteration."""
        fitted_to = self.references.config.fitted
        while not progress.ended:
            images = self.references.config.images_of(progress.iterations)
            flow = self.flow(replace(fitted_to, images=images))
            now = improved(flow, self.references.fitted[:images], progress.now)
            if now is None:
                progress = replace(progress, iterations=progress.iterations + 1, ended=True)
            else:
                progress = progress.after(now, self.stopping_db(now.method), used_all=images == fitted_to.images)
            yield progress

    def error(self, method: Method) -> SolverError:
        """Return the error on the held-out images."""
        samples = self.flow(self.references.config.held_out).samples(method)
        return error_of(
            with_budgets(method, self.budgets).name, self.calls, self.calls, samples, self.references.held_out
        )


def error_of(sampler: str, steps: int, calls: int, samples: Float64, expected: Float64) -> SolverError:
    return SolverError(sampler=sampler, steps=steps, calls=calls, **asdict(sample_error(samples, expected)))


def middle_db(samples: Float64, expected: Float64) -> float:
    """Return the mean of median and pooled SQNR, by which methods are selected."""
    error = sample_error(samples, expected)
    return (error.median_db + error.pooled_db) / 2


# ---------------------------------------------------------------- into the bundle


def is_better(table: SolverError, other: SolverError) -> bool:
    """Whether a table beats another method, such as `ab3` with as many calls, for the median image and for all."""
    return table.median_db > other.median_db and table.pooled_db > other.pooled_db


def beats_all(facts: SolverFacts) -> bool:
    """Whether a table beats all that it is compared with but the last, Euler's 50 steps."""
    return all(is_better(facts.error, other) for other in facts.compared[:-1])


def best_of_each_name(solvers: Sequence[SolverFacts]) -> list[SolverFacts]:
    """Return one table of each name; budgets searched in different times may have as many calls."""
    best: dict[str, SolverFacts] = {}
    for facts in solvers:
        if facts.name not in best or is_better(facts.error, best[facts.name].error):
            best[facts.name] = facts
    return list(best.values())


def made(
    fit: TableFit, method: Method, compared: Sequence[SolverError], opened: Bundle, plan_set: PlanSet
) -> SolverFacts:
    """Measure a table on the held-out images, and put down what it was calibrated for."""
    config = fit.references.config
    return SolverFacts(
        checkpoint_sha256=opened.manifest.model.checkpoint_sha256,
        table=with_budgets(method, fit.budgets),
        guidance=str(Guidance.parse(config.guidance, fit.references.pipeline.spec)),
        guidance_interval=config.interval,
        schedule=config.budget,
        target=plan_set.target,
        precision=plan_set.precision,
        images=config.images,
        held_out_images=config.held_out.images,
        seed=config.seed,
        error=fit.error(method),
        compared=tuple(compared),
    )


def with_budgets(method: Method, budgets: Budgets) -> SolverTable:
    return replace(method.table(), budgets=_kept(budgets.strong), weak_budgets=_kept(budgets.weak))


def _kept(budgets: tuple[Budget, ...] | None) -> tuple[int, ...] | None:
    return tuple(budget.kept for budget in budgets) if budgets else None


def record(bundle: Bundle, solvers: Sequence[SolverFacts]) -> None:
    """Write tables into the manifest, in place of those of equal names for the same guidance and plan set.

    Raises BundleError if the model changed meanwhile.
    """

    def place(facts: SolverFacts) -> tuple[object, ...]:
        return facts.name, facts.schedule, facts.guidance, facts.guidance_interval, facts.target, facts.precision

    def change(manifest: Manifest) -> Manifest:
        new = {place(facts) for facts in solvers}
        kept = [facts for facts in manifest.solvers if place(facts) not in new]
        return manifest.model_copy(update={"solvers": (*kept, *solvers)})

    recording.record(bundle, solvers[0].checkpoint_sha256, change, remedy="calibrate it again")

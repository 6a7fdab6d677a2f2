"""Compares whole images with those of PyTorch eager: time, error, and distance from real images.

PyTorch does what the reference implementation does: 50 Euler steps at the full budget. All sampling configs run in turn
in one process from the same noise and labels, and by the same sampling code; a pause precedes each, because the threads
of some libraries keep spinning for a moment after a call. Times are comparable within one result only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from elit_export.arrays import HostArray, Pixels
from elit_export.bench.backends import PAUSE_S
from elit_export.bench.contenders import Choices, SamplingConfig
from elit_export.bench.engines import bench_inputs, engine_runner, measured_budgets
from elit_export.bench.stages import OnStage, Stage, run_stages
from elit_export.bench.timing import Timing, timed_in_turn, timing_of
from elit_export.errors import InputError
from elit_export.runtime.conditioning import LabelsLike, numbered
from elit_export.runtime.options import ResolvedOptions, SamplingOptions, resolve
from elit_export.runtime.pipeline import Pipeline
from elit_export.runtime.request import Samplable, prepared
from elit_export.spec import Budget
from elit_export.verify.metrics import SampleError, sample_error

CALL_ROUNDS = 7
AT_ONCE = 16  # images of a part, where no time is taken

# ---------------------------------------------------------------- results


@dataclass(frozen=True)
class Distance:
    """The Fréchet distance from real images, its paired change from PyTorch's, and their standard errors.

    `change_over_error` is 0 where the images do not differ.
    """

    value: float
    error: float
    change: float
    change_error: float

    @property
    def change_over_error(self) -> float:
        return self.change / self.change_error if self.change_error else 0.0


Distances = Callable[[Sequence[Pixels]], Sequence[Distance]]  # of sets of pictures of the same labels, PyTorch's first


@dataclass(frozen=True)
class CallLead:
    """The time of one engine call of a guided image at a plan set's largest budget, and PyTorch's.

    `lead` is PyTorch's time over the engine's.
    """

    plan_set: str
    budget: str
    rows: int
    eager: Timing
    engine: Timing
    lead: float


@dataclass(frozen=True)
class ImageRow:
    """The results of one sampling config.

    `engine_calls` are all calls of one sampling, as a preset's are: those of every part, and those that reuse too.
    `timing` is per image, with the decoder if there is one. `speedup` is PyTorch's time over it, `over_lead` that over
    the lead of one call: what fewer and cheaper calls add. `outside_engines` is the share of the time outside engine
    calls. `error` is relative to the reference solution, None if it was not measured or this config solves another
    equation: other budgets or another guidance. `gain` is by how much it is better than PyTorch's.
    `change_over_error` is that of the distance.
    """

    name: str
    plan_set: str
    options: dict[str, str | float]
    engine_calls: int
    timing: Timing
    speedup: float
    over_lead: float | None
    outside_engines: float
    error: SampleError | None
    gain: SampleError | None
    distance: Distance | None
    change_over_error: float | None


@dataclass(frozen=True)
class WholeImageResult:
    """The results of all sampling configs, PyTorch's first. `reference` names what the reference solution was made by.

    `no_distance` is the reason why there are no distances. `skipped` holds the reason for each plan set that did
    not run.
    """

    rows: int
    rounds: int
    guidance: str
    seed: int
    images: int
    reference: str | None
    evaluator: str | None
    no_distance: str
    calls: list[CallLead]
    configs: list[ImageRow]
    skipped: dict[str, str]


# ---------------------------------------------------------------- measuring


def check_config(on: Samplable, options: SamplingOptions, choices: Choices) -> None:
    """Raise InputError or CalibrationError where images cannot be made so; needs no engines."""
    prepared(on, numbered(on.spec, range(choices.rows), on.coverage.text), options)
    call_of(on, choices)
    if choices.images:
        check_images(on, options, choices)


def check_images(on: Samplable, options: SamplingOptions, choices: Choices) -> None:
    """Raise InputError or CalibrationError where the images whose quality is measured cannot be made so."""
    try:
        prepared(on, numbered(on.spec, range(choices.images), on.coverage.text), options, AT_ONCE)
    except InputError as error:
        raise InputError(error.problem, f"{error.remedy}; or measure times alone: --no-quality") from error


def can_solve(on: Samplable, choices: Choices) -> bool:
    """Whether a plan set takes the calls of the reference solution; needs no engines."""
    try:
        check_images(on, choices.reference_options, choices)
    except InputError:
        return False
    return True


def call_of(on: Samplable, choices: Choices) -> tuple[Budget, int]:
    """Return the largest budget, and the rows of a call in a guided sampling there."""
    name, budget = next(iter(measured_budgets(on).items()))
    conditioning = numbered(on.spec, range(choices.rows), on.coverage.text)
    request = prepared(on, conditioning, replace(choices.eager_options, schedule=name))
    return budget, max(size.rows for size in request.sizes())


def compare_whole_images(
    configs: Sequence[SamplingConfig],
    reference: tuple[str, Pipeline],
    choices: Choices,
    *,
    distances: Distances | None,
    evaluator: str | None,
    no_distance: str,
    skipped: Mapping[str, str],
    on_stage: OnStage,
) -> WholeImageResult:
    """Measure all sampling configs, PyTorch's first. `reference` is what solves the ODE, and its name."""
    measured = _Measurements(configs, reference[1], choices, distances)
    run_stages(measured.stages(), on_stage)
    return WholeImageResult(
        rows=choices.rows,
        rounds=choices.rounds,
        guidance=choices.guidance,
        seed=choices.seed,
        images=choices.images,
        reference=reference[0] if choices.images else None,
        evaluator=evaluator,
        no_distance=no_distance,
        calls=measured.leads,
        configs=measured.rows(),
        skipped=dict(skipped),
    )


@dataclass(frozen=True)
class _Once:
    """The time of one round of a config, per image, and all engine calls of its images."""

    ms: float
    outside_ms: float
    engine_calls: int


class _Measurements:
    """The measurements so far; each stage adds to them."""

    def __init__(
        self, configs: Sequence[SamplingConfig], solver: Pipeline, choices: Choices, distances: Distances | None
    ) -> None:
        self.configs, self.choices = configs, choices
        self.leads: list[CallLead] = []
        self._solver, self._distances = solver, distances
        self._times: list[list[_Once]] = [[] for _ in configs]
        self._samples: list[HostArray] = []
        self._expected: HostArray | None = None
        self._judged: Sequence[Distance | None] = [None] * len(configs)

    def stages(self) -> Iterator[Stage]:
        eager, *others = self.configs
        by_plan_set = {config.plan_set: config for config in others}
        yield from ((f"{config.name}: warm-up", partial(self._warm_up, config)) for config in self.configs)
        yield from (
            (f"{name}: single calls", partial(self._time_calls, eager, config)) for name, config in by_plan_set.items()
        )
        for number in range(1, self.choices.rounds + 1):
            for config, times in zip(self.configs, self._times, strict=True):
                yield f"{config.name}: round {number}", partial(self._time_image, config, times)
        if self.choices.images:
            yield "reference solution", self._solve
            yield from (
                (f"{config.name}: {self.choices.images} images", partial(self._sample, config))
                for config in self.configs
            )
        if self._distances:
            yield "distances", self._judge

    def _warm_up(self, config: SamplingConfig) -> None:
        """Run a call of each size that the sampling makes: a whole sampling of a large model would take a minute."""
        request = config.pipeline.prepared(self._conditioning(self.choices.rows), config.options)
        for size in dict.fromkeys(request.sizes()):
            engine_runner(config.pipeline, size.budget)(bench_inputs(config.pipeline, size.budget, size.rows))

    def _time_calls(self, eager: SamplingConfig, config: SamplingConfig) -> None:
        budget, rows = call_of(config.pipeline, self.choices)
        inputs = bench_inputs(config.pipeline, budget, rows)
        runners = {each.name: partial(engine_runner(each.pipeline, budget), inputs) for each in (eager, config)}
        timings = timed_in_turn(runners, rounds=CALL_ROUNDS, before=pause)
        of_eager, of_engine = timings[eager.name], timings[config.name]
        lead = of_eager.median_ms / of_engine.median_ms
        self.leads.append(CallLead(config.plan_set, str(budget), rows, of_eager, of_engine, lead))

    def _time_image(self, config: SamplingConfig, times: list[_Once]) -> None:
        pause()
        times.append(once(config, self._conditioning(self.choices.rows)))

    def _conditioning(self, images: int) -> LabelsLike:
        """Return the same for all configs: PyTorch would take longer texts than engines do."""
        *_, config = self.configs
        return numbered(config.pipeline.spec, range(images), config.pipeline.coverage.text)

    def _solve(self) -> None:
        self._expected = self._sampled(self._solver, self.choices.reference_options)

    def _sample(self, config: SamplingConfig) -> None:
        self._samples.append(self._sampled(config.pipeline, config.options))

    def _sampled(self, pipeline: Pipeline, options: SamplingOptions) -> HostArray:
        return pipeline.run(pipeline.prepared(self._conditioning(self.choices.images), options, AT_ONCE)).latents

    def _judge(self) -> None:
        assert self._distances
        self._judged = self._distances(
            [
                config.decode(samples)
                for config, samples in zip(self.configs, self._samples, strict=True)
                if config.decode
            ]
        )

    def rows(self) -> list[ImageRow]:
        timings = [timing_of([once.ms for once in times]) for times in self._times]
        errors = self._errors()
        leads = {lead.plan_set: lead.lead for lead in self.leads}
        return [
            image_row(config, times, timing, timings[0], leads.get(config.plan_set), (error, errors[0]), distance)
            for config, times, timing, error, distance in zip(
                self.configs, self._times, timings, errors, self._judged, strict=True
            )
        ]

    def _errors(self) -> list[SampleError | None]:
        if self._expected is None:
            return [None] * len(self.configs)
        solved = resolved(self._solver, self.choices.reference_options)
        return [
            sample_error(samples, self._expected)
            if same_equation(resolved(config.pipeline, config.options), solved)
            else None
            for config, samples in zip(self.configs, self._samples, strict=True)
        ]


def image_row(
    config: SamplingConfig,
    times: Sequence[_Once],
    timing: Timing,
    eager: Timing,
    lead: float | None,
    errors: tuple[SampleError | None, SampleError | None],
    distance: Distance | None,
) -> ImageRow:
    """Put a row together; `errors` are its own and PyTorch's."""
    error, of_eager = errors
    speedup = eager.median_ms / timing.median_ms
    return ImageRow(
        name=config.name,
        plan_set=config.plan_set,
        options=config.options.scalars,
        engine_calls=times[0].engine_calls,
        timing=timing,
        speedup=speedup,
        over_lead=speedup / lead if lead else None,
        outside_engines=sum(once.outside_ms for once in times) / sum(once.ms for once in times),
        error=error,
        gain=error - of_eager if error and of_eager else None,
        distance=distance,
        change_over_error=distance.change_over_error if distance else None,
    )


def resolved(pipeline: Pipeline, options: SamplingOptions) -> ResolvedOptions:
    return resolve(pipeline.spec, options, pipeline.coverage.solvers, pipeline.coverage.no_solvers)


def same_equation(one: ResolvedOptions, other: ResolvedOptions) -> bool:
    """Whether two samplings solve the same ODE: one budget at all times in both, and the same guidance."""
    budgets = {budget for each in (one, other) for budget in (*each.schedule, *(each.weak or ()))}
    return len(budgets) == 1 and one.guidance == other.guidance


def once(config: SamplingConfig, conditioning: LabelsLike) -> _Once:
    """Make images, pictures if they can be, and take the time."""
    started = time.perf_counter()
    sample = config.pipeline.sampled(conditioning, config.options)
    sampled = time.perf_counter()
    if config.decode:
        config.decode(sample.latents)
    ended = time.perf_counter()
    decoder_s = ended - sampled if config.pipeline.data.kind == "vae" else 0.0
    outside_s = ended - started - sample.timings.engines_s - decoder_s
    images = len(sample.latents)
    return _Once((ended - started) * 1e3 / images, outside_s * 1e3 / images, len(sample.calls))


def pause() -> None:
    time.sleep(PAUSE_S)

"""Measures what budgets, precisions and step counts cost in sample quality, judged by an evaluator.

All rows sample the same labels from the same noise, so their differences are paired: the standard error of a
difference is far smaller than that of a row (`evaluate/paired.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from elit_export.arrays import Float64, Pixels
from elit_export.bench.engines import measured_budgets
from elit_export.errors import InputError
from elit_export.evaluate.paired import Estimate, Judge, Judged
from elit_export.evaluate.protocol import Evaluator, check_evaluator
from elit_export.evaluate.statistics import Baseline, EvaluatorFacts
from elit_export.runtime.images import to_images
from elit_export.runtime.options import SamplingOptions
from elit_export.runtime.pipeline import Pipeline
from elit_export.runtime.request import Samplable, prepared
from elit_export.runtime.samplers import sampler_named
from elit_export.runtime.sampling import sampling_steps
from elit_export.spec import Budget
from elit_export.spec.limits import STEPS
from elit_export.verify.metrics import difference

OnImages = Callable[..., None]  # called with (label, evaluations done, total=evaluations of this pipeline)


@dataclass(frozen=True)
class SamplerConfig:
    """A sampler and its number of steps."""

    sampler: str
    steps: int

    @classmethod
    def parse(cls, text: str) -> SamplerConfig:
        """Read `euler:50`; raises InputError."""
        name, _, steps = text.partition(":")
        if not steps.isdecimal():
            raise InputError(f"sampling {text!r} is not SAMPLER:STEPS, e.g. euler:50")
        sampler = sampler_named(name)
        if sampler.uses_noise:
            raise InputError(f"sampling {text!r}: {name} draws noise at every step, so rows could not be compared")
        return cls(sampler.name, STEPS.whole(steps, f"sampling {name}: steps"))

    @property
    def calls(self) -> int:
        return sampler_named(self.sampler).calls(self.steps)

    def __str__(self) -> str:
        return f"{self.sampler} {self.steps}"


DEFAULT_CONFIGS = (SamplerConfig("euler", 50), SamplerConfig("ab3", 14))


@dataclass(frozen=True)
class QualityRow:
    """The quality of one plan set at one budget with one sampler config, which the field `way` names.

    `agreement` is the share of images whose predicted class is the requested one. The changes are relative to the first
    row of all, and include all that differs from it: budget, sampler, steps, precision. `sqnr_db` compares the samples
    with those of the same config in the first plan set at its largest budget, None for these themselves.
    """

    target: str
    precision: str
    name: str
    budget: str
    way: str
    calls: int
    agreement: Estimate
    agreement_change: Estimate
    frechet: Estimate
    frechet_change: Estimate
    sqnr_db: float | None


@dataclass(frozen=True)
class QualityResult:
    """Holds all rows, and the values of real images.

    These are `real_agreement` and two real-vs-real baselines: `halves_floor`, and `floor` at about as many images.
    """

    images: int
    guidance: str
    seed: int
    features: int
    real_images: int
    real_agreement: float
    halves_floor: Baseline
    floor: Baseline
    rows: list[QualityRow]
    skipped: dict[str, str]


def quality(
    pipelines: Iterable[tuple[str, Pipeline]],
    evaluator: Evaluator,
    *,
    images: int,
    guidance: str,
    sampler_configs: tuple[SamplerConfig, ...],
    seed: int,
    skipped: dict[str, str],
    on_images: OnImages,
) -> QualityResult:
    """Measure every sampler config at every named budget of each (target, pipeline), one pipeline after the other.

    `skipped` holds the reason why other plan sets of the bundle are left out. `on_images` is called with what was
    sampled and the number of evaluations. Raises InputError before anything is sampled.
    """
    maker = _Rows(evaluator, images, seed)
    rows = [
        row
        for target, pipeline in pipelines
        for row in maker.rows(target, pipeline, guidance=guidance, sampler_configs=sampler_configs, on_images=on_images)
    ]
    facts = evaluator.facts
    return QualityResult(
        images=images,
        guidance=guidance,
        seed=seed,
        features=facts.spec.features,
        real_images=facts.test_images,
        real_agreement=facts.test_accuracy,
        halves_floor=facts.halves_baseline,
        floor=facts.baseline_at(images),
        rows=rows,
        skipped=skipped,
    )


# ---------------------------------------------------------------- checks


def check_quality(
    on: Samplable, facts: EvaluatorFacts, *, images: int, guidance: str, sampler_configs: tuple[SamplerConfig, ...]
) -> None:
    """Raise InputError where samples cannot be evaluated, or not sampled so; needs no engines."""
    check_evaluator(on, facts, images)
    labels = np.arange(images) % facts.spec.num_classes
    for config in sampler_configs:
        for name in measured_budgets(on):
            prepared(on, labels.tolist(), options_of(config, name, guidance, seed=0))


# ---------------------------------------------------------------- sampling


def options_of(config: SamplerConfig, budget: str, guidance: str, seed: int) -> SamplingOptions:
    return SamplingOptions(sampler=config.sampler, steps=config.steps, schedule=budget, guidance=guidance, seed=seed)


@dataclass(frozen=True, eq=False)
class _Measured:
    """The samples of one row and their evaluation."""

    samples: Float64
    judged: Judged


class _Rows:
    """Makes rows, and keeps what they are compared with: the first row of all, and the first of each sampler config."""

    def __init__(self, evaluator: Evaluator, images: int, seed: int) -> None:
        self._evaluator, self._images, self._seed = evaluator, images, seed
        self._labels = np.arange(images) % evaluator.facts.spec.num_classes
        self._judge = Judge(evaluator, self._labels, seed)
        self._firsts: dict[SamplerConfig, _Measured] = {}

    def rows(
        self,
        target: str,
        pipeline: Pipeline,
        *,
        guidance: str,
        sampler_configs: tuple[SamplerConfig, ...],
        on_images: OnImages,
    ) -> Iterator[QualityRow]:
        facts, images = self._evaluator.facts, self._images
        check_quality(pipeline, facts, images=images, guidance=guidance, sampler_configs=sampler_configs)
        budgets = measured_budgets(pipeline)
        configs = [
            (config, name, options_of(config, name, guidance, self._seed))
            for config in sampler_configs
            for name in budgets
        ]
        total = sum(images * config.calls for config, _, _ in configs)
        for config, name, options in configs:
            samples, pixels = self._sampled(pipeline, options, partial(on_images, f"{config}, {name}", total=total))
            measured = _Measured(samples, self._judge.judged(pixels))
            yield self._row(measured, target, pipeline, config, name, budgets[name])

    def _sampled(
        self, pipeline: Pipeline, options: SamplingOptions, on_images: Callable[..., None]
    ) -> tuple[Float64, Pixels]:
        """Sample (n, C, H, W) and make pixels; `on_images` hears the evaluations of every step."""
        request, finished = pipeline.prepared(self._labels.tolist(), options), []
        steps = len(request.schedule)
        for record in sampling_steps(pipeline.bank, request):  # a Sample would keep the states of every step
            on_images(len(record.images) * len(request.sampler.nodes(record.index, steps)))
            if record.index == steps - 1:
                finished.append(record.x)
        samples = np.concatenate(finished)
        return samples, np.ascontiguousarray(to_images(samples, pipeline.data).transpose(0, 3, 1, 2))

    def _row(
        self, measured: _Measured, target: str, pipeline: Pipeline, config: SamplerConfig, name: str, budget: Budget
    ) -> QualityRow:
        first_of_config = self._firsts.setdefault(config, measured)
        first = next(iter(self._firsts.values()))
        is_reference = measured is first_of_config
        return QualityRow(
            target=target,
            precision=pipeline.bank.precision.value,
            name=name,
            budget=str(budget),
            way=str(config),
            calls=config.calls,
            agreement=measured.judged.agreement,
            agreement_change=measured.judged.agreement_change(first.judged),
            frechet=measured.judged.frechet,
            frechet_change=measured.judged.frechet_change(first.judged),
            sqnr_db=None if is_reference else difference(measured.samples, first_of_config.samples).sqnr_db,
        )

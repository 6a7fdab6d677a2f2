"""What a budget, a precision and a step cost in the quality of samples, as a classifier of real images sees it.

All rows sample the same labels from the same noise, so their differences are paired: errors of a difference are far
smaller than those of the rows. Errors of Fréchet distances are of a bootstrap that draws images within their class.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from elit_export.arrays import Bools, Float64, Int64, Pixels
from elit_export.bench.engines import measured_budgets
from elit_export.errors import InputError
from elit_export.evaluate.statistics import Floor, Gaussian, Judge, JudgeFacts, check_images, share_of
from elit_export.evaluate.statistics import frechet_distance as apart
from elit_export.runtime.conditioning import require_classes
from elit_export.runtime.noise import SeededNoise
from elit_export.runtime.options import SamplingOptions, resolve
from elit_export.runtime.pipeline import Pipeline
from elit_export.runtime.request import call_sizes
from elit_export.runtime.samplers import sampler_named
from elit_export.spec import Budget
from elit_export.verify.metrics import difference

OnImages = Callable[..., None]  # hears (what, evaluations done, total=all of this pipeline)
RESAMPLINGS = 50
REMEDY = "train one with `elit-export train-classifier DATA --out FILE.safetensors` and give --classifier FILE"


@dataclass(frozen=True)
class Way:
    """A sampler and its steps."""

    sampler: str
    steps: int

    @classmethod
    def parse(cls, text: str) -> Way:
        """Read `euler:50`; raises InputError."""
        name, _, steps = text.partition(":")
        if not steps.isdecimal():
            raise InputError(f"way {text!r} is not SAMPLER:STEPS, e.g. euler:50")
        sampler = sampler_named(name)
        if sampler.uses_noise:
            raise InputError(f"way {text!r}: {name} draws noise at every step, so that rows could not be compared")
        return cls(sampler.name, int(steps))

    @property
    def calls(self) -> int:
        return sampler_named(self.sampler).calls(self.steps)

    def __str__(self) -> str:
        return f"{self.sampler} {self.steps}"


WAYS = (Way("euler", 50), Way("ab3", 14))


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error."""

    value: float
    error: float


@dataclass(frozen=True)
class QualityRow:
    """One budget, way and plan set.

    `agreement` is the share of images whose predicted class is the asked one. The changes are to the first row of all,
    and count whatever differs from it: budget, way, precision. `sqnr_db` compares the samples with those of the same
    way in the first plan set at its largest budget, None for these themselves.
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
    """All rows, and what real images reach: `real_agreement`, `halves_floor`, and `floor` at about as many images."""

    images: int
    guidance: str
    seed: int
    features: int
    real_images: int
    real_agreement: float
    halves_floor: Floor
    floor: Floor
    rows: list[QualityRow]
    skipped: dict[str, str]


def quality(
    opened: Iterable[tuple[str, Pipeline]],
    judge: Judge,
    *,
    images: int,
    guidance: str,
    ways: tuple[Way, ...],
    seed: int,
    skipped: dict[str, str],
    on_images: OnImages,
) -> QualityResult:
    """Measure every way at every named budget of each (target, pipeline), one pipeline after the other.

    `skipped` says why other plan sets of the bundle are not among them. `on_images` hears what was sampled and
    how many engine evaluations of an image that took. Raises InputError before anything is sampled.
    """
    table = _Table(judge, images, seed)
    rows = [
        row
        for target, pipeline in opened
        for row in table.rows(target, pipeline, guidance=guidance, ways=ways, on_images=on_images)
    ]
    facts = judge.facts
    return QualityResult(
        images=images,
        guidance=guidance,
        seed=seed,
        features=facts.spec.features,
        real_images=facts.test_images,
        real_agreement=facts.test_accuracy,
        halves_floor=facts.halves_floor,
        floor=facts.floor_at(images),
        rows=rows,
        skipped=skipped,
    )


# ---------------------------------------------------------------- what can be judged


def check_judge(pipeline: Pipeline, facts: JudgeFacts, images: int) -> None:
    """Raises InputError where the classifier cannot judge the pipeline's samples."""
    spec, data, judged = pipeline.spec, pipeline.data, facts.spec
    require_classes(spec, "judging samples by a classifier")
    if data.kind != "pixels":
        raise InputError(f"the samples are latents of a VAE ({data.vae or 'unknown'}); quality is of pixels only")
    shape = (judged.channels, judged.size, judged.size)
    if spec.sample_shape != shape:
        raise InputError(f"the samples are {spec.sample_shape}, the classifier takes {shape}", REMEDY)
    if spec.num_classes != judged.num_classes:
        raise InputError(
            f"the model has {spec.num_classes} classes, the classifier {judged.num_classes}",
            f"{REMEDY} of the same data",
        )
    if data.class_names and facts.class_names and data.class_names != facts.class_names:
        raise InputError(
            f"the model's classes are {', '.join(data.class_names)}, the classifier's {', '.join(facts.class_names)}",
            f"{REMEDY} of the same data",
        )
    check_images(images, judged.features)


# ---------------------------------------------------------------- sampling


def batches(pipeline: Pipeline, options: SamplingOptions, images: int) -> list[Int64]:
    """The images in parts as even as can be, none with more rows than the profiles take."""
    limits = []
    for size in set(call_sizes(resolve(pipeline.spec, options), images=1)):
        serving = [profile.rows.max for profile in pipeline.coverage.serving(size.budget)]
        limits.append(max(serving, default=0) // size.rows)
    at_once = max(1, min(limits))  # too few for one image is refused in sampling
    return np.array_split(np.arange(images), math.ceil(images / at_once))


def options_of(way: Way, budget: str, guidance: str) -> SamplingOptions:
    return SamplingOptions(sampler=way.sampler, steps=way.steps, schedule=budget, guidance=guidance)


@dataclass(frozen=True, eq=False)
class _Taken:
    """One row's samples and what the judge said; `resampled` are the distances of the bootstrap's draws."""

    samples: Float64
    is_right: Bools  # (n,)
    frechet: float
    resampled: Float64  # (RESAMPLINGS,)


class _Table:
    """Rows that remember what they are compared with: the first of all, and the first of each way."""

    def __init__(self, judge: Judge, images: int, seed: int) -> None:
        self._judge, self._images, self._seed = judge, images, seed
        self._labels = np.arange(images) % judge.facts.spec.num_classes
        self._draws = resampled_within(self._labels, np.random.default_rng(seed), RESAMPLINGS)
        self._firsts: dict[Way, _Taken] = {}

    def rows(
        self,
        target: str,
        pipeline: Pipeline,
        *,
        guidance: str,
        ways: tuple[Way, ...],
        on_images: OnImages,
    ) -> Iterator[QualityRow]:
        check_judge(pipeline, self._judge.facts, self._images)
        budgets = measured_budgets(pipeline)
        todo = [(way, name, options_of(way, name, guidance)) for way in ways for name in budgets]
        total = sum(self._images * way.calls for way, _, _ in todo)
        for _, _, options in todo:
            part = batches(pipeline, options, self._images)[0]
            pipeline.prepared(self._labels[part].tolist(), options)
        for way, name, options in todo:
            samples, pixels = self._sampled(pipeline, options, partial(on_images, f"{way}, {name}", total=total))
            yield self._row(self._taken(samples, pixels), target, pipeline, way, name, budgets[name])

    def _sampled(
        self, pipeline: Pipeline, options: SamplingOptions, on_images: Callable[..., None]
    ) -> tuple[Float64, Pixels]:
        """Samples (n, C, H, W) and their pixels; image i starts from the noise of (seed, i), whatever the parts."""
        noise = SeededNoise(self._seed, self._images, pipeline.spec.sample_shape)()
        calls = Way(options.sampler, options.steps).calls
        found = []
        for part in batches(pipeline, options, self._images):
            own = replace(options, noise=noise[part], seed=int(part[0]))  # the seed is of what stochastic samplers add
            found.append(pipeline.sampled(self._labels[part].tolist(), own))
            on_images(len(part) * calls)
        pixels = np.concatenate([sample.images for sample in found]).transpose(0, 3, 1, 2)
        return np.concatenate([sample.latents for sample in found]), np.ascontiguousarray(pixels)

    def _taken(self, samples: Float64, pixels: Pixels) -> _Taken:
        features, predicted = self._judge.look(pixels)
        real = self._judge.facts.real
        resampled = [apart(real, Gaussian.fit(features[draw])) for draw in self._draws]
        return _Taken(samples, predicted == self._labels, apart(real, Gaussian.fit(features)), np.array(resampled))

    def _row(self, taken: _Taken, target: str, pipeline: Pipeline, way: Way, name: str, budget: Budget) -> QualityRow:
        first_of_way = self._firsts.setdefault(way, taken)
        first = next(iter(self._firsts.values()))
        changed = taken.is_right.astype(float) - first.is_right
        is_own = taken is first_of_way
        return QualityRow(
            target=target,
            precision=pipeline.bank.precision.value,
            name=name,
            budget=str(budget),
            way=str(way),
            calls=way.calls,
            agreement=Estimate(*share_of(taken.is_right)),
            agreement_change=Estimate(float(changed.mean()), float(changed.std(ddof=1)) / math.sqrt(len(changed))),
            frechet=Estimate(taken.frechet, float(taken.resampled.std(ddof=1))),
            frechet_change=Estimate(
                taken.frechet - first.frechet, float((taken.resampled - first.resampled).std(ddof=1))
            ),
            sqnr_db=None if is_own else difference(taken.samples, first_of_way.samples).sqnr_db,
        )


def resampled_within(labels: Int64, rng: np.random.Generator, draws: int) -> Int64:  # (draws, n)
    """Images drawn with replacement, each from those of its own class."""
    found = np.empty((draws, len(labels)), np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        found[:, members] = rng.choice(members, (draws, len(members)))
    return found

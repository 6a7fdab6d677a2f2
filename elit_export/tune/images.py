"""Samples the images of configs and measures them: errors against the reference solution, distances by an evaluator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from elit_export.arrays import Float64, HostArray, Int64, Pixels
from elit_export.bundle.presets import PresetOptions
from elit_export.evaluate.paired import RESAMPLINGS, resampled_within
from elit_export.evaluate.protocol import ImageEvaluator
from elit_export.runtime.conditioning import numbered
from elit_export.runtime.pipeline import Pipeline
from elit_export.runtime.sampling import sampling_steps
from elit_export.tune.pareto import Distance, Errors
from elit_export.tune.space import Config, Space, sampling_options

REFERENCE_STEPS = 160  # of ab3
Keep = Callable[[str, Callable[[], Any]], Any]  # a study's `kept`


class Images:
    """Samples the images of one seed: what each config makes of the same noise and labels.

    Results are kept by `keep`, under names with the seed and the number of images.
    """

    def __init__(self, pipelines: Mapping[str, Pipeline], reference: Config, *, seed: int, keep: Keep) -> None:
        self._pipelines, self._reference, self._seed, self._keep = pipelines, reference, seed, keep
        self._solutions: dict[int, HostArray] = {}

    def errors(self, config: Config, images: int) -> Errors:
        """Return the errors of so many images against the reference solution, which is sampled when first needed."""
        stored = self._keep(self._name("errors", config, images), lambda: self._errors(config, images))
        return Errors(np.array(stored["noise"]), np.array(stored["signal"]))

    def _errors(self, config: Config, images: int) -> dict[str, list[float]]:
        solution = self._solution(images)
        noise = _energy(self.latents(config, images) - solution)
        return {"noise": noise.tolist(), "signal": _energy(solution).tolist()}

    def _solution(self, images: int) -> HostArray:
        if images not in self._solutions:
            self._solutions[images] = self.latents(self._reference, images)
        return self._solutions[images]

    def distance(self, config: Config, images: int, evaluator: ImageEvaluator) -> Distance:
        """Return the distance of so many images from real ones, and of the bootstrap's draws, shared by all configs."""
        stored = self._keep(self._name("distance", config, images), lambda: self._distance(config, images, evaluator))
        return Distance(stored["value"], np.array(stored["resampled"]))

    def _distance(self, config: Config, images: int, evaluator: ImageEvaluator) -> dict[str, Any]:
        labels = self._labels(config, images)
        features = evaluator.features_of(self._pixels(config, images), labels)
        draws = resampled_within(labels, np.random.default_rng(self._seed), RESAMPLINGS)
        resampled = [evaluator.distance(features[draw]) for draw in draws]
        return {"value": evaluator.distance(features), "resampled": resampled}

    def _pixels(self, config: Config, images: int) -> Pixels:
        pictures = self._pipelines[config.plan_set].decode(self.latents(config, images))
        return np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))

    def _labels(self, config: Config, images: int) -> Int64:
        return np.arange(images) % self._pipelines[config.plan_set].spec.num_classes

    def latents(self, config: Config, images: int) -> Float64:
        """Sample (images, C, H, W); the states of earlier steps are not held."""
        pipeline = self._pipelines[config.plan_set]
        conditioning = numbered(pipeline.spec, range(images), pipeline.coverage.text)
        request = pipeline.prepared(conditioning, sampling_options(config.options, seed=self._seed))
        last = len(request.schedule) - 1
        parts = [record.x for record in sampling_steps(pipeline.bank, request) if record.index == last]
        return np.concatenate(parts)

    def _name(self, what: str, config: Config, images: int) -> str:
        return f"{what} of {images} images of seed {self._seed}: {config.key}"


def _energy(values: HostArray) -> Float64:
    """Compute the sum of squares of each image."""
    energy: Float64 = np.square(values, dtype=np.float64).sum(axis=(1, 2, 3))
    return energy


def reference_config(space: Space, plan_set: str) -> Config:
    """Return the config of the reference solution, computed by one plan set."""
    options = PresetOptions(sampler="ab3", steps=REFERENCE_STEPS, schedule=space.largest, guidance=space.guidance)
    return Config(plan_set, options)

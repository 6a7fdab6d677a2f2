"""What judges images: the protocol of every evaluator, and the one that goes by a classifier of real images."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from elit_export.arrays import Float64, Int64, Pixels
from elit_export.errors import InputError
from elit_export.evaluate.statistics import EvaluatorFacts, Gaussian, check_images, frechet_distance
from elit_export.runtime.conditioning import require_classes
from elit_export.runtime.request import Samplable

REMEDY = "train one with `elit-export train-classifier DATA --out FILE.safetensors` and give --classifier FILE"


class ImageEvaluator(Protocol):
    """Features of images, and how far those of many images are from the features of real ones."""

    @property
    def name(self) -> str:
        """Say in a word or two what it is, for tables."""

    @property
    def sha256(self) -> str:
        """Identify what it judges by: distances of two evaluators are not comparable."""

    def check(self, on: Samplable, images: int) -> None:
        """Raise InputError where it does not fit the samples of a model, or so few images."""

    def features_of(self, pixels: Pixels, labels: Int64) -> Float64:  # (n, C, H, W), (n,) → (n, F)
        """Compute the features of each image; those of one depend on that image alone."""

    def distance(self, features: Float64) -> float:  # (n, F)
        """Compute the Fréchet distance of images with these features from real ones."""


@dataclass(frozen=True, eq=False)
class Evaluator:
    """A classifier with the statistics of real images. `look` gives features (n, F) and predicted labels (n,)."""

    look: Callable[[Pixels], tuple[Float64, Int64]]  # (n, C, H, W)
    facts: EvaluatorFacts

    @property
    def name(self) -> str:
        return f"classifier of {self.facts.spec.features} features"

    @property
    def sha256(self) -> str:
        real = self.facts.real
        return hashlib.sha256(real.mean.tobytes() + real.covariance.tobytes()).hexdigest()

    def check(self, on: Samplable, images: int) -> None:
        check_evaluator(on, self.facts, images)

    def features_of(self, pixels: Pixels, labels: Int64) -> Float64:  # noqa: ARG002 (others judge by the label too)
        features, _ = self.look(pixels)
        return features

    def distance(self, features: Float64) -> float:
        return frechet_distance(self.facts.real, Gaussian.fit(features))


def check_evaluator(on: Samplable, facts: EvaluatorFacts, images: int) -> None:
    """Raise InputError where the evaluator does not fit the samples."""
    spec, data, classifier = on.spec, on.data, facts.spec
    require_classes(spec, "judging samples by a classifier")
    if data.kind != "pixels":
        raise InputError(f"the samples are latents of a VAE ({data.vae or 'unknown'}); quality is of pixels only")
    shape = (classifier.channels, classifier.size, classifier.size)
    if spec.sample_shape != shape:
        raise InputError(f"the samples are {spec.sample_shape}, the classifier takes {shape}", REMEDY)
    if spec.num_classes != classifier.num_classes:
        raise InputError(
            f"the model has {spec.num_classes} classes, the classifier {classifier.num_classes}",
            f"{REMEDY} of the same data",
        )
    if data.class_names and facts.class_names and data.class_names != facts.class_names:
        raise InputError(
            f"the model's classes are {', '.join(data.class_names)}, the classifier's {', '.join(facts.class_names)}",
            f"{REMEDY} of the same data",
        )
    check_images(images, classifier.features)

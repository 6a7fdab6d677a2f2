"""Trains the classifier of an evaluator, and measures its statistics on the real test images.

All randomness of step i is a function of (seed, i).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from elit_export.errors import InputError
from elit_export.evaluate.classifier import Classifier, initialise
from elit_export.evaluate.statistics import ClassifierSpec, EvaluatorFacts, Gaussian, baselines, check_halves, share_of
from elit_export.spec.limits import BATCH, TRAINING_STEPS
from elit_export.training.data import LabelledImages
from elit_export.training.trainer import epoch_batch, generator_for

WEIGHT_DECAY = 0.05
SMOOTHING = 0.05  # of labels
WARMUP_SHARE = 0.1  # of the steps


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """The settings of one training run."""

    steps: int
    batch_size: int
    learning_rate: float
    seed: int

    def __post_init__(self) -> None:
        for name, minimum in (("steps", 1), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < minimum:
                raise InputError(f"{name} is {getattr(self, name)}, must be at least {minimum}")
        TRAINING_STEPS.check(self.steps, "steps")
        BATCH.check(self.batch_size, "batch_size")
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"learning_rate is {self.learning_rate}, must be positive")


def train_classifier(
    spec: ClassifierSpec, data: LabelledImages, config: ClassifierConfig, *, on_step: Callable[[int, float], None]
) -> Classifier:
    """Train a classifier on data that `check_data` accepted; its weights are rounded to half precision.

    `on_step` is called with the number and the loss of every step.
    """
    classifier = initialise(Classifier(spec), generator_for(config.seed))
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=WEIGHT_DECAY, fused=True)
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        loss = _loss(classifier, data, config, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        on_step(step + 1, loss.item())
    return classifier.half().float().eval()


def check_data(spec: ClassifierSpec, train: LabelledImages, test: LabelledImages, config: ClassifierConfig) -> None:
    """Check the data before training; raises InputError."""
    shape = (spec.channels, spec.size, spec.size)
    for images in (train, test):
        if images.images.shape[1:] != shape:
            raise InputError(f"images are {images.images.shape[1:]}, the classifier takes {shape}")
        if images.num_classes > spec.num_classes:
            raise InputError(f"the data has {images.num_classes} classes, the classifier {spec.num_classes}")
    if len(train) < config.batch_size:
        raise InputError(f"batch_size {config.batch_size} is more than the {len(train)} images there are")
    check_halves(len(test), spec.features)


def learning_rate(config: ClassifierConfig, step: int) -> float:
    """Compute a linear warm-up, then a linear decay to nearly zero."""
    warmup = max(1, round(WARMUP_SHARE * config.steps))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    return config.learning_rate * (config.steps - step) / (config.steps - warmup + 1)


def _loss(classifier: Classifier, data: LabelledImages, config: ClassifierConfig, step: int) -> Tensor:
    indices = epoch_batch(len(data), config.batch_size, config.seed, step)
    pixels = mirrored(torch.from_numpy(data.images[indices]), generator_for(config.seed, step))
    labels = torch.from_numpy(data.labels[indices])
    return F.cross_entropy(classifier(pixels), labels, label_smoothing=SMOOTHING)


def mirrored(pixels: Tensor, generator: torch.Generator) -> Tensor:  # (B, C, H, W)
    """Flip about half of the images left to right."""
    is_mirrored = torch.rand(len(pixels), generator=generator) < 0.5
    return torch.where(is_mirrored[:, None, None, None], pixels.flip(3), pixels)


def evaluator_facts(
    classifier: Classifier, train: LabelledImages, test: LabelledImages, *, command: str
) -> EvaluatorFacts:
    """Measure the statistics of the real test images; raises InputError where these are too few for the features."""
    features, predicted = classifier.look(test.images)
    measured = tuple(baselines(features, test.labels, seed=0))
    return EvaluatorFacts(
        spec=classifier.spec,
        real=Gaussian.fit(features),
        test_images=len(test),
        test_accuracy=share_of(predicted == test.labels)[0],
        floors=measured,
        class_names=test.class_names,
        train_sha256=train.sha256,
        test_sha256=test.sha256,
        command=command,
    )

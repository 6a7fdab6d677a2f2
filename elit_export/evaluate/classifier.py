"""A small convolutional classifier, whose features measure how far generated images are from real ones.

The features of an image depend on that image alone: norms are over groups of channels, not over the batch.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elit_export.arrays import Float64, Int64, Pixels
from elit_export.evaluate.statistics import SIDE_DIVISOR, ClassifierSpec

NORM_GROUPS = 8
BATCH = 250


class Classifier(nn.Module):
    """Three convolutional stages that each halve the side, a linear layer to F features, a linear layer to classes."""

    def __init__(self, spec: ClassifierSpec) -> None:
        super().__init__()
        self.spec = spec
        width, side = spec.width, spec.size // SIDE_DIVISOR
        self.body = nn.Sequential(
            *conv_stage(nn.Conv2d(spec.channels, width, 5, stride=2, padding=2)),
            *conv_stage(nn.Conv2d(width, 2 * width, 3, padding=1)),
            nn.MaxPool2d(2),
            *conv_stage(nn.Conv2d(2 * width, 3 * width, 3, padding=1)),
            nn.MaxPool2d(2),
        )
        self.to_features = nn.Linear(3 * width * side * side, spec.features)
        self.to_classes = nn.Linear(spec.features, spec.num_classes)

    def features(self, pixels: Tensor) -> Tensor:  # (B, C, H, W) uint8
        """Compute features (B, F), before the non-linearity: near a full-rank Gaussian."""
        signal = pixels.float() / 127.5 - 1
        features: Tensor = self.to_features(self.body(signal).flatten(1))
        return features

    def classes(self, features: Tensor) -> Tensor:  # (B, F)
        """Compute logits (B, classes)."""
        logits: Tensor = self.to_classes(F.gelu(features))
        return logits

    def forward(self, pixels: Tensor) -> Tensor:
        return self.classes(self.features(pixels))

    @torch.inference_mode()
    def look(self, images: Pixels) -> tuple[Float64, Int64]:  # (n, C, H, W)
        """Compute features (n, F) and predicted labels (n,) of any number of images, in batches."""
        batches = (images[start : start + BATCH] for start in range(0, len(images), BATCH))
        features = torch.cat([self.features(torch.from_numpy(batch)) for batch in batches])
        return features.numpy().astype(np.float64), self.classes(features).argmax(dim=1).numpy()


def conv_stage(convolution: nn.Conv2d) -> Iterator[nn.Module]:
    """Yield the modules of one stage: convolution, norm, ReLU."""
    yield convolution
    yield nn.GroupNorm(NORM_GROUPS, convolution.out_channels)
    yield nn.ReLU()


def initialise(classifier: Classifier, generator: torch.Generator) -> Classifier:
    """Fill a new classifier: He initialisation for convolutions, Glorot for linear layers, zero biases."""
    for module in classifier.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight, generator=generator)
        if isinstance(module, nn.Conv2d | nn.Linear):
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    return classifier

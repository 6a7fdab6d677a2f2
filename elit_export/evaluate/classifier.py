"""A small convolutional classifier, whose features tell how far generated images are from real ones.

An image's features depend on that image alone: the norms are over groups of channels, not over the batch.
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
LOOKED_AT_ONCE = 250


class Classifier(nn.Module):
    """Three stages that halve the side, then F features, then classes."""

    def __init__(self, spec: ClassifierSpec) -> None:
        super().__init__()
        self.spec = spec
        width, side = spec.width, spec.size // SIDE_DIVISOR
        self.body = nn.Sequential(
            *stage(nn.Conv2d(spec.channels, width, 5, stride=2, padding=2)),
            *stage(nn.Conv2d(width, 2 * width, 3, padding=1)),
            nn.MaxPool2d(2),
            *stage(nn.Conv2d(2 * width, 3 * width, 3, padding=1)),
            nn.MaxPool2d(2),
        )
        self.to_features = nn.Linear(3 * width * side * side, spec.features)
        self.to_classes = nn.Linear(spec.features, spec.num_classes)

    def features(self, pixels: Tensor) -> Tensor:  # (B, C, H, W) uint8
        """(B, F), before the last layer's non-linearity, so that they are near a Gaussian of full rank."""
        signal = pixels.float() / 127.5 - 1
        found: Tensor = self.to_features(self.body(signal).flatten(1))
        return found

    def classes(self, features: Tensor) -> Tensor:  # (B, F)
        """(B, classes), not normalised."""
        found: Tensor = self.to_classes(F.gelu(features))
        return found

    def forward(self, pixels: Tensor) -> Tensor:
        return self.classes(self.features(pixels))

    @torch.inference_mode()
    def look(self, images: Pixels) -> tuple[Float64, Int64]:  # (n, C, H, W)
        """Features (n, F) and predicted labels (n,) of any number of images."""
        batches = (images[start : start + LOOKED_AT_ONCE] for start in range(0, len(images), LOOKED_AT_ONCE))
        features = torch.cat([self.features(torch.from_numpy(batch)) for batch in batches])
        return features.numpy().astype(np.float64), self.classes(features).argmax(dim=1).numpy()


def stage(convolution: nn.Conv2d) -> Iterator[nn.Module]:
    yield convolution
    yield nn.GroupNorm(NORM_GROUPS, convolution.out_channels)
    yield nn.ReLU()


def initialise(classifier: Classifier, generator: torch.Generator) -> Classifier:
    """He's for convolutions, Glorot's for the linear layers, no biases."""
    for module in classifier.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight, generator=generator)
        if isinstance(module, nn.Conv2d | nn.Linear):
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    return classifier

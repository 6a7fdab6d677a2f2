"""What the file of an evaluator says of its classifier and of real images, read without torch.

One safetensors file holds the weights, mean and covariance of the real test images' features, and metadata. In the
metadata the real-vs-real baselines have the key `floors`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from elit_export.bundle.readers import parsed_json
from elit_export.checkpoints.stored import checkpoint_path, stored_arrays, stored_metadata
from elit_export.errors import CheckpointError, InputError
from elit_export.evaluate.statistics import Baseline, ClassifierSpec, EvaluatorFacts, Gaussian

FORMAT = "elit_export classifier/1"
SHIPPED = "shipped:fashion_classifier"
MEAN, COVARIANCE = "real.mean", "real.covariance"
PLAIN_FIELDS = ("test_images", "test_accuracy", "train_sha256", "test_sha256", "command")


def load_facts(path: str | Path) -> EvaluatorFacts:
    """Read them from a file or `shipped:NAME`; raises CheckpointError."""
    file = checkpoint_path(path)
    header = stored_metadata(file, FORMAT)
    with described(path):
        metadata = parsed_json(header["facts"])
        arrays = stored_arrays(file, (MEAN, COVARIANCE))
        return EvaluatorFacts(
            spec=ClassifierSpec(**metadata["spec"]),
            real=Gaussian(*(arrays[name].astype(np.float64) for name in (MEAN, COVARIANCE))),
            floors=tuple(Baseline(**baseline) for baseline in metadata["floors"]),
            class_names=_names(metadata["class_names"]),
            **{name: metadata[name] for name in PLAIN_FIELDS},
        )


@contextmanager
def described(path: str | Path) -> Iterator[None]:
    """Raise CheckpointError naming the file for what does not describe a classifier."""
    try:
        yield
    except (InputError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: does not describe a classifier: {error}", "make one with `elit-export train-classifier`"
        ) from error


def _names(stored: object) -> tuple[str, ...]:
    if not isinstance(stored, list) or not all(isinstance(name, str) for name in stored):
        raise InputError(f"class_names {stored!r} are not a list of texts")
    return tuple(stored)

"""The file of an evaluator: a classifier's weights with the statistics of real images.

One safetensors file holds the weights, mean and covariance of the real test images' features, and metadata. In the
metadata the real-vs-real baselines have the key `floors`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from elit_export.bundle.readers import parsed_json
from elit_export.checkpoints.native import checkpoint_path
from elit_export.checkpoints.weights import check_tensors, read_safetensors, write_safetensors
from elit_export.errors import CheckpointError, InputError
from elit_export.evaluate.classifier import Classifier
from elit_export.evaluate.statistics import Baseline, ClassifierSpec, Evaluator, EvaluatorFacts, Gaussian

FORMAT = "elit_export classifier/1"
SHIPPED = "shipped:fashion_classifier"
WEIGHT_PREFIX = "weights."  # of the names of the classifier's own tensors
MEAN, COVARIANCE = "real.mean", "real.covariance"
PLAIN_FIELDS = ("test_images", "test_accuracy", "train_sha256", "test_sha256", "command")


def save_evaluator(path: Path, classifier: Classifier, facts: EvaluatorFacts) -> None:
    """Write the file atomically: weights in half precision, statistics in float64."""
    weights = {f"{WEIGHT_PREFIX}{name}": tensor.detach().half() for name, tensor in classifier.state_dict().items()}
    parameter = next(classifier.parameters()).detach().double()
    weights[MEAN] = parameter.new_tensor(facts.real.mean)
    weights[COVARIANCE] = parameter.new_tensor(facts.real.covariance)
    metadata = {name: getattr(facts, name) for name in PLAIN_FIELDS}
    metadata |= {"spec": asdict(facts.spec), "class_names": list(facts.class_names)}
    metadata["floors"] = [asdict(baseline) for baseline in facts.floors]
    write_safetensors(path, weights, {"format": FORMAT, "facts": json.dumps(metadata)})


def load_evaluator(path: str | Path) -> Evaluator:
    """Read a classifier from a file or `shipped:NAME`; raises CheckpointError."""
    file = checkpoint_path(path)
    weights, header = read_safetensors(file, FORMAT)
    try:
        metadata = parsed_json(header["facts"])
        classifier = Classifier(ClassifierSpec(**metadata["spec"]))
        expected = {f"{WEIGHT_PREFIX}{name}": tuple(tensor.shape) for name, tensor in classifier.state_dict().items()}
        width = classifier.spec.features
        check_tensors(file, weights, {**expected, MEAN: (width,), COVARIANCE: (width, width)})
        if not all(tensor.isfinite().all() for tensor in weights.values()):
            raise InputError("it holds values that are not finite")
        real = Gaussian(*(weights[name].double().numpy() for name in (MEAN, COVARIANCE)))
        facts = _facts(metadata, classifier.spec, real)
    except (InputError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: does not describe a classifier: {error}", "make one with `elit-export train-classifier`"
        ) from error
    classifier.load_state_dict({name: weights[f"{WEIGHT_PREFIX}{name}"].float() for name in classifier.state_dict()})
    return Evaluator(classifier.eval().look, facts)


def _facts(metadata: Mapping[str, Any], spec: ClassifierSpec, real: Gaussian) -> EvaluatorFacts:
    return EvaluatorFacts(
        spec=spec,
        real=real,
        floors=tuple(Baseline(**baseline) for baseline in metadata["floors"]),
        class_names=_names(metadata["class_names"]),
        **{name: metadata[name] for name in PLAIN_FIELDS},
    )


def _names(stored: object) -> tuple[str, ...]:
    if not isinstance(stored, list) or not all(isinstance(name, str) for name in stored):
        raise InputError(f"class_names {stored!r} are not a list of texts")
    return tuple(stored)

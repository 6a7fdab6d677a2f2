"""The file of a classifier ↔ what judges samples.

One safetensors file holds the weights, mean and covariance of the real test images' features, and what else is known.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from elit_export.checkpoints.native import checkpoint_path
from elit_export.checkpoints.weights import check_tensors, read_safetensors, write_safetensors
from elit_export.errors import CheckpointError, InputError
from elit_export.evaluate.classifier import Classifier
from elit_export.evaluate.statistics import ClassifierSpec, Floor, Gaussian, Judge, JudgeFacts

FORMAT = "elit_export classifier/1"
SHIPPED = "shipped:fashion_classifier"
WEIGHTS = "weights."  # before the names of the classifier's own tensors
MEAN, COVARIANCE = "real.mean", "real.covariance"
PLAIN = ("test_images", "test_accuracy", "train_sha256", "test_sha256", "command")


def save_judge(path: Path, classifier: Classifier, facts: JudgeFacts) -> None:
    """Write weights in half precision, and the rest as it is; whole or not at all."""
    weights = {f"{WEIGHTS}{name}": tensor.detach().half() for name, tensor in classifier.state_dict().items()}
    like = next(classifier.parameters()).detach().double()
    weights[MEAN] = like.new_tensor(facts.real.mean)
    weights[COVARIANCE] = like.new_tensor(facts.real.covariance)
    known = {name: getattr(facts, name) for name in PLAIN}
    known |= {"spec": asdict(facts.spec), "class_names": list(facts.class_names)}
    known["floors"] = [asdict(floor) for floor in facts.floors]
    write_safetensors(path, weights, {"format": FORMAT, "facts": json.dumps(known)})


def load_judge(path: str | Path) -> Judge:
    """Read a classifier from a file or `shipped:NAME`; raises CheckpointError."""
    file = checkpoint_path(path)
    weights, metadata = read_safetensors(file, FORMAT)
    try:
        known = json.loads(metadata["facts"])
        classifier = Classifier(ClassifierSpec(**known["spec"]))
        expected = {f"{WEIGHTS}{name}": tuple(tensor.shape) for name, tensor in classifier.state_dict().items()}
        width = classifier.spec.features
        check_tensors(file, weights, {**expected, MEAN: (width,), COVARIANCE: (width, width)})
        if not all(tensor.isfinite().all() for tensor in weights.values()):
            raise InputError("it holds values that are not finite")
        real = Gaussian(*(weights[name].double().numpy() for name in (MEAN, COVARIANCE)))
        facts = _facts(known, classifier.spec, real)
    except (InputError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: does not describe a classifier: {error}", "make one with `elit-export train-classifier`"
        ) from error
    classifier.load_state_dict({name: weights[f"{WEIGHTS}{name}"].float() for name in classifier.state_dict()})
    return Judge(classifier.eval().look, facts)


def _facts(known: Mapping[str, Any], spec: ClassifierSpec, real: Gaussian) -> JudgeFacts:
    return JudgeFacts(
        spec=spec,
        real=real,
        floors=tuple(Floor(**floor) for floor in known["floors"]),
        class_names=tuple(known["class_names"]),
        **{name: known[name] for name in PLAIN},
    )

"""The file of an evaluator: a classifier's weights with the statistics of real images."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from elit_export.checkpoints.stored import checkpoint_path
from elit_export.checkpoints.weights import check_tensors, read_safetensors, write_safetensors
from elit_export.errors import InputError
from elit_export.evaluate.classifier import Classifier
from elit_export.evaluate.facts import COVARIANCE, FORMAT, MEAN, PLAIN_FIELDS, described, load_facts
from elit_export.evaluate.protocol import Evaluator
from elit_export.evaluate.statistics import EvaluatorFacts

WEIGHT_PREFIX = "weights."  # of the names of the classifier's own tensors


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
    facts, file = load_facts(path), checkpoint_path(path)
    weights, _ = read_safetensors(file, FORMAT)
    classifier = Classifier(facts.spec)
    own = {f"{WEIGHT_PREFIX}{name}": tuple(tensor.shape) for name, tensor in classifier.state_dict().items()}
    with described(path):
        check_tensors(file, weights, {**own, MEAN: facts.real.mean.shape, COVARIANCE: facts.real.covariance.shape})
        if not all(tensor.isfinite().all() for tensor in weights.values()):
            raise InputError("it holds values that are not finite")
    classifier.load_state_dict({name: weights[f"{WEIGHT_PREFIX}{name}"].float() for name in classifier.state_dict()})
    return Evaluator(classifier.eval().look, facts)

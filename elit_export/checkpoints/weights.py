"""Tensors in safetensors files, and whether they fit a model.

The metadata of our own files holds the spec of the model that the tensors belong to.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from elit_export.bundle.atomic import atomic_write
from elit_export.bundle.readers import parsed_json
from elit_export.checkpoints.stored import reading_safetensors, stored_metadata
from elit_export.errors import CheckpointError, InputError, summary
from elit_export.models.elit import Elit
from elit_export.models.registry import new_model
from elit_export.spec import DataFacts, ModelSpec

Weights = dict[str, Tensor]
Shape = tuple[int, ...]


# ---------------------------------------------------------------- files


def write_safetensors(path: Path, weights: Weights, metadata: dict[str, str]) -> None:
    """Write one file, whole or not at all."""
    try:
        with atomic_write(path) as temporary:
            save_file(weights, temporary, metadata)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path}: cannot be written: {summary(error)}") from error


def read_safetensors(path: Path, expected_format: str) -> tuple[Weights, dict[str, str]]:
    """Read tensors and metadata; raises CheckpointError if the file is damaged or has another format."""
    metadata = stored_metadata(path, expected_format)
    with reading_safetensors(path):
        return load_file(path), metadata


# ---------------------------------------------------------------- models


def check_tensors(path: Path, weights: Mapping[str, Tensor], expected: Mapping[str, Shape], remedy: str = "") -> None:
    """Raises CheckpointError for anything missing, extra, mis-shaped, not dense, or not of floating-point numbers.

    Numbers of one byte are refused too: they have scales elsewhere, which are not read here.
    """
    check_dense(path, weights)
    problems = [f"missing {name}" for name in expected if name not in weights]
    problems += [f"unexpected {name}" for name in weights if name not in expected]
    problems += [
        f"{name} has shape {tuple(weights[name].shape)}, the model needs {shape}"
        for name, shape in expected.items()
        if name in weights and tuple(weights[name].shape) != shape
    ]
    problems += [
        f"{name} holds {tensor.dtype}, not floating-point numbers of 2 bytes or more"
        for name, tensor in weights.items()
        if not tensor.is_floating_point() or tensor.element_size() < 2
    ]
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise CheckpointError(f"{path}: {'; '.join(problems[:5])}{more}", remedy)


def check_dense(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError for tensors that are not simply numbers in memory; some do not even have a shape."""
    for name, tensor in weights.items():
        kinds = {
            "nested": tensor.is_nested,
            "meta (without numbers)": tensor.is_meta,
            "quantized": tensor.is_quantized,
            "sparse": tensor.layout is not torch.strided,
        }
        if matches := [kind for kind, is_it in kinds.items() if is_it]:
            raise CheckpointError(
                f"{path}: {name} is a {matches[0]} tensor", "save dense ones: tensor.dequantize(), tensor.to_dense()"
            )


def meta_model(spec: ModelSpec, data: DataFacts) -> Elit:
    try:
        with torch.device("meta"):
            return new_model(spec, data)
    except InputError as error:  # an unknown backbone, or an invalid spec
        raise CheckpointError(str(error)) from error
    except (RuntimeError, TypeError, OverflowError) as error:  # sizes beyond what torch can count
        raise CheckpointError(f"its spec does not describe a possible model: {summary(error)}") from error


def spec_to_metadata(model: Elit) -> dict[str, str]:
    """Return the spec and data facts of a model as metadata of our own files."""
    return {"spec": json.dumps(model.spec.to_dict()), "data": json.dumps(model.data.to_dict())}


def spec_from_metadata(path: Path, metadata: Mapping[str, str]) -> tuple[ModelSpec, DataFacts]:
    """Read the metadata that spec_to_metadata writes; raises CheckpointError."""
    try:
        spec = ModelSpec.from_dict(parsed_json(metadata["spec"]))
        data = DataFacts.from_dict(parsed_json(metadata["data"]))
        data.of_channels(spec.in_channels)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: unreadable metadata: {error}") from error
    return spec, data


def check_overrides(path: Path, overrides: Mapping[str, int | None], spec: ModelSpec) -> None:
    """Raise CheckpointError for an override that is not None and differs from the spec."""
    for name, value in overrides.items():
        if value is not None and value != getattr(spec, name):
            raise CheckpointError(
                f"{path}: {name}={value} was asked for, but the file says {getattr(spec, name)}", "leave it out"
            )

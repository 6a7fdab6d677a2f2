"""What an ONNX graph says of itself, its weights unread."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import onnx
from onnx import helper

from elit_export.errors import ExportError, summary


def graph_facts(path: Path) -> dict[str, Any]:
    """Inputs, outputs, nodes, and how many numbers its weights are; raises ExportError for what is no ONNX."""
    try:
        model = onnx.load(path, load_external_data=False)
    except OSError:
        raise
    except Exception as error:  # protobuf raises what it likes
        raise ExportError(f"{path}: not ONNX: {summary(error)}", "export it again: elit-export export") from error
    weights = sum(math.prod(tensor.dims) for tensor in model.graph.initializer)
    return {
        "name": model.graph.name,
        "description": model.doc_string,
        "opset": max((entry.version for entry in model.opset_import if not entry.domain), default=0),
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "nodes": len(model.graph.node),
        "parameters": weights,
        "about": {entry.key: entry.value for entry in model.metadata_props},
        "tensors": [
            {"name": value.name, "role": role, "type": _dtype(value), "dims": _dims(value)}
            for role, values in (("input", model.graph.input), ("output", model.graph.output))
            for value in values
        ],
    }


def _dtype(value: onnx.ValueInfoProto) -> str:
    """Return NumPy's name of a type; onnx's own where it is not an array, or its type is unknown to this onnx."""
    kind = value.type.WhichOneof("value")
    if kind != "tensor_type":
        return str(kind or "undefined").removesuffix("_type")
    number = value.type.tensor_type.elem_type
    try:
        return str(helper.tensor_dtype_to_np_dtype(number).name)
    except KeyError:
        return f"type {number} of ONNX"


def _dims(value: onnx.ValueInfoProto) -> str:
    return " × ".join(str(dim.dim_param or dim.dim_value) for dim in value.type.tensor_type.shape.dim)

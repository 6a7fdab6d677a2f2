"""Checks that hold for every graph, whatever wrote it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx
from onnx import checker, helper

from elit_export.errors import ExportError
from elit_export.spec import LATENTS, GraphSpec, TensorSpec

# Each prevents a compiler from planning shapes ahead, or hides a loop over the batch.
FORBIDDEN = {"NonZero", "Loop", "Scan", "ScatterND", "ScatterElements"}
IF = "If"
DEQUANTIZE = "DequantizeLinear"


def check_graph(path: Path, graph: GraphSpec, *, opset: int) -> None:
    """Check names, types and dynamic dimensions, forbidden nodes, folded queries, and ONNX's own rules.

    A graph with an `If` has exactly one; the nodes of both its branches are checked too. Raises ExportError with every
    problem found.
    """
    try:
        checker.check_model(path)
    except checker.ValidationError as error:
        raise ExportError(f"{path}: not valid ONNX: {error}") from error
    model = onnx.load(path, load_external_data=False)
    graphs = list(_with_branches(model.graph))
    nodes = [node for graph in graphs for node in graph.node]
    problems = [
        *_form_problems(model, opset),
        *_signature_problems(model.graph.input, graph.inputs, "input"),
        *_signature_problems(model.graph.output, graph.outputs, "output"),
        *_forbidden_nodes(nodes, choices=int(graph.has_if)),
        *_unfolded_nodes(graphs, nodes),
        *(_latents_problems(nodes) if graph.elastic else []),
    ]
    if problems:
        raise ExportError(f"{path}: {'; '.join(problems)}")


def _form_problems(model: onnx.ModelProto, opset: int) -> list[str]:
    """Require one flat graph of standard operators, so that the checks below see every node."""
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    problems = [] if opsets == {"": opset} else [f"operator sets are {opsets}, wanted {opset} of the standard alone"]
    problems += [f"function {function.name} is not inlined" for function in model.functions]
    return problems


def _signature_problems(actual: Sequence[onnx.ValueInfoProto], expected: Sequence[TensorSpec], what: str) -> list[str]:
    signatures, required = [_signature(value) for value in actual], [tensor.signature for tensor in expected]
    return [] if signatures == required else [f"{what}s are {signatures}, wanted {required}"]


def _signature(value: onnx.ValueInfoProto) -> tuple[str, str, tuple[int | str, ...]]:
    tensor = value.type.tensor_type
    dims = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
    return value.name, helper.tensor_dtype_to_np_dtype(tensor.elem_type).name, dims


def _with_branches(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _with_branches(attribute.g)


def _forbidden_nodes(nodes: Sequence[onnx.NodeProto], *, choices: int) -> list[str]:
    problems = [f"forbidden node {node.op_type} ({node.name})" for node in nodes if node.op_type in FORBIDDEN]
    count = sum(node.op_type == IF for node in nodes)
    return problems if count == choices else [*problems, f"{count} nodes {IF}, wanted {choices}"]


def _unfolded_nodes(graphs: Sequence[onnx.GraphProto], nodes: Sequence[onnx.NodeProto]) -> list[str]:
    """Find nodes that compute a constant at every call, most often the projected queries of Read.

    DequantizeLinear of a weight in 8 bits is allowed: it is part of the product that uses the weight.
    """
    constants = {tensor.name for graph in graphs for tensor in graph.initializer}
    constants |= {name for node in nodes if node.op_type == "Constant" for name in node.output}
    return [
        f"node {node.op_type} ({node.name}) computes a constant"
        for node in nodes
        if node.op_type != DEQUANTIZE and node.input and all(name in constants or not name for name in node.input)
    ]


def _latents_problems(nodes: Sequence[onnx.NodeProto]) -> list[str]:
    """Require that `latents` selects by Gather: its length is the budget, its values decide no shape."""
    # index_select flattens its index first, which does not change it.
    equal_to_latents = {LATENTS} | {
        node.output[0] for node in nodes if node.op_type == "Reshape" and node.input[0] == LATENTS
    }
    users = {node.op_type for node in nodes if equal_to_latents & set(node.input)}
    if "Gather" in users and users <= {"Gather", "Shape", "Reshape"}:
        return []
    return [f"`{LATENTS}` feeds {sorted(users)}, wanted a Gather (and its Shape)"]

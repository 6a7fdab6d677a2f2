"""A model traced without its weights, and the weights given to the graph afterwards, read one by one as it is written.

So no weight is ever in memory twice, nor in another type than it is stored in, but for the one that is being written.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor, to_torch_dtype
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from elit_export.errors import ExportError
from elit_export.models.elit import Elit

TRACED = torch.float32  # what a twin holds, whatever the weights are stored in


def weightless(model: Elit, mode: FakeTensorMode) -> Elit:
    """The same model with float32 weights of which there are only shapes; `mode` must be on while it is traced."""
    with mode:
        twins = {id(tensor): _shape_of(tensor) for tensor in (*model.parameters(), *model.buffers())}
        return copy.deepcopy(model, twins)


def _shape_of(tensor: Tensor) -> Tensor:
    empty = torch.empty(tensor.shape, dtype=TRACED)
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def give_weights(made: ir.Model, weights: Mapping[str, Tensor]) -> None:
    """Give every initializer that bears the name of a weight that weight, in its own type.

    A weight that only goes into a transposition is stored transposed: folding it would hold the result until it is
    written.
    """
    for name, tensor in weights.items():
        if value := made.graph.initializers.get(name):
            value.const_value = _read_when_asked(tensor, value.dtype, name, transposed=False)
    transposed: dict[str, ir.Value] = {}
    for node in _transpositions(made, weights):
        (value,) = node.inputs
        assert value is not None
        assert value.name is not None
        if value.name not in transposed:
            transposed[value.name] = _transposed(made.graph, value, weights[value.name])
        node.outputs[0].replace_all_uses_with(transposed[value.name])
        assert node.graph is not None
        node.graph.remove(node, safe=True)


def _transpositions(made: ir.Model, weights: Mapping[str, Tensor]) -> Iterator[ir.Node]:
    """Nodes that turn a matrix of weights over."""
    for node in list(ir.traversal.RecursiveGraphIterator(made.graph)):
        if node.op_type == "Transpose" and tuple(node.attributes["perm"].as_ints()) == (1, 0):
            (value,) = node.inputs
            if value is not None and value.name in weights and value.is_initializer():
                yield node


def _transposed(graph: ir.Graph, value: ir.Value, tensor: Tensor) -> ir.Value:
    """A new initializer."""
    name = f"{value.name}.transposed"
    weight = _read_when_asked(tensor, value.dtype, name, transposed=True)
    made = ir.Value(name=name, type=ir.TensorType(weight.dtype), shape=ir.Shape(weight.shape), const_value=weight)
    graph.register_initializer(made)
    return made


def _read_when_asked(tensor: Tensor, dtype: ir.DataType | None, name: str, *, transposed: bool) -> ir.LazyTensor:
    assert dtype is not None
    wanted = to_torch_dtype(dtype)

    def read() -> TorchTensor:
        stored = tensor.detach()
        return TorchTensor(_finite((stored.t() if transposed else stored).to(wanted), name), name)

    shape = ir.Shape(tuple(reversed(tensor.shape)) if transposed else tuple(tensor.shape))
    return ir.LazyTensor(read, dtype, shape, name=name)


def _finite(weight: Tensor, name: str) -> Tensor:
    if weight.numel() and not all(extreme.isfinite() for extreme in weight.aminmax()):  # without a copy of the weight
        raise ExportError(
            f"{name} has values that are not finite in {weight.dtype}: damaged weights or, of float16, values beyond "
            f"65504",
            "use bf16 or fp32 for these",
        )
    return weight

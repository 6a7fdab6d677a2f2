"""Traces a model without its weights, and sets them lazily: they are read one by one when the graph is written.

So no weight is in memory twice or in another type than its stored one, except the weight that is being written.
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

TRACED_DTYPE = torch.float32  # of the empty weights, whatever the stored type


def weightless(model: Elit, mode: FakeTensorMode) -> Elit:
    """Copy a model with fake float32 weights, which have shapes only; `mode` must be on while it is traced."""
    with mode:
        empty_tensors = {id(tensor): _shape_of(tensor) for tensor in (*model.parameters(), *model.buffers())}
        return copy.deepcopy(model, empty_tensors)


def _shape_of(tensor: Tensor) -> Tensor:
    empty = torch.empty(tensor.shape, dtype=TRACED_DTYPE)
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def set_weights(model_ir: ir.Model, weights: Mapping[str, Tensor]) -> None:
    """Set every initializer that has the name of a weight to that weight, in the initializer's type.

    A weight that only feeds a Transpose is stored transposed, as constant folding would keep the result in memory.
    """
    for name, tensor in weights.items():
        if value := model_ir.graph.initializers.get(name):
            value.const_value = _lazy_tensor(tensor, value.dtype, name, transposed=False)
    transposed: dict[str, ir.Value] = {}
    for node in _transposed_weights(model_ir, weights):
        (value,) = node.inputs
        assert value is not None
        assert value.name is not None
        if value.name not in transposed:
            transposed[value.name] = _transposed(model_ir.graph, value, weights[value.name])
        node.outputs[0].replace_all_uses_with(transposed[value.name])
        assert node.graph is not None
        node.graph.remove(node, safe=True)


def _transposed_weights(model_ir: ir.Model, weights: Mapping[str, Tensor]) -> Iterator[ir.Node]:
    """Yield the Transpose nodes of weight matrices."""
    for node in list(ir.traversal.RecursiveGraphIterator(model_ir.graph)):
        if node.op_type == "Transpose" and tuple(node.attributes["perm"].as_ints()) == (1, 0):
            (value,) = node.inputs
            if value is not None and value.name in weights and value.is_initializer():
                yield node


def _transposed(graph: ir.Graph, value: ir.Value, tensor: Tensor) -> ir.Value:
    """Register the transposed weight as a new initializer."""
    name = f"{value.name}.transposed"
    weight = _lazy_tensor(tensor, value.dtype, name, transposed=True)
    initializer = ir.Value(
        name=name, type=ir.TensorType(weight.dtype), shape=ir.Shape(weight.shape), const_value=weight
    )
    graph.register_initializer(initializer)
    return initializer


def _lazy_tensor(tensor: Tensor, dtype: ir.DataType | None, name: str, *, transposed: bool) -> ir.LazyTensor:
    assert dtype is not None
    torch_dtype = to_torch_dtype(dtype)

    def read() -> TorchTensor:
        stored = tensor.detach()
        return TorchTensor(_finite((stored.t() if transposed else stored).to(torch_dtype), name), name)

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

"""Torch-TensorRT program → engine, which runs in torch.

This file has not run on a GPU: without one the library cannot be imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
import torch_tensorrt

from elit_export.arrays import HostArray
from elit_export.backends.ports import Port, check_ports, open_dim
from elit_export.backends.protocols import Array, DeviceArray, Engine, EngineLoader, OpenedEngine, PlanFile, PlanOrigin
from elit_export.backends.torch_tensorrt.options import TorchTensorRTTarget
from elit_export.errors import BackendUnavailable, EngineError
from elit_export.spec import GraphSpec, TensorSpec


class TorchTensorRTLoader:
    """Opens programs, only in the version and on the GPU that built them."""

    def open_engines(self, plans: Mapping[str, PlanFile], target: TorchTensorRTTarget) -> dict[str, Engine]:
        if reason := self.incompatibility(list(plans.values()), target):
            raise BackendUnavailable(f"these plans cannot run here: {reason}")
        return {name: TorchTensorRTEngine(plan) for name, plan in plans.items()}

    def incompatibility(self, plans: Sequence[PlanOrigin], target: TorchTensorRTTarget) -> str:
        problem, remedy = self.device_problem(target.device)
        if problem:
            return f"{problem}: {remedy}"
        here = torch.cuda.get_device_name()
        for plan in plans:
            built = plan.versions.get("torch-tensorrt", "")
            if built != torch_tensorrt.__version__:
                return f"built with torch-tensorrt {built}, installed is {torch_tensorrt.__version__}: build again"
            if plan.built_on.get("gpu") != here:
                return f"built on {plan.built_on.get('gpu')}, this is {here}: build again here"
        return ""

    def library_version(self) -> str:
        return f"torch_tensorrt {torch_tensorrt.__version__}"

    def device_problem(self, device: str) -> tuple[str, str]:
        """Test whether torch sees a GPU."""
        return ("", "") if torch.cuda.is_available() else ("torch sees no GPU", "see nvidia-smi")


class TorchTensorRTEngine(OpenedEngine):
    """One saved program on the GPU, whose inputs and outputs come in the order of the graph's."""

    def __init__(self, plan: PlanFile) -> None:
        super().__init__()
        self._graph = plan.graph
        program = torch_tensorrt.load(str(plan.path))
        check_ports(plan.path, plan.graph, *_ports(program, plan.graph))
        self._module: Any = program.module()

    def _run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        tensors = [_on_device(inputs[tensor.name]) for tensor in self._graph.inputs]
        try:
            with torch.inference_mode():
                results = self._module(*tensors)
        except RuntimeError as error:
            raise EngineError(f"torch-tensorrt failed: {error}") from error
        pairs = zip(self._graph.outputs, results if isinstance(results, tuple | list) else (results,), strict=True)
        return {
            spec.name: tensor.cpu().numpy() if spec.on_host else TorchArray(tensor.clone()) for spec, tensor in pairs
        }

    def _release(self) -> None:
        del self._module


def _ports(program: Any, graph: GraphSpec) -> tuple[list[Port], list[Port]]:
    """Match tensors by order, as a program names them otherwise. A type or shape that it lacks stays unknown."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    signature = program.graph_signature

    def ports(names: Sequence[str], tensors: Sequence[TensorSpec]) -> list[Port]:
        known = [tensor.name for tensor in tensors]
        return [
            _port(own, values.get(name)) for own, name in zip_longest(known[: len(names)], names, fillvalue="one more")
        ]

    return ports(signature.user_inputs, graph.inputs), ports(signature.user_outputs, graph.outputs)


def _port(name: str, value: Any) -> Port:
    if not isinstance(value, torch.Tensor):
        return Port(name, None, None)
    return Port(name, str(value.dtype).removeprefix("torch."), tuple(map(open_dim, value.shape)))


class TorchArray(DeviceArray):
    """An output that stays on the GPU."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def numpy(self) -> HostArray:
        host: HostArray = self.tensor.cpu().numpy()
        return host


def _on_device(array: Array) -> Any:
    if isinstance(array, TorchArray):
        return array.tensor
    return torch.from_numpy(array if isinstance(array, np.ndarray) else array.numpy()).cuda()


LOADERS: dict[str, EngineLoader] = {"torch-tensorrt": TorchTensorRTLoader()}

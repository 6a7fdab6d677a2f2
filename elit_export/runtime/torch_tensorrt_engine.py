"""Torch-TensorRT engines: with them, torch runs. Not run: the library cannot be imported without a GPU.

Takes: a program saved by `build/torch_tensorrt.py`.  Gives: an Engine.  May touch: the plan file, the GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch_tensorrt

from elit_export.errors import BackendUnavailable, EngineError
from elit_export.manifest import PlanSet
from elit_export.runtime.engine import HOST_OUTPUTS, Array, DeviceArray, Engine, HostArray

# By the name of a plan's file, which is its graph's.
OUTPUTS = {
    "step": ("velocity", "residual"),
    "probe": ("signal", "distance"),
    "reuse": ("velocity",),
    "time": ("embedding",),
    "decode": ("pixels",),
}


def open_engines(plans: Mapping[str, Path], plan_set: PlanSet) -> dict[str, TorchTensorRTEngine]:
    """Open verified programs; raises BackendUnavailable if they do not fit this machine."""
    if reason := unfit(plan_set):
        raise BackendUnavailable(f"target {plan_set.target} cannot run here: {reason}")
    return {name: TorchTensorRTEngine(path) for name, path in plans.items()}


def unfit(plan_set: PlanSet) -> str:
    """Why these plans cannot run here; empty if they can."""
    problem, remedy = device_problem("torch_tensorrt", plan_set.device)
    if problem:
        return f"{problem}: {remedy}"
    here = torch.cuda.get_device_name()
    for plan in plan_set.plans:
        built = plan.versions.get("torch-tensorrt", "")
        if built != torch_tensorrt.__version__:
            return f"built with torch-tensorrt {built}, installed is {torch_tensorrt.__version__}: build again"
        if plan.built_on.get("gpu") != here:
            return f"built on {plan.built_on.get('gpu')}, this is {here}: build again here"
    return ""


def library_version(library: str) -> str:
    return f"{library} {torch_tensorrt.__version__}"


def device_problem(_library: str, _device: str) -> tuple[str, str]:
    """(what is wrong, what to do), both empty if torch sees a GPU. For `doctor`."""
    return ("", "") if torch.cuda.is_available() else ("torch sees no GPU", "see nvidia-smi")


class TorchTensorRTEngine(Engine):
    """One saved program on the GPU. Its inputs come in the order of the graph's, as the bank gives them."""

    def __init__(self, plan: Path) -> None:
        self._outputs = OUTPUTS[plan.stem]
        self._run: Any = torch_tensorrt.load(str(plan)).module()

    def __call__(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        tensors = [_on_device(array) for array in inputs.values()]
        try:
            with torch.inference_mode():
                given = self._run(*tensors)
        except RuntimeError as error:
            raise EngineError(f"torch-tensorrt failed: {error}") from error
        named = zip(self._outputs, given if isinstance(given, tuple | list) else (given,), strict=True)
        return {
            name: tensor.cpu().numpy() if name in HOST_OUTPUTS else TorchArray(tensor.clone()) for name, tensor in named
        }

    def close(self) -> None:
        self.__dict__.pop("_run", None)


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

"""ONNX Runtime engines: the only file of the runtime that names this library.

Takes: a plan made by `build/onnxruntime.py`.  Gives: an Engine.  May touch: the plan file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import onnxruntime as ort

from elit_export.bundle import PlanSet
from elit_export.errors import BackendUnavailable, BundleError, EngineError
from elit_export.runtime.engine import HOST_OUTPUTS, Array, DeviceArray, HostArray

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def open_engine(plan: Path, facts: PlanSet) -> OnnxRuntimeEngine:
    """Open a verified plan; refuses one built by a newer ONNX Runtime than the one installed."""
    built = facts.versions.get("onnxruntime", "0")
    if _numbers(ort.__version__) < _numbers(built):
        raise BundleError(
            f"{plan}: built with onnxruntime {built}, installed is {ort.__version__}: "
            f"pip install 'onnxruntime>={built}' or build again"
        )
    return OnnxRuntimeEngine(plan, device=facts.device, threads=int(facts.options.get("threads", 0)))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


class OnnxRuntimeEngine:
    """One inference session. `threads = 0` uses all cores; `device` is "cpu" or "cuda".

    Raises BackendUnavailable if the device's provider is not there: ONNX Runtime itself would
    silently fall back to the CPU.
    """

    def __init__(self, plan: Path, *, device: str, threads: int) -> None:
        provider = _available_provider(device)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # errors; they are raised as well
        try:
            self._session = ort.InferenceSession(plan, options, providers=[provider])
        except Exception as error:  # the library raises plain RuntimeErrors and its own types alike
            raise EngineError(f"onnxruntime cannot open {plan}: {_first_line(error)}") from error
        if self._session.get_providers()[0] != provider:
            raise BackendUnavailable(
                f"onnxruntime could not start {provider} (it offers {self._session.get_providers()}); "
                f"install its driver and libraries, or build a target with device = 'cpu'"
            )
        self._device = device
        self._outputs = [output.name for output in self._session.get_outputs()]

    def __call__(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        binding = self._session.io_binding()
        for name, array in inputs.items():
            self._bind_input(binding, name, array)
        for name in self._outputs:
            binding.bind_output(name, "cpu" if name in HOST_OUTPUTS else self._device)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # see above
            raise EngineError(f"onnxruntime failed: {_first_line(error)}") from error
        # Unshaped outputs are allocated for each call, so they are the caller's.
        values = zip(self._outputs, binding.get_outputs(), strict=True)
        return {name: value.numpy() if name in HOST_OUTPUTS else OrtArray(value) for name, value in values}

    @staticmethod
    def _bind_input(binding: Any, name: str, array: Array) -> None:
        if isinstance(array, OrtArray):
            binding.bind_ortvalue_input(name, array.value)
        else:
            host = array if isinstance(array, np.ndarray) else array.numpy()
            binding.bind_cpu_input(name, np.ascontiguousarray(host))

    def close(self) -> None:
        self.__dict__.pop("_session", None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class OrtArray(DeviceArray):
    """An output that stays where ONNX Runtime put it."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def numpy(self) -> HostArray:
        host: HostArray = self.value.numpy()
        return host


def _available_provider(device: str) -> str:
    provider = PROVIDERS[device]
    if provider not in ort.get_available_providers():
        raise BackendUnavailable(
            f"this onnxruntime has no {provider} (it has {', '.join(ort.get_available_providers())}); "
            f"for device {device!r}: pip install 'elit-export[onnxruntime-gpu]' in place of onnxruntime"
        )
    return provider


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__

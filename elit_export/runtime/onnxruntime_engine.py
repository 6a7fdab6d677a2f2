"""ONNX Runtime engines: the only file of the runtime that names this library.

Takes: a plan made by `build/onnxruntime.py`.  Gives: an Engine.  May touch: the plan file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from elit_export.errors import BackendUnavailable, BundleError, EngineError, first_line
from elit_export.manifest import PlanSet
from elit_export.runtime.engine import HOST_OUTPUTS, Array, DeviceArray, Engine, HostArray

# y = x, one float, as ONNX: the smallest model that makes a provider start or refuse.
IDENTITY = (
    b'\x08\x08:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01'
    b"\x12\x04\n\x02\x08\x01b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\r"
)
WARNINGS, ERRORS, SILENT = 2, 3, 4  # ONNX Runtime's log levels; the first is its default
MOST_THREADS = 1024  # more than any machine has cores; ONNX Runtime would start them all
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def open_engines(plans: Mapping[str, Path], plan_set: PlanSet) -> dict[str, OnnxRuntimeEngine]:
    """Open verified plans, each file once; refuses those built by a newer ONNX Runtime than the one installed."""
    for plan in plan_set.plans:
        _check_version(plan.versions.get("onnxruntime", "0"))
    threads = _threads(plan_set)
    # On one thread: after a step its own threads spin for a while, and on two cores a reuse beside them took
    # three to five times as long with a second thread as without.
    small = {plan.file for plan in plan_set.cache.values()}
    with ExitStack() as stack:
        opened = {
            path: stack.enter_context(
                OnnxRuntimeEngine(path, device=plan_set.device, threads=1 if path.name in small else threads)
            )
            for path in set(plans.values())
        }
        stack.pop_all()  # the caller owns them now
    return {name: opened[path] for name, path in plans.items()}


def _check_version(built: str) -> None:
    if _numbers(ort.__version__) < _numbers(built):
        raise BundleError(
            f"built with onnxruntime {built}, installed is {ort.__version__}: "
            f"pip install 'onnxruntime>={built}' or build again"
        )


def _threads(plan_set: PlanSet) -> int:
    threads = plan_set.options.get("threads", 0)
    if not isinstance(threads, int) or not 0 <= threads <= MOST_THREADS:
        raise BundleError(
            f"target {plan_set.target}: threads is {threads!r}, must be 0 to {MOST_THREADS}: "
            f"change it in the recipe and build it again: elit-export build RECIPE --out BUNDLE"
        )
    return threads


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if re.fullmatch("[0-9]{1,9}", part))


def unfit(plan_set: PlanSet) -> str:
    """Why these plans cannot run here; empty if they can."""
    return device_problem("onnxruntime", plan_set.device)[0]


def library_version(library: str) -> str:
    return f"{library} {ort.__version__}"


def device_problem(_library: str, device: str) -> tuple[str, str]:
    """(what is wrong, what to do), both empty if the device's provider really starts. For `doctor`."""
    provider = PROVIDERS[device]
    if provider not in ort.get_available_providers():
        return f"this onnxruntime has no {provider}", "pip install 'elit-export[onnxruntime-gpu]' without onnxruntime"
    ort.set_default_logger_severity(SILENT)  # the answer is said once, by us
    try:
        started = ort.InferenceSession(IDENTITY, providers=[provider]).get_providers()[0]
    except Exception as error:  # the library raises plain RuntimeErrors and its own types alike
        return f"{provider} fails: {first_line(error)}", "mend its driver and libraries, or use device = 'cpu'"
    finally:
        ort.set_default_logger_severity(WARNINGS)
    if started != provider:
        return f"{provider} does not start here", "install its driver, CUDA and cuDNN, or use device = 'cpu'"
    return "", ""


class OnnxRuntimeEngine(Engine):
    """One inference session. `threads = 0` uses all cores; `device` is "cpu" or "cuda".

    Raises BackendUnavailable if the device's provider is not there: ONNX Runtime itself would
    silently fall back to the CPU. `as_written` runs node by node: without it ONNX Runtime puts kernels of its
    own in place of quantized products, with other sums, and none for 8-bit floats.
    """

    def __init__(self, plan: Path, *, device: str, threads: int, as_written: bool = False) -> None:
        provider = PROVIDERS[device]
        if provider not in ort.get_available_providers():
            raise BackendUnavailable(f"this onnxruntime has no {provider}; elit-export doctor says what to do")
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = ERRORS
        if as_written:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            self._session = ort.InferenceSession(plan, options, providers=[provider])
        except Exception as error:  # the library raises plain RuntimeErrors and its own types alike
            raise EngineError(f"onnxruntime cannot open {plan}: {first_line(error)}") from error
        if self._session.get_providers()[0] != provider:  # it falls back to the CPU without a word
            raise BackendUnavailable(
                f"onnxruntime could not start {provider} for {plan.name}; elit-export doctor says what to do, "
                f"or build a target with device = 'cpu'"
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
            raise EngineError(f"onnxruntime failed: {first_line(error)}") from error
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


class OrtArray(DeviceArray):
    """An output that stays where ONNX Runtime put it."""

    def __init__(self, value: Any) -> None:
        self.value = value

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape())

    def numpy(self) -> HostArray:
        host: HostArray = self.value.numpy()
        return host

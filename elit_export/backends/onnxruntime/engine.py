"""ONNX Runtime plan → engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from elit_export.arrays import HostArray
from elit_export.backends.onnxruntime.options import PROVIDERS, OnnxRuntimeTarget
from elit_export.backends.ports import Port, check_ports, open_dim
from elit_export.backends.protocols import Array, DeviceArray, Engine, EngineLoader, OpenedEngine, PlanFile, PlanOrigin
from elit_export.backends.versions import version_numbers
from elit_export.errors import BackendUnavailable, BundleError, EngineError, pip_install, summary
from elit_export.spec import GraphSpec

# The ONNX model y = x on one float: the smallest model that shows whether a provider starts.
IDENTITY = (
    b'\x08\x08:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01'
    b"\x12\x04\n\x02\x08\x01b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\r"
)
WARNINGS, ERRORS, SILENT = 2, 3, 4  # ONNX Runtime's log levels; the first is its default


class OnnxRuntimeLoader:
    """Refuses plans built by a newer ONNX Runtime than the one installed."""

    def open_engines(self, plans: Mapping[str, PlanFile], target: OnnxRuntimeTarget) -> dict[str, Engine]:
        """Open each file once; a light graph runs on one thread.

        The threads of a step spin for a while after it. On two cores, a reuse beside them took three to five times
        as long with a second thread as without.
        """
        for plan in plans.values():
            _check_version(plan.versions.get("onnxruntime", "0"))
        with ExitStack() as stack:
            opened = {
                plan.path: stack.enter_context(
                    OnnxRuntimeEngine(
                        plan.path,
                        device=target.device,
                        threads=1 if plan.graph.light else target.threads,
                        graph=plan.graph,
                    )
                )
                for plan in {plan.path: plan for plan in plans.values()}.values()
            }
            stack.pop_all()  # the caller owns them now
        return {name: opened[plan.path] for name, plan in plans.items()}

    def incompatibility(self, plans: Sequence[PlanOrigin], target: OnnxRuntimeTarget) -> str:
        return self.device_problem(target.device)[0]

    def library_version(self) -> str:
        return f"onnxruntime {ort.__version__}"

    def device_problem(self, device: str) -> tuple[str, str]:
        """Test whether the device's provider really starts."""
        provider = PROVIDERS[device]
        if provider not in ort.get_available_providers():
            return (
                f"this onnxruntime has no {provider}",
                f"{pip_install('onnxruntime-gpu')} without onnxruntime",
            )
        ort.set_default_logger_severity(SILENT)  # the problem is reported once, by the return value
        try:
            started = ort.InferenceSession(IDENTITY, providers=[provider]).get_providers()[0]
        except Exception as error:  # the library raises plain RuntimeErrors and its own types alike
            return f"{provider} fails: {summary(error)}", "repair its driver and libraries, or use device = 'cpu'"
        finally:
            ort.set_default_logger_severity(WARNINGS)
        if started != provider:
            return f"{provider} does not start here", "install its driver, CUDA and cuDNN, or use device = 'cpu'"
        return "", ""


def _check_version(built: str) -> None:
    if version_numbers(ort.__version__, 2) < version_numbers(built, 2):
        raise BundleError(
            f"built with onnxruntime {built}, installed is {ort.__version__}",
            f"pip install 'onnxruntime>={built}' or build again",
        )


class OnnxRuntimeEngine(OpenedEngine):
    """One inference session. `threads = 0` uses all cores; `device` is "cpu" or "cuda".

    Raises BackendUnavailable if the device's provider is not there: ONNX Runtime itself would
    silently fall back to the CPU. `as_written` runs node by node: without it ONNX Runtime replaces quantized products
    by its own kernels, with other sums, and has none for 8-bit floats. `graph` says which outputs go to the host;
    without it all do.
    """

    def __init__(
        self, plan: Path, *, device: str, threads: int, graph: GraphSpec | None = None, as_written: bool = False
    ) -> None:
        super().__init__()
        provider = PROVIDERS[device]
        if provider not in ort.get_available_providers():
            raise BackendUnavailable(f"this onnxruntime has no {provider}", "elit-export doctor says what to do")
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = ERRORS
        if as_written:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            self._session = ort.InferenceSession(plan, options, providers=[provider])
        except Exception as error:  # the library raises plain RuntimeErrors and its own types alike
            raise EngineError(f"onnxruntime cannot open {plan}: {summary(error)}", "build it again") from error
        if self._session.get_providers()[0] != provider:  # it falls back to the CPU without a word
            raise BackendUnavailable(
                f"onnxruntime could not start {provider} for {plan.name}",
                "elit-export doctor says what to do, or build a target with device = 'cpu'",
            )
        if graph:
            check_ports(plan, graph, *map(_ports, (self._session.get_inputs(), self._session.get_outputs())))
        self._device = device
        self._outputs = [output.name for output in self._session.get_outputs()]
        self._on_host = graph.on_host if graph else frozenset(self._outputs)

    def _run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        binding = self._session.io_binding()
        for name, array in inputs.items():
            self._bind_input(binding, name, array)
        for name in self._outputs:
            binding.bind_output(name, "cpu" if name in self._on_host else self._device)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # the library raises plain RuntimeErrors and its own types alike
            raise EngineError(f"onnxruntime failed: {summary(error)}") from error
        # Unshaped outputs are allocated for each call, so they are the caller's.
        values = zip(self._outputs, binding.get_outputs(), strict=True)
        return {name: value.numpy() if name in self._on_host else OrtArray(value) for name, value in values}

    @staticmethod
    def _bind_input(binding: Any, name: str, array: Array) -> None:
        if isinstance(array, OrtArray):
            binding.bind_ortvalue_input(name, array.value)
        else:
            host = array if isinstance(array, np.ndarray) else array.numpy()
            binding.bind_cpu_input(name, np.ascontiguousarray(host))

    def _release(self) -> None:
        del self._session


TYPES = {"float": "float32", "double": "float64"}  # in its words, where NumPy has others


def _ports(nodes: Sequence[Any]) -> list[Port]:
    return [Port(each.name, _dtype(each.type), tuple(map(open_dim, each.shape))) for each in nodes]


def _dtype(type_name: str) -> str:
    """NumPy's name of `tensor(float)`."""
    name = type_name.removeprefix("tensor(").removesuffix(")")
    return TYPES.get(name, name)


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


def open_as_written(graph: Path) -> Engine:
    """Open a graph that is not a plan, and run it node by node on the CPU."""
    return OnnxRuntimeEngine(graph, device="cpu", threads=0, as_written=True)


LOADERS: dict[str, EngineLoader] = {"onnxruntime": OnnxRuntimeLoader()}

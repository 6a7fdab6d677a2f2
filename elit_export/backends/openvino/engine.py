"""OpenVINO plan → engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from elit_export.arrays import HostArray
from elit_export.backends.openvino.cpu import cpu_features
from elit_export.backends.openvino.options import DEVICE, OpenVinoTarget
from elit_export.backends.ports import Port, check_ports
from elit_export.backends.protocols import (
    Array,
    Engine,
    EngineLoader,
    HostOutput,
    OpenedEngine,
    PlanFile,
    PlanOrigin,
    to_host,
)
from elit_export.errors import BundleError, EngineError, pip_install, summary
from elit_export.spec import GraphSpec

TYPES = {"f32": ov.Type.f32, "bf16": ov.Type.bf16}


class OpenVinoLoader:
    """Opens plans, but refuses those that were built on another CPU or by another version."""

    def open_engines(self, plans: Mapping[str, PlanFile], target: OpenVinoTarget) -> dict[str, Engine]:
        """Open each file once; raises BundleError for plans that cannot run here."""
        if reason := self.incompatibility(list(plans.values()), target):
            raise BundleError(f"these plans cannot run here: {reason}")
        with ExitStack() as stack:
            opened = {
                plan.path: stack.enter_context(OpenVinoEngine(plan.path, _properties(plan, target), plan.graph))
                for plan in {plan.path: plan for plan in plans.values()}.values()
            }
            stack.pop_all()  # the caller owns them now
        return {name: opened[plan.path] for name, plan in plans.items()}

    def incompatibility(self, plans: Sequence[PlanOrigin], target: OpenVinoTarget) -> str:
        for plan in plans:
            if problem := _version_problem(plan) or _cpu_problem(plan):
                return f"{problem}{_rebuild(target)}"
        return self.device_problem(target.device)[0]

    def library_version(self) -> str:
        return f"openvino {ov.__version__.partition('-')[0]}"

    def device_problem(self, device: str) -> tuple[str, str]:
        """Test whether the CPU plugin is installed."""
        if DEVICE in ov.Core().available_devices:
            return "", ""
        return "this openvino has no CPU plugin", pip_install("openvino", "--force-reinstall")


def _properties(plan: PlanFile, target: OpenVinoTarget) -> dict[str, Any]:
    """Return the properties to open a plan with: without them it would run in bf16 on any CPU that has it.

    Raises BundleError for an arithmetic that no build writes.
    """
    arithmetic = plan.built_on.get("arithmetic", "")
    if arithmetic not in TYPES:
        raise BundleError(f"{plan.path}: its arithmetic {arithmetic!r} is unknown", _rebuild(target))
    threads = {"INFERENCE_NUM_THREADS": target.threads} if target.threads else {}
    return {"INFERENCE_PRECISION_HINT": arithmetic, "PERFORMANCE_HINT": target.hint.upper(), **threads}


def _version_problem(plan: PlanOrigin) -> str:
    built = plan.versions.get("openvino", "unknown")
    if built == ov.__version__:
        return ""
    return (
        f"built with openvino {built}, installed is {ov.__version__}: "
        f"pip install 'openvino=={built.partition('-')[0]}' or "
    )


def _cpu_problem(plan: PlanOrigin) -> str:
    theirs, ours = set(plan.built_on.get("cpu_features", "").split()), set(cpu_features().split())
    if theirs == ours:
        return ""
    return f"built on a CPU with other features (they differ in {', '.join(sorted(theirs ^ ours))}): "


def _rebuild(target: OpenVinoTarget) -> str:
    inputs = " --samples FILE" if target.precision.quantized else ""
    return f"build it again here: elit-export build RECIPE --target TARGET --out BUNDLE{inputs}"


class OpenVinoEngine(OpenedEngine):
    """One compiled model with one request; raises EngineError if the library opens it in another arithmetic."""

    def __init__(self, plan: Path, properties: Mapping[str, Any], graph: GraphSpec) -> None:
        super().__init__()
        try:
            compiled = ov.Core().import_model(plan.read_bytes(), DEVICE, dict(properties))
        except Exception as error:  # of a damaged plan the library raises RuntimeError, UnicodeDecodeError and others
            raise EngineError(f"openvino cannot open {plan}: {summary(error, last=True)}", "build it again") from error
        expected = TYPES[properties["INFERENCE_PRECISION_HINT"]]
        actual = compiled.get_property("INFERENCE_PRECISION_HINT")
        if actual != expected:
            raise EngineError(f"openvino opened {plan.name} in {actual.to_string()}, not in {expected.to_string()}")
        check_ports(plan, graph, _ports(compiled.inputs), _ports(compiled.outputs))
        self._request = compiled.create_infer_request()
        self._inputs = {tensor.any_name for tensor in compiled.inputs}
        self._outputs = [output.any_name for output in compiled.outputs]
        self._on_host = graph.on_host

    def _run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        if inputs.keys() != self._inputs:  # a missing input would keep its value from the call before
            raise EngineError(f"openvino takes {', '.join(sorted(self._inputs))}, not {', '.join(sorted(inputs))}")
        try:
            arrays = {name: np.asarray(to_host(array), order="C") for name, array in inputs.items()}
            values = self._request.infer(arrays, share_inputs=True)  # outputs are copied: they are the caller's
        except RuntimeError as error:  # what the library raises
            raise EngineError(f"openvino failed: {summary(error, last=True)}") from error
        return {name: self._output(name, values[name]) for name in self._outputs}

    def _output(self, name: str, values: HostArray) -> Array:
        return values if name in self._on_host else HostOutput(values)

    def _release(self) -> None:
        del self._request


def _ports(nodes: Sequence[Any]) -> list[Port]:
    return [Port(each.any_name, each.element_type.to_dtype().name, _dims(each.partial_shape)) for each in nodes]


def _dims(shape: Any) -> tuple[int | None, ...] | None:
    if shape.rank.is_dynamic:
        return None
    return tuple(size.get_length() if size.is_static else None for size in shape)


LOADERS: dict[str, EngineLoader] = {"openvino": OpenVinoLoader()}

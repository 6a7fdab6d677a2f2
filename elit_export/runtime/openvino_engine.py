"""OpenVINO engines: the only file of the runtime that names this library.

Takes: a plan made by `build/openvino.py`.  Gives: an Engine.  May touch: the plan file.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from elit_export.errors import BundleError, EngineError, last_line
from elit_export.machine import cpu_features
from elit_export.manifest import Plan, PlanSet
from elit_export.runtime.engine import HOST_OUTPUTS, Array, Engine, HostArray, HostOutput, to_host

DEVICE = "CPU"
MOST_THREADS = 1024  # more than any machine has cores; the library would start them all
HINTS = ("latency", "throughput")
TYPES = {"f32": ov.Type.f32, "bf16": ov.Type.bf16}


def open_engines(plans: Mapping[str, Path], plan_set: PlanSet) -> dict[str, OpenVinoEngine]:
    """Open verified plans, each file once; raises BundleError for plans that another CPU or version made."""
    if reason := unfit(plan_set):
        raise BundleError(f"target {plan_set.target} cannot run here: {reason}")
    made = {plan.artifact.name: plan for plan in plan_set.plans}
    with ExitStack() as stack:
        opened = {
            path: stack.enter_context(OpenVinoEngine(path, _properties(made[path.parent.name], plan_set)))
            for path in set(plans.values())
        }
        stack.pop_all()  # the caller owns them now
    return {name: opened[path] for name, path in plans.items()}


def _properties(plan: Plan, plan_set: PlanSet) -> dict[str, Any]:
    """All must be said again: a plan opened without them runs in bf16 wherever the CPU has it.

    Raises BundleError for what no build writes.
    """
    threads, hint = (plan_set.options.get(name) for name in ("threads", "hint"))
    arithmetic = plan.built_on.get("arithmetic", "")
    counts = isinstance(threads, int) and 0 <= threads <= MOST_THREADS
    if not counts or hint not in HINTS or arithmetic not in TYPES:
        raise BundleError(
            f"target {plan_set.target}: threads {threads!r}, hint {hint!r} and arithmetic {arithmetic!r} cannot be: "
            f"{_rebuild(plan_set)}"
        )
    chosen = {"INFERENCE_NUM_THREADS": threads} if threads else {}
    return {"INFERENCE_PRECISION_HINT": arithmetic, "PERFORMANCE_HINT": hint.upper(), **chosen}


def unfit(plan_set: PlanSet) -> str:
    """Why these plans cannot run here; empty if they can."""
    here = {"cpu_features": cpu_features(), "version": ov.__version__}
    for plan in plan_set.plans:
        built = {
            "cpu_features": plan.built_on.get("cpu_features", ""),
            "version": plan.versions.get("openvino", "unknown"),
        }
        if built["version"] != here["version"]:
            return (
                f"built with openvino {built['version']}, installed is {here['version']}: "
                f"pip install 'openvino=={built['version'].partition('-')[0]}' or {_rebuild(plan_set)}"
            )
        if built["cpu_features"] != here["cpu_features"]:
            return f"{_other_cpu(built['cpu_features'], here['cpu_features'])}: {_rebuild(plan_set)}"
    return device_problem("openvino", plan_set.device)[0]


def _other_cpu(built: str, here: str) -> str:
    theirs, ours = set(built.split()), set(here.split())
    differing = ", ".join(sorted(theirs ^ ours))
    return f"built on a CPU with other features (they differ in {differing})"


def _rebuild(plan_set: PlanSet) -> str:
    samples = " --samples FILE" if plan_set.samples else ""
    return f"build it again here: elit-export build RECIPE --target {plan_set.target} --out BUNDLE{samples}"


def library_version(library: str) -> str:
    return f"{library} {ov.__version__.partition('-')[0]}"


def device_problem(_library: str, _device: str) -> tuple[str, str]:
    """(what is wrong, what to do), both empty if the CPU is there. For `doctor`."""
    if DEVICE in ov.Core().available_devices:
        return "", ""
    return "this openvino has no CPU plugin", "pip install --force-reinstall 'elit-export[openvino]'"


class OpenVinoEngine(Engine):
    """One compiled model with one request; raises EngineError if the library opens it in another arithmetic."""

    def __init__(self, plan: Path, properties: Mapping[str, Any]) -> None:
        try:
            compiled = ov.Core().import_model(plan.read_bytes(), DEVICE, dict(properties))
        except RuntimeError as error:  # what the library raises
            raise EngineError(f"openvino cannot open {plan}: {last_line(error)}") from error
        wanted = TYPES[properties["INFERENCE_PRECISION_HINT"]]
        found = compiled.get_property("INFERENCE_PRECISION_HINT")
        if found != wanted:
            raise EngineError(f"openvino opened {plan.name} in {found.to_string()}, not in {wanted.to_string()}")
        self._request = compiled.create_infer_request()
        self._inputs = {given.any_name for given in compiled.inputs}
        self._outputs = [output.any_name for output in compiled.outputs]

    def __call__(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        if inputs.keys() != self._inputs:  # what is left out would be what the call before gave
            raise EngineError(f"openvino takes {', '.join(sorted(self._inputs))}, not {', '.join(sorted(inputs))}")
        try:
            given = {name: np.asarray(to_host(array), order="C") for name, array in inputs.items()}
            found = self._request.infer(given, share_inputs=True)  # outputs are copied: they are the caller's
        except RuntimeError as error:  # what the library raises
            raise EngineError(f"openvino failed: {last_line(error)}") from error
        return {name: self._output(name, found[name]) for name in self._outputs}

    @staticmethod
    def _output(name: str, values: HostArray) -> Array:
        return values if name in HOST_OUTPUTS else HostOutput(values)

    def close(self) -> None:
        self.__dict__.pop("_request", None)

"""Graph → ONNX Runtime plan: the optimized model, written back as ONNX.

"Extended" optimization is the highest level whose result does not depend on the CPU that ran it.
Optimizations that depend on the CPU run when the plan is opened.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

import onnxruntime as ort

from elit_export.backends.onnxruntime.options import PROVIDERS, OnnxRuntimeTarget
from elit_export.backends.protocols import Builder, BuiltPlan, GraphFile, OnShare, RealInputs
from elit_export.errors import BackendUnavailable, BuildError
from elit_export.spec import GraphSpec, Profile

EXTERNAL_FROM_BYTES = "1024"


class OnnxRuntimeBuilder:
    """Builds one plan for all profiles."""

    def check(self, target: OnnxRuntimeTarget) -> None:
        """Raise BackendUnavailable if the target's provider is not part of this ONNX Runtime."""
        provider = PROVIDERS[target.device]
        if provider not in ort.get_available_providers():
            raise BackendUnavailable(
                f"device {target.device!r}: this onnxruntime has no {provider}", "elit-export doctor says what to do"
            )

    def fingerprint(self, target: OnnxRuntimeTarget) -> dict[str, str]:
        return {"onnxruntime": ort.__version__}

    def group_profiles(self, profiles: Sequence[Profile], target: OnnxRuntimeTarget) -> list[tuple[Profile, ...]]:
        """Return one group: ONNX Runtime has no optimization profiles."""
        return [tuple(profiles)]

    def build_plan(
        self,
        graph: GraphFile,
        folder: Path,
        profiles: Sequence[Profile],
        target: OnnxRuntimeTarget,
        inputs: RealInputs | None,
        progress: OnShare,
    ) -> BuiltPlan:
        """Write the plan into `folder`; raises BuildError, or BackendUnavailable if the provider does not start."""
        provider, name = PROVIDERS[target.device], graph.path.name
        try:
            session = ort.InferenceSession(graph.path, _session_options(graph, folder), providers=[provider])
        except Exception as error:  # the library raises plain RuntimeErrors and its own types alike
            raise BuildError(f"onnxruntime cannot build {name}: {error}") from error
        if session.get_providers()[0] != provider:  # it falls back to the CPU silently
            raise BackendUnavailable(
                f"onnxruntime could not start {provider} (it offers {', '.join(session.get_providers())})",
                f"build target device {target.device!r} on a machine that has it, with elit-export[onnxruntime-gpu]",
            )
        progress(1.0)
        return BuiltPlan(
            file=name,
            label="onnxruntime",
            versions={"onnxruntime": ort.__version__},
            built_on={"machine": platform.machine(), "system": platform.system()},
        )


def _session_options(graph: GraphFile, folder: Path) -> ort.SessionOptions:
    options, name = ort.SessionOptions(), graph.path.name
    options.graph_optimization_level = _level_of(graph.spec)
    options.optimized_model_filepath = str(folder / name)
    options.log_severity_level = 3
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{name}.data")
    options.add_session_config_entry(
        "session.optimized_model_external_initializers_min_size_in_bytes", EXTERNAL_FROM_BYTES
    )
    return options


def _level_of(graph: GraphSpec) -> ort.GraphOptimizationLevel:
    """Disable optimization for a graph with an `If`, which is optimized when it is opened.

    ONNX Runtime 1.24 writes branches that it refuses to read: several constants have one name.
    """
    levels = ort.GraphOptimizationLevel
    return levels.ORT_DISABLE_ALL if graph.has_if else levels.ORT_ENABLE_EXTENDED


BUILDERS: dict[str, Builder] = {"onnxruntime": OnnxRuntimeBuilder()}

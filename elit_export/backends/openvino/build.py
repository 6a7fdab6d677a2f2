"""Graph → OpenVINO plan, for CPUs: the exported model, in int8 after quantization by NNCF.

`export_model` writes the plan. It holds the graph as it was read: the library casts to bf16 when it opens the plan, so
the plan's facts name the arithmetic.
"""

from __future__ import annotations

import io
import logging
import os
import platform
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import openvino as ov

from elit_export.backends.openvino.cpu import cpu_features
from elit_export.backends.openvino.options import DEVICE, OpenVinoTarget
from elit_export.backends.protocols import Builder, BuiltPlan, GraphFile, OnShare, RealInputs
from elit_export.errors import BackendUnavailable, BuildError, pip_install, summary
from elit_export.spec import Precision, Profile

NO_TELEMETRY = "NNCF_CI"
AMX = "amx_int8"
MISSING_ARITHMETIC = {Precision.BF16: "BF16", Precision.INT8: "INT8"}  # the library's names


class OpenVinoBuilder:
    """Builds one plan for all profiles."""

    def check(self, target: OpenVinoTarget) -> None:
        """Raise BackendUnavailable if this CPU or this installation cannot build for the target."""
        needed = MISSING_ARITHMETIC.get(target.precision)
        if needed and needed not in _capabilities():
            raise BackendUnavailable(
                f"precision {target.precision.value}: this CPU has no {needed} arithmetic, openvino would emulate it "
                f"slowly",
                "build a target with precision fp32",
            )
        if target.precision.quantized and find_spec("nncf") is None:
            raise BackendUnavailable("precision int8: openvino needs nncf for it", pip_install("openvino"))

    def fingerprint(self, target: OpenVinoTarget) -> dict[str, str]:
        return {**_versions(target.precision), "cpu_features": cpu_features()}

    def group_profiles(self, profiles: Sequence[Profile], target: OpenVinoTarget) -> list[tuple[Profile, ...]]:
        """Return one group: OpenVINO has no optimization profiles."""
        return [tuple(profiles)]

    def build_plan(
        self,
        graph: GraphFile,
        folder: Path,
        profiles: Sequence[Profile],
        target: OpenVinoTarget,
        inputs: RealInputs | None,
        progress: OnShare,
    ) -> BuiltPlan:
        """Write the plan into `folder`; raises BuildError with what the library said."""
        precision = Precision.FP32 if graph.spec.exact else target.precision
        arithmetic = _arithmetic(precision)
        try:
            model = ov.Core().read_model(graph.path)
            if precision.quantized:
                assert inputs
                model = _quantized(model, inputs, graph.kept_exact)
            progress(0.8)
            compiled = ov.Core().compile_model(model, DEVICE, {"INFERENCE_PRECISION_HINT": arithmetic})
            content = compiled.export_model()
        except RuntimeError as error:  # what the library raises
            raise BuildError(f"openvino cannot build {graph.path.name}: {summary(error, last=True)}") from error
        file = graph.path.with_suffix(".blob").name
        (folder / file).write_bytes(content.getbuffer())
        progress(1.0)
        return BuiltPlan(
            file=file,
            label="openvino",
            versions=_versions(precision),
            built_on={
                "machine": platform.machine(),
                "system": platform.system(),
                "cpu_features": cpu_features(),
                "arithmetic": arithmetic,
            },
        )


def _capabilities() -> list[str]:
    capabilities: list[str] = ov.Core().get_property(DEVICE, "OPTIMIZATION_CAPABILITIES")
    return capabilities


def _arithmetic(precision: Precision) -> str:
    """Return the floating-point type by OpenVINO's name. In int8 plans it is bf16 if the CPU has it, but has no AMX.

    With AMX, bf16 misses the tolerance at one size of call: see docs/eight-bits.md.
    """
    rest_in_bf16 = "BF16" in _capabilities() and AMX not in cpu_features().split()
    casts = precision is Precision.BF16 or (precision.quantized and rest_in_bf16)
    return "bf16" if casts else "f32"


def _versions(precision: Precision) -> dict[str, str]:
    return {"openvino": ov.__version__} | ({"nncf": _nncf().__version__} if precision.quantized else {})


def _nncf() -> ModuleType:
    """Import NNCF without its telemetry: only this environment variable keeps it from reporting its use to Intel.

    Raises BackendUnavailable if it is broken.
    """
    before = os.environ.get(NO_TELEMETRY)
    os.environ[NO_TELEMETRY] = "1"  # read while it is imported
    try:
        with _silent():
            import nncf
    except Exception as error:  # a broken library can raise anything
        raise BackendUnavailable(
            f"precision int8: nncf is installed but broken, {summary(error)}",
            pip_install("openvino", "--force-reinstall"),
        ) from error
    finally:
        if before is None:
            del os.environ[NO_TELEMETRY]
        else:
            os.environ[NO_TELEMETRY] = before
    module: ModuleType = nncf
    return module


def _quantized(model: ov.Model, inputs: RealInputs, kept_exact: Sequence[str]) -> ov.Model:
    """Quantize all linear layers except those of `kept_exact`, and the products of attention, to int8.

    Ranges hold the minimum and maximum over all inputs. docs/eight-bits.md compares both choices with the alternatives.
    """
    nncf = _nncf()
    ranges = nncf.quantization.range_estimator.RangeEstimatorParametersSet.MINMAX
    try:
        with _silent():
            quantized: ov.Model = nncf.quantize(
                model,
                nncf.Dataset(list(inputs.inputs())),
                model_type=nncf.ModelType.TRANSFORMER,
                subset_size=len(inputs),
                ignored_scope=nncf.IgnoredScope(
                    patterns=[rf".*{re.escape(path)}/.*" for path in kept_exact], validate=False
                ),
                advanced_parameters=nncf.AdvancedQuantizationParameters(activations_range_estimator_params=ranges),
            )
    except Exception as error:  # it can raise anything
        raise BuildError(
            f"nncf cannot quantize the graph: {summary(error, last=True)}",
            f"{pip_install('openvino', '-U')}, or collect the samples again",
        ) from error
    return quantized


@contextmanager
def _silent() -> Iterator[None]:
    """Silence NNCF, which lists all nodes that it skips, and draws progress bars."""
    logger = logging.getLogger("nncf")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


BUILDERS: dict[str, Builder] = {"openvino": OpenVinoBuilder()}

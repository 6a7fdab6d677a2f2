"""Graph → OpenVINO plan, for CPUs: the exported model, in int8 after quantization by NNCF.

A plan is what `export_model` writes. It holds the graph as it was read: rounding to bf16 is done by the library
when a plan is opened, so that a plan says in which arithmetic that must be.
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
from elit_export.errors import BackendUnavailable, BuildError, summary
from elit_export.spec import Precision, Profile

NO_TELEMETRY = "NNCF_CI"
AMX = "amx_int8"
MISSING_ARITHMETIC = {Precision.BF16: "BF16", Precision.INT8: "INT8"}  # in the library's words


class OpenVinoBuilder:
    """One plan for all profiles."""

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
            raise BackendUnavailable(
                "precision int8: openvino needs nncf for it", "pip install 'elit-export[openvino]'"
            )

    def fingerprint(self, target: OpenVinoTarget) -> dict[str, str]:
        return {**_versions(target.precision), "cpu_features": cpu_features()}

    def group_profiles(self, profiles: Sequence[Profile], target: OpenVinoTarget) -> list[tuple[Profile, ...]]:
        """One group: OpenVINO has no optimization profiles."""
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
    """Of floating point, in OpenVINO's words. What int8 leaves over is bf16 where the CPU has it, but not with AMX.

    On a CPU with AMX, OpenVINO 2026.4 gives one call of the shipped model (K = 8, 16 rows) with 18.6 dB where the rest
    of an int8 plan is bf16, and with 33.4 dB where it is f32; other calls differ by a decibel at most.
    """
    rest_in_bf16 = "BF16" in _capabilities() and AMX not in cpu_features().split()
    casts = precision is Precision.BF16 or (precision.quantized and rest_in_bf16)
    return "bf16" if casts else "f32"


def _versions(precision: Precision) -> dict[str, str]:
    return {"openvino": ov.__version__} | ({"nncf": _nncf().__version__} if precision.quantized else {})


def _nncf() -> ModuleType:
    """NNCF without its telemetry: it reports its use to Intel unless told not to, and is told by this alone.

    Raises BackendUnavailable if it is broken.
    """
    before = os.environ.get(NO_TELEMETRY)
    os.environ[NO_TELEMETRY] = "1"  # read while it is imported
    try:
        with _silent():
            import nncf
    except Exception as error:  # a broken library raises what it likes
        raise BackendUnavailable(
            f"precision int8: nncf is installed but broken, {summary(error)}",
            "pip install --force-reinstall 'elit-export[openvino]'",
        ) from error
    finally:
        if before is None:
            del os.environ[NO_TELEMETRY]
        else:
            os.environ[NO_TELEMETRY] = before
    module: ModuleType = nncf
    return module


def _quantized(model: ov.Model, inputs: RealInputs, kept_exact: Sequence[str]) -> ov.Model:
    """All linear layers between embedders and final layer but adaLN, and the products of attention, in int8.

    With the modules of `kept_exact` in int8 too the velocity of B/2 falls from 35 to 21 dB, that of the shipped model
    from 26 to 7 dB (tried by hand with NNCF's own ranges, worst rows). Of a small random model with text it is 42 dB
    with the embedders of image and text in float32, 38 dB with them in int8.
    Ranges are those that all inputs reach: by the means of each input's ends, NNCF's own choice, the residual of
    the shipped model falls from 33 to 27 dB (the worst of single rows).
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
    except Exception as error:  # it raises what it likes
        raise BuildError(
            f"nncf cannot quantize the graph: {summary(error, last=True)}",
            "pip install -U 'elit-export[openvino]', or collect the samples again",
        ) from error
    return quantized


@contextmanager
def _silent() -> Iterator[None]:
    """NNCF lists every node that it leaves alone, and draws bars."""
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

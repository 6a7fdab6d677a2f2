"""Graph → OpenVINO plan, for CPUs: the exported model, in int8 after quantization by NNCF.

Takes: the fp32 graph, profiles, a target, samples for int8.  Gives: one plan for all profiles.
May touch: the folder it is given.

A plan is what `export_model` writes. It holds the graph as it was read: rounding to bf16 is done by the library
when a plan is opened, so that a plan says in which arithmetic that must be.
"""

from __future__ import annotations

import io
import logging
import os
import platform
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import openvino as ov

from elit_export.build.plan import BuiltPlan, OnShare
from elit_export.errors import BackendUnavailable, BuildError, first_line, last_line
from elit_export.machine import cpu_features
from elit_export.recipe import OpenVinoTarget
from elit_export.samples import Samples
from elit_export.spec import EXACT_GRAPHS, Precision, Profile

DEVICE = "CPU"
# What NNCF leaves in floating point: adaLN, embedders and the final layer. With them in int8 the velocity of B/2 falls
# from 35 to 21 dB, that of the shipped model from 26 to 7 dB (tried by hand with NNCF's own ranges, worst rows). Of a
# small random model with text it is 42 dB with the embedders of image and text in float32, 38 dB with them in int8.
KEPT_HIGH = r".*(modulation|embed|img_in|txt_in|final).*"
NO_TELEMETRY = "NNCF_CI"


def check(target: OpenVinoTarget) -> None:
    """Raise BackendUnavailable if this CPU or this installation cannot build for the target."""
    missing = {Precision.BF16: "BF16", Precision.INT8: "INT8"}.get(target.precision)
    if missing and missing not in _capabilities():
        raise BackendUnavailable(
            f"precision {target.precision.value}: this CPU has no {missing} arithmetic, openvino would emulate it "
            f"slowly: build a target with precision fp32"
        )
    if target.precision is Precision.INT8 and find_spec("nncf") is None:
        raise BackendUnavailable("precision int8: openvino needs nncf for it: pip install 'elit-export[openvino]'")


def _capabilities() -> list[str]:
    capabilities: list[str] = ov.Core().get_property(DEVICE, "OPTIMIZATION_CAPABILITIES")
    return capabilities


def made_by(target: OpenVinoTarget) -> dict[str, str]:
    return {**_versions(target.precision), "cpu_features": cpu_features()}


def grouped(profiles: Sequence[Profile], target: OpenVinoTarget) -> list[tuple[Profile, ...]]:
    """One plan for all: OpenVINO has no optimization profiles."""
    return [tuple(profiles)]


def build_plan(
    graph: Path,
    folder: Path,
    profiles: Sequence[Profile],
    target: OpenVinoTarget,
    samples: Samples | None,
    progress: OnShare,
) -> BuiltPlan:
    """Write the plan into `folder`; raises BuildError with what the library said."""
    precision = Precision.FP32 if graph.stem in EXACT_GRAPHS else target.precision
    arithmetic = _arithmetic(precision)
    try:
        model = ov.Core().read_model(graph)
        if precision is Precision.INT8:
            assert samples
            model = _quantized(model, samples)
        progress(0.8)
        compiled = ov.Core().compile_model(model, DEVICE, {"INFERENCE_PRECISION_HINT": arithmetic})
        content = compiled.export_model()
    except RuntimeError as error:  # what the library raises
        raise BuildError(f"openvino cannot build {graph.name}: {last_line(error)}") from error
    file = graph.with_suffix(".blob").name
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


def _arithmetic(precision: Precision) -> str:
    """Of floating point, in OpenVINO's words. What int8 leaves over is bf16 where the CPU has it."""
    rounds = precision is Precision.BF16 or (precision is Precision.INT8 and "BF16" in _capabilities())
    return "bf16" if rounds else "f32"


def _versions(precision: Precision) -> dict[str, str]:
    return {"openvino": ov.__version__} | ({"nncf": _nncf().__version__} if precision is Precision.INT8 else {})


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
            f"precision int8: nncf is installed but broken, {first_line(error)}: "
            f"pip install --force-reinstall 'elit-export[openvino]'"
        ) from error
    finally:
        if before is None:
            del os.environ[NO_TELEMETRY]
        else:
            os.environ[NO_TELEMETRY] = before
    module: ModuleType = nncf
    return module


def _quantized(model: ov.Model, samples: Samples) -> ov.Model:
    """All linear layers between embedders and final layer but adaLN, and the products of attention, in int8.

    Ranges are those that all samples reach: by the means of each sample's ends, NNCF's own choice, the residual of
    the shipped model falls from 33 to 27 dB (the worst of single rows).
    """
    nncf = _nncf()
    ranges = nncf.quantization.range_estimator.RangeEstimatorParametersSet.MINMAX
    try:
        with _silent():
            quantized: ov.Model = nncf.quantize(
                model,
                nncf.Dataset(list(samples.inputs())),
                model_type=nncf.ModelType.TRANSFORMER,
                subset_size=len(samples),
                ignored_scope=nncf.IgnoredScope(patterns=[KEPT_HIGH], validate=False),
                advanced_parameters=nncf.AdvancedQuantizationParameters(activations_range_estimator_params=ranges),
            )
    except Exception as error:  # it raises what it likes
        raise BuildError(
            f"nncf cannot quantize the graph: {last_line(error)}: "
            f"pip install -U 'elit-export[openvino]', or take samples anew"
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

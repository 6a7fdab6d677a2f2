"""The options of an ONNX Runtime target in a recipe."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from elit_export.backends.target import POLYGRAPHY_ONNXRT, PolygraphyRunner, Target, TargetFacts, Threads
from elit_export.spec import Precision

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OnnxRuntimeTarget(Target):
    """A target of ONNX Runtime; `threads = 0` uses all cores."""

    facts: ClassVar = TargetFacts(devices=tuple(PROVIDERS), precisions=(Precision.FP32,))

    backend: Literal["onnxruntime"]
    threads: Threads = 0

    @property
    def polygraphy(self) -> PolygraphyRunner:
        return replace(POLYGRAPHY_ONNXRT, options=(*POLYGRAPHY_ONNXRT.options, "--providers", self.device))

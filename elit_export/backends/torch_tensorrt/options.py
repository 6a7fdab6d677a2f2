"""The options of a Torch-TensorRT target in a recipe."""

from __future__ import annotations

from typing import ClassVar, Literal

from elit_export.backends.target import PROGRAM, Target, TargetFacts
from elit_export.spec import Precision


class TorchTensorRTTarget(Target):
    """A target of Torch-TensorRT, on the GPU of the machine that builds."""

    facts: ClassVar = TargetFacts(
        devices=("cuda",),
        precisions=(Precision.FP32, Precision.FP16, Precision.BF16),
        input_format=PROGRAM,
        supports_if=False,
        keeps_nodes=False,
        plans_are_programs=True,
    )

    backend: Literal["torch-tensorrt"]
    device: str = "cuda"

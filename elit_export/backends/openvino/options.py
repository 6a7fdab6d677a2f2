"""The options of an OpenVINO target in a recipe."""

from __future__ import annotations

from typing import ClassVar, Literal

from elit_export.backends.target import Target, TargetFacts, Threads
from elit_export.spec import Precision

DEVICE = "CPU"  # the library's name


class OpenVinoTarget(Target):
    """A target of OpenVINO; `threads = 0` uses all cores, `hint` is what the library tunes for."""

    facts: ClassVar = TargetFacts(
        devices=("cpu",),
        precisions=(Precision.FP32, Precision.BF16, Precision.INT8),
        casts_weights=True,
        keeps_nodes=False,
    )

    backend: Literal["openvino"]
    device: str = "cpu"
    threads: Threads = 0
    hint: Literal["latency", "throughput"] = "latency"

"""Libraries that commands beside sampling need, and the extras that bring them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tool:
    """What a library is for, the extra that brings it, and its name for pip if that is another."""

    used_for: str
    extra: str
    package: str = ""


# What commands beside sampling need.
TOOLS = {
    "torch": Tool("export, build, train", "export"),
    "onnx": Tool("export, build", "export"),
    "onnx_ir": Tool("export, build", "export"),
    "onnxscript": Tool("export, build", "export"),
    "safetensors": Tool("checkpoints", "export"),
    "nncf": Tool("int8 plans of OpenVINO", "openvino"),
    "modelopt": Tool("int8 and fp8 graphs for TensorRT", "quantize", package="nvidia-modelopt"),
    "diffusers": Tool("VAE decoders", "diffusers"),
    "transformers": Tool("text encoders", "text"),
    "matplotlib": Tool("plots", "report"),
}

"""Libraries that commands beside sampling need, and the extras that bring them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from elit_export.errors import BackendUnavailable, pip_install


@dataclass(frozen=True)
class Tool:
    """The use of a library, and the extra that brings it."""

    used_for: str
    extra: str


# What commands beside sampling need.
TOOLS = {
    "torch": Tool("export, build, train", "export"),
    "onnx": Tool("export, build", "export"),
    "onnx_ir": Tool("export, build", "export"),
    "onnxscript": Tool("export, build", "export"),
    "safetensors": Tool("checkpoints", "export"),
    "nncf": Tool("int8 plans of OpenVINO", "openvino"),
    "modelopt": Tool("int8 and fp8 graphs for TensorRT", "quantize"),
    "diffusers": Tool("VAE decoders", "diffusers"),
    "transformers": Tool("text encoders", "text"),
    "polygraphy": Tool("verify --polygraphy", "polygraphy"),
    "matplotlib": Tool("plots", "report"),
    "optuna": Tool("tune", "tune"),
}


@contextmanager
def naming_the_extra(what: str, *, otherwise: str = "") -> Iterator[None]:
    """Say which extra brings a library that `what` needs and does not find; `otherwise` is another way out."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in TOOLS:
            raise
        raise BackendUnavailable(
            f"{what} needs {error.name}", f"{pip_install(TOOLS[error.name].extra)}{otherwise}"
        ) from error

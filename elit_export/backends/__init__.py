"""The backends: one row and one folder each, with `options.py`, `build.py` and `engine.py`.

Takes: a graph on disk, profiles, a target of a recipe.  Gives: plans, and engines that run them.
May touch: the folder a plan is built into, the plan it opens. Libraries are imported on use.
To add a backend, write a folder here, a row below, and an extra in pyproject.toml.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Any

from elit_export.backends.onnxruntime.options import OnnxRuntimeTarget
from elit_export.backends.openvino.options import OpenVinoTarget
from elit_export.backends.protocols import Builder, EngineLoader
from elit_export.backends.target import Target, TargetFacts
from elit_export.backends.tensorrt.options import TensorRTTarget
from elit_export.backends.torch_tensorrt.options import TorchTensorRTTarget
from elit_export.errors import BackendUnavailable, InputError, did_you_mean, pip_install, summary


@dataclass(frozen=True, kw_only=True)
class Backend:
    """A row of the table: `library` is the module of the backend itself, `needs` are others that it requires.

    `options` is the class of its targets, `folder` holds its files, `extra` is the extra that pip installs. `usual` are
    the targets that recipes are begun with, by the names they have there: `usual_target` finds them.
    """

    name: str
    folder: str
    options: type[Target]
    library: str
    extra: str
    needs: tuple[str, ...] = ()
    usual: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def facts(self) -> TargetFacts:
        return self.options.facts

    @property
    def devices(self) -> tuple[str, ...]:
        return self.facts.devices

    def builder(self) -> Builder:
        """Return the builder of its plans; raises BackendUnavailable naming the extra to install."""
        builders: dict[str, Builder] = self._import("build").BUILDERS
        return builders[self.name]

    def loader(self) -> EngineLoader:
        """Return the loader of its plans; raises BackendUnavailable naming the extra to install."""
        loaders: dict[str, EngineLoader] = self._import("engine").LOADERS
        return loaders[self.name]

    def _import(self, file: str) -> ModuleType:
        """Import a file of the backend; raises BackendUnavailable if a library is missing or broken."""
        for library in (self.library, *self.needs):
            try:
                import_module(library)
            except Exception as error:  # a broken library can raise anything
                if isinstance(error, ModuleNotFoundError) and f"{library}.".startswith(f"{error.name}."):
                    raise BackendUnavailable(f"backend {self.name} needs {library}", pip_install(self.extra)) from error
                raise BackendUnavailable(
                    f"backend {self.name}: {library} is installed but broken, {summary(error)}",
                    pip_install(self.extra, "--force-reinstall"),
                ) from error
        return import_module(f"{__name__}.{self.folder}.{file}")


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend(
            name="onnxruntime",
            folder="onnxruntime",
            options=OnnxRuntimeTarget,
            library="onnxruntime",
            extra="onnxruntime",
            # `cpu` is ONNX Runtime: its plans run on any CPU, those of OpenVINO on one with the same features.
            usual={
                "cpu": {"device": "cpu", "precision": "fp32"},
                "cuda": {"device": "cuda", "precision": "fp32"},
            },
        ),
        Backend(
            name="openvino",
            folder="openvino",
            options=OpenVinoTarget,
            library="openvino",
            extra="openvino",
            usual={"openvino": {"precision": "fp32"}, "openvino-bf16": {"precision": "bf16"}},
        ),
        Backend(
            name="tensorrt",
            folder="tensorrt",
            options=TensorRTTarget,
            library="tensorrt",
            needs=("cuda.bindings.runtime",),
            extra="tensorrt",
            usual={
                "a100-tensorrt": {"precision": "bf16", "compute_capabilities": ["8.0"]},
                "h100-tensorrt": {"precision": "bf16", "compute_capabilities": ["9.0"]},
                "b200-tensorrt": {"precision": "bf16", "compute_capabilities": ["10.0"]},
            },
        ),
        Backend(
            name="tensorrt-rtx",
            folder="tensorrt",
            options=TensorRTTarget,
            library="tensorrt_rtx",
            needs=("cuda.bindings.runtime",),
            extra="tensorrt-rtx",
            usual={"rtx": {"precision": "bf16", "compute_capabilities": ["8.9", "12.0"]}},  # GeForce RTX 40 and 50
        ),
        Backend(
            name="torch-tensorrt",
            folder="torch_tensorrt",
            options=TorchTensorRTTarget,
            library="torch_tensorrt",
            extra="torch-tensorrt",
            usual={"torch-tensorrt": {"precision": "bf16"}},
        ),
    )
}


def usual_targets() -> dict[str, dict[str, Any]]:
    """The `[targets.NAME]` tables that recipes are begun with."""
    return {
        name: {"backend": backend.name, **values}
        for backend in BACKENDS.values()
        for name, values in backend.usual.items()
    }


def usual_target(name: str) -> dict[str, Any]:
    """One of them; raises InputError naming all, and the one that is probably meant."""
    known = usual_targets()
    if name not in known:
        raise InputError(
            f"no target {name!r} among the usual ones, {', '.join(known)}",
            did_you_mean(name, known) or "choose one of these, or write a recipe",
        )
    return known[name]

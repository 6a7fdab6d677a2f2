"""The table of backends: one row each, naming the two modules that know its library.

Takes: a name.  Gives: a Backend row.  May touch: nothing; the modules are imported on use.

A build module offers `build_plans(graph, folder, profiles, target) -> Iterator[BuiltPlan]`. An engine
module offers `open_engine(plan, facts) -> Engine`, where `facts` is the plan set as the manifest tells
it, `library_version() -> str` and `device_problem(device) -> (problem, remedy)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

from elit_export.errors import BackendUnavailable


@dataclass(frozen=True)
class Backend:
    """`devices` and `precisions` are what a recipe may ask of it; `extra` is what pip installs."""

    name: str
    library: str
    extra: str
    devices: tuple[str, ...]
    precisions: tuple[str, ...]
    build_module: str
    engine_module: str

    def builder(self) -> ModuleType:
        return self._import(self.build_module)

    def engines(self) -> ModuleType:
        return self._import(self.engine_module)

    def _import(self, module: str) -> ModuleType:
        try:
            return import_module(module)
        except ModuleNotFoundError as error:
            if error.name != self.library:
                raise
            raise BackendUnavailable(
                f"backend {self.name} needs {self.library}: pip install 'elit-export[{self.extra}]'"
            ) from error


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend(
            name="onnxruntime",
            library="onnxruntime",
            extra="onnxruntime",
            devices=("cpu", "cuda"),
            precisions=("fp32",),
            build_module="elit_export.build.onnxruntime",
            engine_module="elit_export.runtime.onnxruntime_engine",
        ),
    )
}

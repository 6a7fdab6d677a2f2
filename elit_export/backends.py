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
        """Raises BackendUnavailable if the library is missing or broken; what follows the last ": " is the remedy."""
        extra = f"'elit-export[{self.extra}]'"
        try:
            import_module(self.library)
        except Exception as error:  # a broken library raises what it likes
            if isinstance(error, ModuleNotFoundError) and error.name == self.library:
                raise BackendUnavailable(f"backend {self.name} needs {self.library}: pip install {extra}") from error
            raise BackendUnavailable(
                f"backend {self.name}: {self.library} is installed but broken, {_first_line(error)}: "
                f"pip install --force-reinstall {extra}"
            ) from error
        return import_module(module)


def _first_line(error: Exception) -> str:
    said = str(error).strip()
    return said.splitlines()[0] if said else type(error).__name__


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

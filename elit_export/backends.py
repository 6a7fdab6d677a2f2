"""The table of backends: one row each, naming the two modules that know its library.

Takes: a name.  Gives: a Backend row.  May touch: nothing; the modules are imported on use.

A build module offers
    check(target)                                          raises if it cannot build for the target here
    made_by(target) -> dict of names                       versions, and what else of this machine its plans depend on
    grouped(profiles, target) -> groups of profiles        each group shares a plan
    build_plan(graph, folder, profiles, target, samples, progress) -> BuiltPlan
                                                           what plans of a set share may lie beside `folder`;
                                                           samples of real inputs only where it quantizes
An engine module offers
    open_engines(plans, plan_set) -> engines               by name of profile; `plans` are their files
    unfit(plan_set) -> str                                 why its plans cannot run here, or nothing
    library_version(library) -> str
    device_problem(library, device) -> (problem, remedy)   for `doctor`, both empty if it works
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType

from elit_export.errors import BackendUnavailable, first_line


@dataclass(frozen=True)
class Backend:
    """`devices` and `precisions` are what a recipe may ask of it; `extra` is what pip installs.

    `library` is the module of the backend itself; `needs` others without which it does not run. `reads`
    is what it builds from: the "onnx" graph or the torch.export "program". `fuses` says whether it can run the
    graph `fused`, which chooses inside. `rounds` says that it makes every precision of the fp32 graph itself.
    """

    name: str
    library: str
    needs: tuple[str, ...] = field(default=(), kw_only=True)
    reads: str = field(default="onnx", kw_only=True)
    fuses: bool = field(default=True, kw_only=True)
    rounds: bool = field(default=False, kw_only=True)
    extra: str
    devices: tuple[str, ...]
    precisions: tuple[str, ...]
    build_module: str
    engine_module: str

    def builder(self) -> ModuleType:
        """Its build module; raises BackendUnavailable naming the extra to install."""
        return self._import(self.build_module)

    def engines(self) -> ModuleType:
        """Its engine module; raises BackendUnavailable naming the extra to install."""
        return self._import(self.engine_module)

    def library_version(self) -> str:
        version: str = self.engines().library_version(self.library)
        return version

    def device_problem(self, device: str) -> tuple[str, str]:
        """(what is wrong with a device here, what to do), both empty if it works."""
        problem, remedy = self.engines().device_problem(self.library, device)
        return problem, remedy

    def _import(self, module: str) -> ModuleType:
        """Raises BackendUnavailable if a library is missing or broken; what follows the last ": " is the remedy."""
        extra = f"'elit-export[{self.extra}]'"
        for library in (self.library, *self.needs):
            try:
                import_module(library)
            except Exception as error:  # a broken library raises what it likes
                if isinstance(error, ModuleNotFoundError) and f"{library}.".startswith(f"{error.name}."):
                    raise BackendUnavailable(f"backend {self.name} needs {library}: pip install {extra}") from error
                raise BackendUnavailable(
                    f"backend {self.name}: {library} is installed but broken, {first_line(error)}: "
                    f"pip install --force-reinstall {extra}"
                ) from error
        return import_module(module)


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
        Backend(
            name="openvino",
            library="openvino",
            extra="openvino",
            devices=("cpu",),
            precisions=("fp32", "bf16", "int8"),
            build_module="elit_export.build.openvino",
            engine_module="elit_export.runtime.openvino_engine",
            rounds=True,
        ),
        Backend(
            name="tensorrt",
            library="tensorrt",
            needs=("cuda.bindings.runtime",),
            extra="tensorrt",
            devices=("cuda",),
            precisions=("fp32", "fp16", "bf16", "int8", "fp8"),
            build_module="elit_export.build.tensorrt",
            engine_module="elit_export.runtime.tensorrt_engine",
        ),
        Backend(
            name="tensorrt-rtx",
            library="tensorrt_rtx",
            needs=("cuda.bindings.runtime",),
            extra="tensorrt-rtx",
            devices=("cuda",),
            precisions=("fp32", "fp16", "bf16", "int8", "fp8"),
            build_module="elit_export.build.tensorrt",
            engine_module="elit_export.runtime.tensorrt_engine",
        ),
        Backend(
            name="torch-tensorrt",
            library="torch_tensorrt",
            extra="torch-tensorrt",
            devices=("cuda",),
            precisions=("fp32", "fp16", "bf16"),
            build_module="elit_export.build.torch_tensorrt",
            engine_module="elit_export.runtime.torch_tensorrt_engine",
            reads="program",
            fuses=False,
        ),
    )
}

"""TensorRT engines, with `tensorrt` or `tensorrt_rtx`: their Python API is one.

Takes: plans made by `build/tensorrt.py`.  Gives: an Engine per profile.  May touch: the plan files,
the GPU, and the user's cache folder for what TensorRT for RTX compiles on the device.

The engines of a bank run one after another on one stream, so they share one activation buffer. Each
profile has its own context, made once, with fixed buffers for inputs and outputs; what a caller gets
is a copy that belongs to the caller.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from elit_export.backends import BACKENDS
from elit_export.errors import BackendUnavailable, EngineError
from elit_export.files import write_bytes
from elit_export.manifest import PlanSet
from elit_export.runtime import cuda as cuda_layer
from elit_export.runtime.cuda import Cuda
from elit_export.runtime.cuda_memory import Device, DeviceBuffer
from elit_export.runtime.engine import HOST_OUTPUTS, Array, Engine, HostArray, to_host

logger = logging.getLogger(__name__)
AMPERE = (8, 0)  # the oldest compute capability that hardware-compatible plans run on


@dataclass(frozen=True)
class Flavour:
    """Where the two libraries differ when running."""

    compiles_on_device: bool  # has a runtime cache, and captures CUDA graphs itself
    opens_older_plans: bool  # those built to be compatible
    tells_validity: bool  # of a plan's header, before it is deserialized


FLAVOURS = {
    "tensorrt": Flavour(compiles_on_device=False, opens_older_plans=True, tells_validity=False),
    "tensorrt-rtx": Flavour(compiles_on_device=True, opens_older_plans=False, tells_validity=True),
}


# ---------------------------------------------------------------- may it run here


def library_version(library: str) -> str:
    return f"{library} {import_module(library).__version__}"


def device_problem(_library: str, _device: str) -> tuple[str, str]:
    """(what is wrong, what to do), both empty if there is a GPU and its driver fits. For `doctor`."""
    return cuda_layer.device_problem()


def compute_capability() -> str:
    """Of the GPU here, like `8.9`; raises EngineError without one."""
    return Cuda().compute_capability()


def unfit(plan_set: PlanSet) -> str:
    """Why these plans cannot run here; empty if they can."""
    installed = import_module(BACKENDS[plan_set.backend].library).__version__
    if problem := _version_problem(plan_set, installed):
        return problem
    problem, remedy = cuda_layer.device_problem()
    if problem:
        return f"{problem}: {remedy}"
    return _device_mismatch(plan_set, compute_capability())


def _version_problem(plan_set: PlanSet, installed: str) -> str:
    """Plans open in the version that built them, and with version compatibility in later ones."""
    for plan in plan_set.plans:
        built = plan.versions.get(plan_set.backend, "")
        if built != installed and not (_fits_later_versions(plan_set) and _numbers(built) <= _numbers(installed)):
            return (
                f"built with {plan_set.backend} {built}, installed is {installed}: "
                f"pip install '{plan_set.backend}=={built}' or build again"
            )
    return ""


def _fits_later_versions(plan_set: PlanSet) -> bool:
    return FLAVOURS[plan_set.backend].opens_older_plans and plan_set.options.get("compatibility") in ("version", "both")


def _device_mismatch(plan_set: PlanSet, here: str) -> str:
    built_for = plan_set.options["compute_capabilities"]
    on_newer_gpus = plan_set.options.get("compatibility") in ("hardware", "both") and _numbers(here) >= AMPERE
    if here in built_for or on_newer_gpus:
        return ""
    return (
        f"built for compute capability {', '.join(built_for)}, this GPU has {here}: "
        f"add it to the target's compute_capabilities and build again"
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


# ---------------------------------------------------------------- opening


def open_engines(plans: Mapping[str, Path], plan_set: PlanSet) -> dict[str, TensorRTEngine]:
    """Open verified plans, each file once: an engine per profile.

    Raises BackendUnavailable before a plan's bytes reach TensorRT if its version or device does not fit.
    """
    if reason := unfit(plan_set):
        raise BackendUnavailable(f"target {plan_set.target} cannot run here: {reason}")
    return opened_on(Cuda(), import_module(BACKENDS[plan_set.backend].library), plans, plan_set)


def opened_on(cuda: Cuda, trt: Any, plans: Mapping[str, Path], plan_set: PlanSet) -> dict[str, TensorRTEngine]:
    """The engines over a given CUDA layer and library."""
    device = Device(cuda)
    with ExitStack() as stack:
        stack.callback(device.close)
        opened = {path: _owned(device, OpenedPlan(trt, path, plan_set)) for path in dict.fromkeys(plans.values())}
        # Contexts of one plan are numbered by the order of its profiles.
        seats = [(name, opened[path], _index(plans, name)) for name, path in plans.items()]
        scratch_bytes = max(plan.engine.get_device_memory_size_for_profile_v2(index) for _, plan, index in seats)
        scratch = device.take(scratch_bytes)
        engines = {
            name: stack.enter_context(TensorRTEngine(device, plan, index, (scratch, scratch_bytes)))
            for name, plan, index in seats
        }
        stack.pop_all()  # the caller owns the engines now, and they the device
    return engines


def _owned(device: Device, plan: OpenedPlan) -> OpenedPlan:
    device.own(plan.close)
    return plan


def _index(plans: Mapping[str, Path], name: str) -> int:
    """Which optimization profile of its plan a profile is: they were added in the order of their names here."""
    return [other for other, path in plans.items() if path == plans[name]].index(name)


class OpenedPlan:
    """A deserialized plan; its profiles share its weights.

    TensorRT for RTX compiles kernels on the device when they are first needed and keeps them in a
    runtime cache, which is read from the user's cache folder and written back when the plan is closed.
    """

    def __init__(self, trt: Any, path: Path, plan_set: PlanSet) -> None:
        graphs = bool(plan_set.options.get("cuda_graphs", True))
        flavour = FLAVOURS[plan_set.backend]
        self.trt = trt
        self.captures = graphs and not flavour.compiles_on_device
        runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
        # A version-compatible plan brings code that runs on the host; its hash was checked before.
        runtime.engine_host_code_allowed = _fits_later_versions(plan_set)
        content = path.read_bytes()
        if flavour.tells_validity:
            _check_header(trt, runtime, content, path)
        self.engine: Any = runtime.deserialize_cuda_engine(content)
        if self.engine is None:
            raise EngineError(f"{trt.__name__} cannot open {path}; its reason was written to the error output")
        self._config: Any = None
        if flavour.compiles_on_device:
            self._cache_file = _cache_file(f"{path.parent.name}-{trt.__name__}-{trt.__version__}")
            self._config = self._runtime_config(graphs)

    def _runtime_config(self, graphs: bool) -> Any:
        trt, config = self.trt, self.engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if graphs:
            config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self._cache = config.create_runtime_cache()
        self._load_cache()
        config.set_runtime_cache(self._cache)
        return config

    def context(self) -> Any:
        """A new execution context without activation memory of its own."""
        strategy = self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self.engine.create_execution_context(self._config or strategy)
        if context is None:
            raise EngineError(f"{self.trt.__name__} cannot make an execution context: out of GPU memory?")
        return context

    def _load_cache(self) -> None:
        try:
            kernels = self._cache_file.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:  # as good as none
            logger.warning("cannot read compiled kernels from %s: %s", self._cache_file, error)
            return
        if not self._cache.deserialize(kernels):
            logger.info("%s was made on another device or by another version; it is made again", self._cache_file)

    def _save_cache(self) -> None:
        try:
            write_bytes(self._cache_file, bytes(self._cache.serialize()))
        except OSError as error:  # the next start compiles again, nothing else is lost
            logger.warning("cannot keep compiled kernels in %s: %s", self._cache_file, error)

    def close(self) -> None:
        """Let go of the weights; after the contexts."""
        if self._config is not None:
            self._save_cache()
        self.engine = self._config = self._cache = None


def _check_header(trt: Any, runtime: Any, content: bytes, path: Path) -> None:
    """Raise EngineError if the library finds that a plan does not fit this version or GPU, with its reasons."""
    validity, diagnostics = runtime.get_engine_validity(content)
    if validity == trt.EngineValidity.INVALID:
        known = trt.EngineInvalidityDiagnostics.__members__.items()
        reasons = ", ".join(name.lower().replace("_", " ") for name, flag in known if diagnostics & int(flag))
        raise EngineError(f"{trt.__name__} cannot run {path}: {reasons or 'it gives no reason'}")


def _cache_file(name: str) -> Path:
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "elit_export" / f"{name}.cache"


# ---------------------------------------------------------------- running


@dataclass
class Port:
    """One input or output: a fixed device buffer of the profile's largest shape, and pinned memory beside it."""

    name: str
    dtype: Any
    address: int
    pinned_address: int
    pinned: HostArray


class TensorRTEngine(Engine):
    """One profile of a plan. `scratch` is the activation memory (address, bytes) that the bank's engines share.

    With CUDA graphs, the second call in a row with the same shapes captures, and the next ones replay.
    """

    def __init__(self, device: Device, plan: OpenedPlan, index: int, scratch: tuple[int, int]) -> None:
        self._device, self._plan = device, plan
        self._closed = self._warm = False
        self._graph: int | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._context: Any = None
        device.hold()
        with ExitStack() as undo:
            undo.callback(self.close)
            self._context = plan.context()
            self._context.set_device_memory(*scratch)
            chosen = self._context.set_optimization_profile_async(index, device.stream)
            self._require(chosen, f"set_optimization_profile_async {index}")
            self._inputs, self._outputs = self._ports(index)
            undo.pop_all()

    def __call__(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        if self._closed:
            raise EngineError("this engine is closed")
        if inputs.keys() != self._inputs.keys():
            raise EngineError(f"this engine takes {', '.join(self._inputs)}, not {', '.join(inputs)}")
        arrays = {name: self._near(port, inputs[name]) for name, port in self._inputs.items()}
        with self._device.lock:
            self._set_shapes({name: tuple(array.shape) for name, array in arrays.items()})
            for name, array in arrays.items():
                self._feed(self._inputs[name], array)
            self._run()
            outputs = {port.name: self._fetch(port) for port in self._outputs}
            self._device.wait()
            return {name: array.copy() if isinstance(array, np.ndarray) else array for name, array in outputs.items()}

    # ------------------------------------------------------------ shapes and buffers

    def _ports(self, index: int) -> tuple[dict[str, Port], list[Port]]:
        """Buffers for the largest shapes of the profile, bound once."""
        trt, engine = self._plan.trt, self._plan.engine
        names = [engine.get_tensor_name(number) for number in range(engine.num_io_tensors)]
        fed = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        for name in fed:
            largest = tuple(engine.get_tensor_profile_shape(name, index)[2])
            self._require(self._context.set_input_shape(name, largest), f"set_input_shape {name} {largest}")
        inputs = {name: self._port_for(name) for name in fed}
        return inputs, [self._port_for(name) for name in names if name not in fed]

    def _port_for(self, name: str) -> Port:
        shape = tuple(self._context.get_tensor_shape(name))
        dtype = np.dtype(self._plan.trt.nptype(self._plan.engine.get_tensor_dtype(name)))
        address = self._device.take(math.prod(shape) * dtype.itemsize)
        self._require(self._context.set_tensor_address(name, address), f"set_tensor_address {name}")
        return Port(name, dtype, address, *self._device.pinned(shape, dtype))

    def _set_shapes(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """A change of shape ends the life of a captured graph."""
        if shapes == self._shapes:
            return
        self._drop_graph()
        self._shapes, self._warm = {}, False  # unknown until all are set
        for name, shape in shapes.items():
            self._require(self._context.set_input_shape(name, shape), f"set_input_shape {name} {shape}")
        self._shapes = shapes

    # ------------------------------------------------------------ data

    def _near(self, port: Port, array: Array) -> HostArray | DeviceBuffer:
        """The array where it is, if the port can be fed from there, else on the host."""
        if isinstance(array, DeviceBuffer) and array.device is self._device and array.dtype == port.dtype:
            return array
        return to_host(array)

    def _feed(self, port: Port, array: HostArray | DeviceBuffer) -> None:
        cuda, stream = self._device.cuda, self._device.stream
        if isinstance(array, DeviceBuffer):
            cuda.on_device(port.address, array.address, array.size_bytes, stream)
            return
        port.pinned[: array.size] = array.reshape(-1)
        cuda.to_device(port.address, port.pinned_address, array.size * port.dtype.itemsize, stream)

    def _fetch(self, port: Port) -> HostArray | DeviceBuffer:
        """Ask for an output: on the host a view of pinned memory, valid after the stream is done."""
        cuda, stream = self._device.cuda, self._device.stream
        shape = tuple(self._context.get_tensor_shape(port.name))
        if port.name not in HOST_OUTPUTS:
            copy = DeviceBuffer(self._device, shape, port.dtype)
            cuda.on_device(copy.address, port.address, copy.size_bytes, stream)
            return copy
        size = math.prod(shape)
        cuda.to_host(port.pinned_address, port.address, size * port.dtype.itemsize, stream)
        return port.pinned[:size].reshape(shape)

    # ------------------------------------------------------------ launching

    def _run(self) -> None:
        if self._graph is None and self._plan.captures and self._warm:
            self._graph = self._captured()
        if self._graph is not None:
            self._device.cuda.launch(self._graph, self._device.stream)
            return
        self._enqueue()
        self._warm = True

    def _captured(self) -> int:
        cuda, stream = self._device.cuda, self._device.stream
        cuda.begin_capture(stream)
        try:
            self._enqueue()
        except BaseException:
            with suppress(EngineError):  # the first error is the one to tell
                cuda.destroy_graph(cuda.end_capture(stream))
            raise
        return cuda.end_capture(stream)

    def _enqueue(self) -> None:
        self._require(self._context.execute_async_v3(self._device.stream), "execute_async_v3")

    def _drop_graph(self) -> None:
        graph, self._graph = self._graph, None
        if graph is not None:
            self._device.cuda.destroy_graph(graph)

    def _require(self, done: bool, call: str) -> None:
        if not done:
            raise EngineError(f"{self._plan.trt.__name__}: {call} failed; its reason was written to the error output")

    # ------------------------------------------------------------ closing

    def close(self) -> None:
        """Every step is taken, whatever fails: wait, then graph, context, and with the last engine the device."""
        if self._closed:
            return
        self._closed = True
        with ExitStack() as steps:
            steps.callback(self._device.let_go)
            steps.callback(self._drop_context)
            steps.callback(self._drop_graph)
            self._device.wait()

    def _drop_context(self) -> None:
        self._context = None  # before the memory it uses

"""TensorRT plan → engines, with `tensorrt` or `tensorrt_rtx`, which have the same Python API.

The engines of a bank run one after another on one stream, so they share one activation buffer. Each
profile has its own context, made once, with fixed buffers for inputs and outputs. A caller gets copies
of outputs. TensorRT for RTX keeps compiled kernels in the user's cache folder.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from elit_export.arrays import HostArray
from elit_export.backends.ports import check_ports
from elit_export.backends.protocols import Array, Engine, EngineLoader, OpenedEngine, PlanFile, PlanOrigin, to_host
from elit_export.backends.tensorrt import cuda as cuda_layer
from elit_export.backends.tensorrt.memory import Device, DeviceBuffer
from elit_export.backends.tensorrt.opened import OpenedPlan
from elit_export.backends.tensorrt.options import AMPERE, FLAVOURS, Flavour, TensorRTTarget
from elit_export.backends.versions import version_numbers
from elit_export.errors import BackendUnavailable, EngineError

logger = logging.getLogger(__name__)
VERSION_PARTS = 9  # all parts: a plan fits one build of the library


@dataclass(frozen=True)
class TensorRTLoader:
    """Opens plans by one of the two libraries, which reads no byte of a plan before version and device were checked."""

    flavour: Flavour

    def open_engines(self, plans: Mapping[str, PlanFile], target: TensorRTTarget) -> dict[str, Engine]:
        """Open each file once, with an engine per profile."""
        if reason := self.incompatibility(list(plans.values()), target):
            raise BackendUnavailable(f"these plans cannot run here: {reason}")
        return dict(opened_on(cuda_layer.Cuda(), self.flavour.library(), plans, target))

    def incompatibility(self, plans: Sequence[PlanOrigin], target: TensorRTTarget) -> str:
        if problem := _version_problem(plans, target, self.flavour.library().__version__):
            return problem
        problem, remedy = self.device_problem(target.device)
        if problem:
            return f"{problem}: {remedy}"
        return _device_mismatch(target, cuda_layer.Cuda().compute_capability())

    def library_version(self) -> str:
        return f"{self.flavour.module} {self.flavour.library().__version__}"

    def device_problem(self, device: str) -> tuple[str, str]:
        """Test whether there is a GPU, and whether its driver fits."""
        return cuda_layer.device_problem()


def _version_problem(plans: Sequence[PlanOrigin], target: TensorRTTarget, installed: str) -> str:
    """Say which plan does not fit the installed version; with version compatibility, later versions fit too."""
    for plan in plans:
        built = plan.versions.get(target.backend, "")
        is_older = version_numbers(built, VERSION_PARTS) <= version_numbers(installed, VERSION_PARTS)
        if built != installed and not (target.fits_later_versions and is_older):
            return (
                f"built with {target.backend} {built}, installed is {installed}: "
                f"pip install '{target.backend}=={built}' or build again"
            )
    return ""


def _device_mismatch(target: TensorRTTarget, here: str) -> str:
    on_newer_gpus = target.fits_other_gpus and version_numbers(here) >= AMPERE
    if here in target.compute_capabilities or on_newer_gpus:
        return ""
    return (
        f"built for compute capability {', '.join(target.compute_capabilities)}, this GPU has {here}: "
        f"add it to the target's compute_capabilities and build again"
    )


# ---------------------------------------------------------------- opening


def opened_on(
    cuda: cuda_layer.Cuda, trt: Any, plans: Mapping[str, PlanFile], target: TensorRTTarget
) -> dict[str, TensorRTEngine]:
    """Open engines on a CUDA layer with a library."""
    device = Device(cuda)
    with ExitStack() as stack:
        stack.callback(device.close)
        opened = {plan.path: _owned(device, OpenedPlan(trt, plan, target)) for plan in _each_file(plans)}
        for plan in _each_file(plans):
            check_ports(plan.path, plan.graph, *opened[plan.path].ports())
        # Contexts of one plan are numbered by the order of its profiles.
        placements = [(name, opened[plan.path], _index(plans, name)) for name, plan in plans.items()]
        scratch_bytes = max(plan.engine.get_device_memory_size_for_profile_v2(index) for _, plan, index in placements)
        scratch = device.take(scratch_bytes)
        engines = {
            name: stack.enter_context(TensorRTEngine(device, plan, index, (scratch, scratch_bytes)))
            for name, plan, index in placements
        }
        stack.pop_all()  # the caller owns the engines now, and they the device
    return engines


def _each_file(plans: Mapping[str, PlanFile]) -> Iterable[PlanFile]:
    return {plan.path: plan for plan in plans.values()}.values()


def _owned(device: Device, plan: OpenedPlan) -> OpenedPlan:
    device.own(plan.close)
    return plan


def _index(plans: Mapping[str, PlanFile], name: str) -> int:
    """Return the index of a profile in its plan: profiles were added in the order of the names in `plans`."""
    return [other for other, plan in plans.items() if plan.path == plans[name].path].index(name)


# ---------------------------------------------------------------- running


@dataclass
class Port:
    """One input or output: a fixed device buffer of the profile's largest shape, and pinned memory beside it."""

    name: str
    dtype: Any
    address: int
    pinned_address: int
    pinned: HostArray


class TensorRTEngine(OpenedEngine):
    """One profile of a plan. `scratch` is the activation memory (address, bytes) that the bank's engines share.

    With CUDA graphs, the second call in a row with the same shapes captures, and the next ones replay.
    """

    def __init__(self, device: Device, plan: OpenedPlan, index: int, scratch: tuple[int, int]) -> None:
        super().__init__()
        self._device, self._plan = device, plan
        self._warm = False
        self._graph: int | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._context: Any = None
        device.hold()
        with ExitStack() as undo:
            undo.callback(self.close)
            self._context = plan.context()
            self._context.set_device_memory(*scratch)
            is_set = self._context.set_optimization_profile_async(index, device.stream)
            self._require(is_set, f"set_optimization_profile_async {index}")
            self._inputs, self._outputs = self._ports(index)
            undo.pop_all()

    def _run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        if inputs.keys() != self._inputs.keys():
            raise EngineError(f"this engine takes {', '.join(self._inputs)}, not {', '.join(inputs)}")
        arrays = {name: self._near(port, inputs[name]) for name, port in self._inputs.items()}
        with self._device.lock:
            self._set_shapes({name: tuple(array.shape) for name, array in arrays.items()})
            for name, array in arrays.items():
                self._feed(self._inputs[name], array)
            self._launch()
            outputs = {port.name: self._fetch(port) for port in self._outputs}
            self._device.wait()
            return {name: array.copy() if isinstance(array, np.ndarray) else array for name, array in outputs.items()}

    # ------------------------------------------------------------ shapes and buffers

    def _ports(self, index: int) -> tuple[dict[str, Port], list[Port]]:
        """Bind buffers for the largest shapes of the profile, once."""
        trt, engine = self._plan.trt, self._plan.engine
        names = [engine.get_tensor_name(number) for number in range(engine.num_io_tensors)]
        input_names = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        for name in input_names:
            largest = tuple(engine.get_tensor_profile_shape(name, index)[2])
            self._require(self._context.set_input_shape(name, largest), f"set_input_shape {name} {largest}")
        inputs = {name: self._port_for(name) for name in input_names}
        return inputs, [self._port_for(name) for name in names if name not in input_names]

    def _port_for(self, name: str) -> Port:
        shape = tuple(self._context.get_tensor_shape(name))
        dtype = np.dtype(self._plan.trt.nptype(self._plan.engine.get_tensor_dtype(name)))
        address = self._device.take(math.prod(shape) * dtype.itemsize)
        self._require(self._context.set_tensor_address(name, address), f"set_tensor_address {name}")
        return Port(name, dtype, address, *self._device.pinned(shape, dtype))

    def _set_shapes(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Set the shapes of inputs; a change of shape drops the captured graph."""
        if shapes == self._shapes:
            return
        self._drop_graph()
        self._shapes, self._warm = {}, False  # unknown until all are set
        for name, shape in shapes.items():
            self._require(self._context.set_input_shape(name, shape), f"set_input_shape {name} {shape}")
        self._shapes = shapes

    # ------------------------------------------------------------ data

    def _near(self, port: Port, array: Array) -> HostArray | DeviceBuffer:
        """Return the array where it is, if the port can be fed from there, else on the host."""
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
        """Request an output; on the host it is a view of pinned memory, valid after the stream is done."""
        cuda, stream = self._device.cuda, self._device.stream
        shape = tuple(self._context.get_tensor_shape(port.name))
        if port.name not in self._plan.on_host:
            copy = DeviceBuffer(self._device, shape, port.dtype)
            cuda.on_device(copy.address, port.address, copy.size_bytes, stream)
            return copy
        size = math.prod(shape)
        cuda.to_host(port.pinned_address, port.address, size * port.dtype.itemsize, stream)
        return port.pinned[:size].reshape(shape)

    # ------------------------------------------------------------ launching

    def _launch(self) -> None:
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
            with suppress(EngineError):  # the first error is the one to raise
                cuda.destroy_graph(cuda.end_capture(stream))
            raise
        return cuda.end_capture(stream)

    def _enqueue(self) -> None:
        self._require(self._context.execute_async_v3(self._device.stream), "execute_async_v3")

    def _drop_graph(self) -> None:
        graph, self._graph = self._graph, None
        if graph is not None:
            self._device.cuda.destroy_graph(graph)

    def _require(self, succeeded: object, call: str) -> None:
        if not succeeded:
            raise EngineError(f"{self._plan.trt.__name__}: {call} failed; its reason was written to the error output")

    # ------------------------------------------------------------ closing

    def _release(self) -> None:
        """Wait, then drop graph, context and, with the last engine, the device; each step runs even if others fail."""
        with ExitStack() as steps:
            steps.callback(self._device.let_go)
            steps.callback(self._drop_context)
            steps.callback(self._drop_graph)
            self._device.wait()

    def _drop_context(self) -> None:
        self._context = None  # before the memory it uses


LOADERS: dict[str, EngineLoader] = {name: TensorRTLoader(flavour) for name, flavour in FLAVOURS.items()}

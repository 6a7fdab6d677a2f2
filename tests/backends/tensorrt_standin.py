"""A GPU that is not there: stand-ins for the CUDA layer and for TensorRT that keep their books.

Device memory is bytes at made-up addresses. What is asked of a stream waits until the stream is synchronized,
so whoever reads early reads wrong data, and a captured graph replays its work with the addresses it had. What
would crash on a GPU or leak there is an AssertionError, or is listed by `left`. A plan is a little JSON that
names a Python function of NumPy arrays. Real kernels, overlapping streams and speed are not here.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import math
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
import numpy.typing as npt

from elit_export.arrays import HostArray
from elit_export.backends.protocols import PlanFile
from elit_export.backends.tensorrt.engine import TensorRTEngine, opened_on
from elit_export.backends.tensorrt.options import TensorRTTarget
from elit_export.errors import EngineError
from elit_export.spec import STEP, GraphSpec, Precision, Profile, Role, TensorSpec

FIRST_ADDRESS = 1 << 60  # beyond every address of this process
ALIGNMENT = 256
POISON = 0xFF  # a NaN in every float type, −1 in integers
SCRATCH_BYTES = 512  # per latent of a profile's maximum

Bytes = npt.NDArray[np.uint8]
Arrays = dict[str, HostArray]
Function = Callable[[Arrays], Mapping[str, HostArray]]
Work = Callable[[], None]
Shape = tuple[int, ...]


class Books:
    """Counts calls by name, runs what is hooked before one, and can make the n-th of a name fail."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.before: dict[str, Callable[[], object]] = {}
        self._failing = ("", 0)

    def fail(self, method: str, call: int) -> None:
        self._failing = (method, call)

    def fails(self, method: str) -> bool:
        self.calls[method] += 1
        self.before.get(method, lambda: None)()
        return self._failing == (method, self.calls[method])

    def check(self, method: str) -> None:
        if self.fails(method):
            raise EngineError(f"{method} failed, as it was told to")


# ---------------------------------------------------------------- CUDA


@dataclass
class Stream:
    waiting: list[Work] = field(default_factory=list)
    captured: list[Work] | None = None
    capturing_thread: int = 0


class StandInCuda(Books):
    """The methods of `Cuda`. A call that is made to fail does nothing, but that work asked for before it is done."""

    def __init__(self, capability: str = "8.9") -> None:
        super().__init__()
        self.users: WeakSet[StandInContext] = WeakSet()
        self._capability = capability
        self._memory: dict[int, Bytes] = {}
        self._pinned: dict[int, Bytes] = {}
        self._unpinned: dict[int, Bytes] = {}  # kept, so that who still writes there harms nothing
        self._streams: dict[int, Stream] = {}
        self._graphs: dict[int, list[Work]] = {}
        self._handles = itertools.count(1)
        self._next_address = FIRST_ADDRESS

    def left(self) -> list[str]:
        """What was made and not freed."""
        kinds = {"memory": self._memory, "pinned": self._pinned, "stream": self._streams, "graph": self._graphs}
        return [f"{kind} {key:#x}" for kind, things in kinds.items() for key in things]

    @property
    def sizes(self) -> list[int]:
        """Bytes of each piece of device memory."""
        return [len(memory) for memory in self._memory.values()]

    def compute_capability(self) -> str:
        self.check("compute_capability")
        return self._capability

    # memory

    def allocate(self, size_bytes: int) -> int:
        self.check("allocate")
        address = self._next_address
        self._next_address += (size_bytes // ALIGNMENT + 2) * ALIGNMENT  # with a gap; no address comes twice
        self._memory[address] = np.full(size_bytes, POISON, np.uint8)
        return address

    def free(self, address: int) -> None:
        assert address in self._memory, f"{address:#x} is not allocated"
        assert not any(user.uses(address) for user in self.users), "an execution context still uses this memory"
        self._check_idle()
        self.check("free")
        del self._memory[address]

    def allocate_pinned(self, size_bytes: int) -> int:
        self.check("allocate_pinned")
        memory = np.full(size_bytes, POISON, np.uint8)
        self._pinned[memory.ctypes.data] = memory
        return memory.ctypes.data

    def free_pinned(self, address: int) -> None:
        assert address in self._pinned, f"{address:#x} is no pinned memory"
        self._check_idle()
        self.check("free_pinned")
        self._unpinned[address] = self._pinned.pop(address)

    def _check_idle(self) -> None:
        assert not any(stream.waiting for stream in self._streams.values()), "freed while work is under way"

    def on_host(self, address: int, size_bytes: int) -> Bytes:
        return _part(self._pinned, address, size_bytes)

    def on_gpu(self, address: int, size_bytes: int) -> Bytes:
        return _part(self._memory, address, size_bytes)

    # copies

    def to_device(self, target: int, source: int, size_bytes: int, stream: int) -> None:
        self.check("to_device")
        self._copy(partial(self.on_gpu, target, size_bytes), partial(self.on_host, source, size_bytes), stream)

    def on_device(self, target: int, source: int, size_bytes: int, stream: int) -> None:
        self.check("on_device")
        self._copy(partial(self.on_gpu, target, size_bytes), partial(self.on_gpu, source, size_bytes), stream)

    def to_host(self, target: int, source: int, size_bytes: int, stream: int) -> None:
        """Into any memory of this process: what is copied to need not be pinned."""
        self.check("to_host")
        assert target < FIRST_ADDRESS, "the target is on the device"
        assert not _holding(self._unpinned, target), "the target was freed"
        self.on_gpu(source, size_bytes)

        def copy() -> None:
            ctypes.memmove(target, self.on_gpu(source, size_bytes).ctypes.data, size_bytes)

        self.enqueue(stream, copy)

    def _copy(self, target: Callable[[], Bytes], source: Callable[[], Bytes], stream: int) -> None:
        assert target().size == source().size

        def copy() -> None:
            target()[:] = source()

        self.enqueue(stream, copy)

    # streams

    def create_stream(self) -> int:
        self.check("create_stream")
        return self._new(self._streams, Stream())

    def synchronize(self, stream: int) -> None:
        """Fails after the work: an error of the GPU shows here."""
        assert not self.is_capturing(stream), "a stream was waited for while it is being captured"
        books = self._streams[stream]
        waiting, books.waiting = books.waiting, []
        for work in waiting:
            work()
        self.check("synchronize")

    def destroy_stream(self, stream: int) -> None:
        assert stream in self._streams, "no such stream"
        assert not self.is_capturing(stream)
        self._check_idle()
        self.check("destroy_stream")
        del self._streams[stream]

    def enqueue(self, stream: int, work: Work) -> None:
        assert stream in self._streams, "no such stream"
        books = self._streams[stream]
        if books.captured is None:
            books.waiting.append(work)
            return
        assert books.capturing_thread == threading.get_ident(), "another thread used a stream that is being captured"
        books.captured.append(work)

    # graphs

    def is_capturing(self, stream: int) -> bool:
        assert stream in self._streams, "no such stream"
        return self._streams[stream].captured is not None

    def begin_capture(self, stream: int) -> None:
        assert not self.is_capturing(stream)
        self.check("begin_capture")
        self._streams[stream].captured = []
        self._streams[stream].capturing_thread = threading.get_ident()

    def end_capture(self, stream: int) -> int:
        """Ends the capture also if it fails."""
        captured, self._streams[stream].captured = self._streams[stream].captured, None
        assert captured is not None, "nothing is being captured"
        self.check("end_capture")
        return self._new(self._graphs, captured)

    def launch(self, graph: int, stream: int) -> None:
        self.check("launch")
        assert graph in self._graphs, "no such graph"
        for work in self._graphs[graph]:
            self.enqueue(stream, work)

    def destroy_graph(self, graph: int) -> None:
        assert graph in self._graphs, "no such graph"
        self.check("destroy_graph")
        del self._graphs[graph]

    def _new(self, things: dict[int, Any], thing: Any) -> int:
        handle = next(self._handles)
        things[handle] = thing
        return handle


def _holding(pieces: Mapping[int, Bytes], address: int) -> list[tuple[int, Bytes]]:
    """The piece that an address lies in, with where it begins."""
    return [(start, memory) for start, memory in pieces.items() if start <= address < start + max(len(memory), 1)]


def _part(pieces: Mapping[int, Bytes], address: int, size_bytes: int) -> Bytes:
    found = _holding(pieces, address)
    assert found, f"nothing is allocated at {address:#x}"
    start, memory = found[0]
    assert address + size_bytes <= start + len(memory), f"{size_bytes} bytes at {address:#x} reach too far"
    return memory[address - start :][:size_bytes]


# ---------------------------------------------------------------- TensorRT


class TensorIOMode(Enum):
    INPUT, OUTPUT = range(2)


class ExecutionContextAllocationStrategy(Enum):
    STATIC, USER_MANAGED = range(2)


class CudaGraphStrategy(Enum):
    DISABLED, WHOLE_GRAPH_CAPTURE = range(2)


class EngineValidity(Enum):
    VALID, SUBOPTIMAL, INVALID = range(3)


class EngineInvalidityDiagnostics(IntEnum):
    VERSION_MISMATCH = 1
    UNSUPPORTED_CC = 2
    MALFORMED_ENGINE = 32


class Logger:
    WARNING = 2

    def __init__(self, severity: int) -> None:
        self.severity = severity


class StandInTensorRT(Books):
    """The module, as far as engines use it. `compiled` are the kernels that no runtime cache held."""

    Logger = Logger
    TensorIOMode = TensorIOMode
    EngineValidity = EngineValidity
    EngineInvalidityDiagnostics = EngineInvalidityDiagnostics
    ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy
    CudaGraphStrategy = CudaGraphStrategy

    def __init__(self, cuda: StandInCuda, name: str, version: str, functions: Mapping[str, Function]) -> None:
        super().__init__()
        self.__name__, self.__version__ = name, version
        self.cuda, self.functions = cuda, functions
        self.engines: WeakSet[StandInEngine] = WeakSet()
        self.compiled: list[str] = []
        self.Runtime = partial(StandInRuntime, self)

    def left(self) -> list[str]:
        return ["engine"] * len(self.engines) + ["context"] * len(self.cuda.users)

    @staticmethod
    def nptype(dtype: str) -> type[np.generic]:
        return np.dtype(dtype).type


class StandInRuntime:
    engine_host_code_allowed = False

    def __init__(self, trt: StandInTensorRT, logger: Logger) -> None:
        self._trt, self._logger = trt, logger

    def get_engine_validity(self, plan: bytes) -> tuple[EngineValidity, int]:
        if plan.startswith(b"{"):
            return EngineValidity.VALID, 0
        flags = EngineInvalidityDiagnostics
        return EngineValidity.INVALID, flags.MALFORMED_ENGINE | flags.UNSUPPORTED_CC

    def deserialize_cuda_engine(self, plan: bytes) -> StandInEngine | None:
        facts = json.loads(plan)
        if self._trt.fails("deserialize_cuda_engine") or (facts["host_code"] and not self.engine_host_code_allowed):
            return None
        return StandInEngine(self._trt, facts)


class StandInEngine:
    """Tensors are `name: [dtype, shape]`; a dimension is a number, or the name of a range in every profile."""

    def __init__(self, trt: StandInTensorRT, facts: dict[str, Any]) -> None:
        self.trt, self.facts = trt, facts
        self.tensors: dict[str, Any] = {**facts["inputs"], **facts["outputs"]}
        self.num_io_tensors = len(self.tensors)
        trt.engines.add(self)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.facts["inputs"] else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> str:
        dtype: str = self.tensors[name][0]
        return dtype

    def get_tensor_shape(self, name: str) -> Shape:
        return shape_in(self.tensors[name][1], {})

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[Shape]:
        ranges = self.facts["profiles"][profile]
        return [shape_in(self.tensors[name][1], {key: ranges[key][corner] for key in ranges}) for corner in range(3)]

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        size_bytes: int = self.facts["profiles"][profile]["latents"][2] * SCRATCH_BYTES
        return size_bytes

    def create_runtime_config(self) -> StandInConfig:
        return StandInConfig(self.trt)

    def create_execution_context(
        self, how: StandInConfig | ExecutionContextAllocationStrategy
    ) -> StandInContext | None:
        config = how if isinstance(how, StandInConfig) else None
        assert ExecutionContextAllocationStrategy.USER_MANAGED in (how, config and config.strategy)
        return None if self.trt.fails("create_execution_context") else StandInContext(self, config)


def shape_in(dimensions: Sequence[int | str], sizes: Mapping[str, int]) -> Shape:
    return tuple(sizes.get(size, -1) if isinstance(size, str) else size for size in dimensions)


class StandInConfig:
    """What contexts of TensorRT for RTX are made with."""

    def __init__(self, trt: StandInTensorRT) -> None:
        self._trt = trt
        self.strategy = ExecutionContextAllocationStrategy.STATIC
        self.cuda_graph_strategy = CudaGraphStrategy.DISABLED
        self.cache = StandInCache(trt)

    def set_execution_context_allocation_strategy(self, strategy: ExecutionContextAllocationStrategy) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> StandInCache:
        return StandInCache(self._trt)

    def set_runtime_cache(self, cache: StandInCache) -> bool:
        self.cache = cache
        return True


class StandInCache:
    """Kernels by name, of one version on one GPU."""

    def __init__(self, trt: StandInTensorRT) -> None:
        self._trt = trt
        self._made_by = [trt.__version__, trt.cuda.compute_capability()]
        self.kernels: list[str] = []

    def serialize(self) -> bytearray:
        self._trt.calls["serialize"] += 1
        return bytearray(json.dumps([self._made_by, self.kernels]).encode())

    def deserialize(self, content: bytes) -> bool:
        made_by, kernels = json.loads(content)
        if made_by != self._made_by:
            return False
        self.kernels = kernels
        return True


class StandInContext:
    """Takes only shapes of its profile, and refuses to be captured before it ran with the shapes it has."""

    def __init__(self, engine: StandInEngine, config: StandInConfig | None) -> None:
        self.engine, self.config = engine, config
        self._trt, self._cuda = engine.trt, engine.trt.cuda
        self._profile = 0
        self._ran = False
        self.scratch = (0, 0)
        self._sizes: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}
        self._cuda.users.add(self)

    def uses(self, address: int) -> bool:
        return address in (self.scratch[0], *self._addresses.values())

    def set_device_memory(self, address: int, size_bytes: int) -> None:
        self._cuda.on_gpu(address, size_bytes)
        self.scratch = (address, size_bytes)

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        assert not self._cuda.is_capturing(stream)
        self._profile, self._sizes, self._ran = index, {}, False
        return not self._trt.fails("set_optimization_profile_async") and index < len(self.engine.facts["profiles"])

    def set_input_shape(self, name: str, shape: Shape) -> bool:
        if self._trt.fails("set_input_shape") or name not in self.engine.facts["inputs"]:
            return False
        smallest, _, largest = self.engine.get_tensor_profile_shape(name, self._profile)
        if len(shape) != len(smallest) or not all(
            low <= size <= high for low, size, high in zip(smallest, shape, largest, strict=True)
        ):
            return False
        self._ran = self._ran and self._sizes.get(name) == shape
        self._sizes[name] = shape
        return True

    def get_tensor_shape(self, name: str) -> Shape:
        """−1 where the inputs do not tell yet."""
        if name in self.engine.facts["inputs"]:
            return self._sizes[name]
        return shape_in(self.engine.tensors[name][1], self._known())

    def _known(self) -> dict[str, int]:
        """Sizes of named dimensions; inputs that contradict each other have none."""
        found: dict[str, set[int]] = {}
        for name, shape in self._sizes.items():
            for dimension, size in zip(self.engine.tensors[name][1], shape, strict=True):
                found.setdefault(str(dimension), set()).add(size)
        return {dimension: sizes.pop() for dimension, sizes in found.items() if len(sizes) == 1}

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address % ALIGNMENT == 0
        self._addresses[name] = address
        return not self._trt.fails("set_tensor_address")

    def execute_async_v3(self, stream: int) -> bool:
        """Fails after the work was given, like a launch of which a part went wrong."""
        shapes = {name: self.get_tensor_shape(name) for name in self.engine.tensors}
        captured = self._cuda.is_capturing(stream)
        if -1 in itertools.chain(*shapes.values()) or (captured and not self._ran):
            return False
        assert self.scratch[1] >= self.engine.get_device_memory_size_for_profile_v2(self._profile)
        self._compile()
        self._cuda.enqueue(stream, partial(poison, self._cuda, *self.scratch))
        if self._trt.fails("execute_async_v3"):
            return False
        self._ran = self._ran or not captured
        self._cuda.enqueue(stream, partial(compute, self._trt, self.engine.facts, shapes, dict(self._addresses)))
        return True

    def _compile(self) -> None:
        kernel = f"{self.engine.facts['function']} {self._profile}"
        if self.config is not None and kernel not in self.config.cache.kernels:
            self.config.cache.kernels.append(kernel)
            self._trt.compiled.append(kernel)


# What runs on the stream holds neither context nor engine: these may be gone while a graph is still there.


def poison(cuda: StandInCuda, address: int, size_bytes: int) -> None:
    cuda.on_gpu(address, size_bytes)[:] = POISON


def compute(trt: StandInTensorRT, facts: dict[str, Any], shapes: Mapping[str, Shape], bound: Mapping[str, int]) -> None:
    """Run a plan's function from and to the addresses that were bound."""
    views = {}
    for name, (dtype, _) in {**facts["inputs"], **facts["outputs"]}.items():
        size_bytes = math.prod(shapes[name]) * np.dtype(dtype).itemsize
        views[name] = trt.cuda.on_gpu(bound[name], size_bytes).view(dtype).reshape(shapes[name])
    outputs = trt.functions[facts["function"]]({name: views[name].copy() for name in facts["inputs"]})
    for name in facts["outputs"]:
        assert outputs[name].shape == shapes[name]
        views[name][...] = outputs[name]


# ---------------------------------------------------------------- plans, and a machine to open them


@dataclass(frozen=True)
class Tensors:
    """What a plan takes and gives: `name: [dtype, shape]`."""

    inputs: Mapping[str, Any]
    outputs: Mapping[str, Any]

    @property
    def graph(self) -> GraphSpec:
        """The graph that such a plan is of: the velocity comes to the host, all else stays."""
        fed = tuple(TensorSpec(name, dtype, tuple(dims), Role.STATE) for name, (dtype, dims) in self.inputs.items())
        given = tuple(
            TensorSpec(name, dtype, tuple(dims), Role.RESULT, on_host=name == "velocity")
            for name, (dtype, dims) in self.outputs.items()
        )
        return GraphSpec(STEP, fed, given, elastic=True)


def step_tensors(sample: Shape, residual: Shape) -> Tensors:
    """Those of the `step` graph, for one sample and one residual of these shapes."""
    return Tensors(
        inputs={
            "x": ["float32", ["rows", *sample]],
            "t": ["float32", ["rows"]],
            "y": ["int64", ["rows"]],
            "latents": ["int64", ["latents"]],
        },
        outputs={"velocity": ["float32", ["rows", *sample]], "residual": ["float32", ["rows", *residual]]},
    )


class Machine:
    """Plans in a folder, and a GPU and a library that open them. `options` are those of the target."""

    def __init__(
        self,
        folder: Path,
        function: Function,
        tensors: Tensors,
        profiles: Sequence[Profile],
        *,
        backend: str = "tensorrt",
        layout: str = "per-profile",
        built_with: str = "10.14.1.48",
        version: str = "10.14.1.48",
        **options: Any,
    ) -> None:
        self.cuda = StandInCuda()
        self.trt = StandInTensorRT(self.cuda, backend.replace("-", "_"), version, {"function": function})
        self.host_code = options.get("compatibility") in ("version", "both")
        groups = [list(profiles)] if layout == "multi-profile" else [[profile] for profile in profiles]
        self.profiles = tuple(profiles)
        self.plans = {
            profile.name: PlanFile(
                self.write(folder / "-".join(each.name for each in group) / "step.plan", tensors, group),
                tensors.graph,
                {backend: built_with},
            )
            for group in groups
            for profile in group
        }
        values = {"backend": backend, "precision": Precision.FP32, "compute_capabilities": ["8.9"], "layout": layout}
        self.target = TensorRTTarget.model_validate(values | options)

    def write(self, path: Path, tensors: Tensors, profiles: Sequence[Profile]) -> Path:
        facts = {
            "function": "function",
            "inputs": tensors.inputs,
            "outputs": tensors.outputs,
            "profiles": [_ranges(each) for each in profiles],
            "host_code": self.host_code,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(facts))
        return path

    def open(self) -> dict[str, TensorRTEngine]:
        return opened_on(self.cuda, self.trt, self.plans, self.target)  # type: ignore[arg-type]

    def left(self) -> list[str]:
        """What is not freed."""
        return self.cuda.left() + self.trt.left()


def _ranges(profile: Profile) -> dict[str, tuple[int, int, int]]:
    ranges = {"rows": profile.rows.corners(), "latents": profile.latents.corners()}
    return ranges | ({"text": profile.text.corners()} if profile.text else {})

"""GPU memory that the engines of a bank share, and arrays in it that belong to callers."""

from __future__ import annotations

import ctypes
import math
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from elit_export.arrays import HostArray
from elit_export.backends.process import ProcessBound
from elit_export.backends.protocols import DeviceArray
from elit_export.backends.tensorrt.cuda import Cuda
from elit_export.errors import EngineError


class Device(ProcessBound):
    """The stream, memory and opened plans that the engines of a bank share; it is closed with the last engine.

    The lock is held while the stream is used: work of another thread would become part of a graph that is
    being captured. Memory that is given back is kept for the next request of that size. On one stream, work
    runs in order, so memory that is still being read is not overwritten early.
    """

    def __init__(self, cuda: Cuda) -> None:
        super().__init__()
        self.cuda = cuda
        self.lock = threading.Lock()
        self.closed = False
        self.stream = cuda.create_stream()
        self._owned = ExitStack()  # freed last to first, each even if others fail
        self._owned.callback(cuda.destroy_stream, self.stream)
        self._spare: dict[int, list[int]] = {}  # bytes → addresses
        self._engines = 0

    def take(self, size_bytes: int) -> int:
        if spare := self._spare.get(size_bytes):
            return spare.pop()
        address = self.cuda.allocate(max(size_bytes, 1))
        self._owned.callback(self.cuda.free, address)
        return address

    def give_back(self, address: int, size_bytes: int) -> None:
        """Keep memory for reuse. It takes no lock: garbage collection may call it at any moment, also inside `take`."""
        self._spare.setdefault(size_bytes, []).append(address)

    def pinned(self, shape: Sequence[int], dtype: Any) -> tuple[int, HostArray]:
        """Allocate host memory for copies, as an address and an array; it lives as long as the device."""
        size_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        address = self.cuda.allocate_pinned(size_bytes)
        self._owned.callback(self.cuda.free_pinned, address)
        memory = (ctypes.c_byte * size_bytes).from_address(address)
        return address, np.frombuffer(memory, dtype)

    def own(self, close: Callable[[], None]) -> None:
        """Call `close` when the device is closed, before anything owned earlier is freed."""
        self._owned.callback(close)

    def wait(self) -> None:
        """Wait until all work of the stream is done."""
        self.cuda.synchronize(self.stream)

    def hold(self) -> None:
        self._engines += 1

    def let_go(self) -> None:
        self._engines -= 1
        if not self._engines:
            self.close()

    def close(self) -> None:
        """Free everything, also arrays that callers still hold; it is safe to call twice."""
        with self.lock:
            if self.closed:
                return
            self.closed = True
            with self._owned:
                self.wait()


class DeviceBuffer(DeviceArray):
    """An output on the GPU that belongs to the caller; its memory is reused when it is dropped."""

    def __init__(self, device: Device, shape: tuple[int, ...], dtype: Any) -> None:
        self.device, self.dtype = device, np.dtype(dtype)
        self._shape = shape
        self.size_bytes = math.prod(shape) * self.dtype.itemsize
        self.address = device.take(self.size_bytes)
        weakref.finalize(self, device.give_back, self.address, self.size_bytes)

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    def numpy(self) -> HostArray:
        """A copy on the host; raises EngineError once the bank is closed, and in another process."""
        self.device.check_process()
        values = np.empty(self._shape, self.dtype)
        with self.device.lock:
            if self.device.closed:
                raise EngineError("the engine bank of this array is closed", "copy it with .numpy() before")
            self.device.cuda.to_host(values.ctypes.data, self.address, self.size_bytes, self.device.stream)
            self.device.wait()
        return values

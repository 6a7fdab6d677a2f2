"""The engine seam: what the runtime asks of an opened plan.

Takes: named arrays.  Gives: named arrays.  May touch: nothing.  Knows nothing of: any backend.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from elit_export.errors import EngineError

HostArray = npt.NDArray[Any]
HOST_OUTPUTS = ("velocity", "distance", "embedding", "computed", "pixels")


class DeviceArray(Protocol):
    """An array where the backend keeps it; goes back into engines of the same backend as it is."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def numpy(self) -> HostArray: ...


Array = HostArray | DeviceArray


class Engine(Protocol):
    """One opened plan; a context manager, which a subclass need not write again.

    What HOST_OUTPUTS names comes back as NumPy arrays, other outputs as the backend's own
    (with `.numpy()`). What comes back belongs to the caller and is never written again.
    Not safe to call from two threads at once: the bank holds a lock.
    """

    def __call__(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]: ...

    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def to_host(array: Array) -> HostArray:
    return array if isinstance(array, np.ndarray) else array.numpy()


class HostOutput:
    """A NumPy array in the role of a DeviceArray."""

    def __init__(self, values: HostArray) -> None:
        self._values = values

    @property
    def shape(self) -> tuple[int, ...]:
        return self._values.shape

    def numpy(self) -> HostArray:
        return self._values


class LateEngine(Engine):
    """An engine that its first call opens, with whatever that raises; if it fails, the next call tries again."""

    def __init__(self, opener: Callable[[], Engine]) -> None:
        self._opener = opener
        self._opened: Engine | None = None
        self._closed = False

    def __call__(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        if self._closed:
            raise EngineError("this engine is closed")
        self._opened = self._opened or self._opener()
        return self._opened(inputs)

    def close(self) -> None:
        self._closed = True
        if self._opened:
            self._opened.close()


class FunctionEngine(Engine):
    """Any function of NumPy arrays as an engine: PyTorch references, tests, your own backend."""

    def __init__(self, function: Callable[[Mapping[str, HostArray]], Mapping[str, HostArray]]) -> None:
        self._function = function

    def __call__(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        outputs = self._function({name: to_host(array) for name, array in inputs.items()})
        return {
            name: array.copy() if name in HOST_OUTPUTS else HostOutput(array.copy()) for name, array in outputs.items()
        }

    def close(self) -> None:
        pass

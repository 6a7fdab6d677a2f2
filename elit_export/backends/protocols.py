"""The two protocols of a backend: the builder of its plans, and the loader that opens them as engines.

A backend's `build.py` offers Builders, its `engine.py` EngineLoaders. Both take values, never a manifest.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from elit_export.arrays import Arrays, HostArray
from elit_export.backends.process import ProcessBound
from elit_export.errors import EngineError
from elit_export.spec import GraphSpec, Profile

OnShare = Callable[[float], None]  # called with the share of one plan's build that is done, 0 to 1


# ---------------------------------------------------------------- building


@dataclass(frozen=True)
class GraphFile:
    """An exported graph on disk.

    `kept_exact` are paths of modules whose products a backend leaves in floating point when it quantizes.
    """

    path: Path
    spec: GraphSpec
    kept_exact: tuple[str, ...] = ()


@dataclass(frozen=True)
class BuiltPlan:
    """A plan that was built into a folder; an engine opens its `file`.

    `label` is the part of the plan's name with profile, library and device.
    """

    file: str
    label: str
    versions: dict[str, str]
    built_on: dict[str, str]


class RealInputs(Protocol):
    """Inputs of the graph `step` from real trajectories: `bundle.calibration_inputs.CalibrationInputs`."""

    def __len__(self) -> int: ...

    def inputs(self) -> Iterator[Arrays]:
        """Yield one row at a time."""


class Builder(Protocol):
    """Builds plans from graphs. `target` is one table of a recipe, of the backend's own class."""

    def check(self, target: Any) -> None:
        """Raise BackendUnavailable or BuildError if this machine cannot build for the target."""

    def fingerprint(self, target: Any) -> dict[str, str]:
        """Return versions, and whatever else of this machine plans depend on."""

    def group_profiles(self, profiles: Sequence[Profile], target: Any) -> list[tuple[Profile, ...]]:
        """Return the profiles of each plan."""

    def build_plan(
        self,
        graph: GraphFile,
        folder: Path,
        profiles: Sequence[Profile],
        target: Any,
        inputs: RealInputs | None,
        progress: OnShare,
    ) -> BuiltPlan:
        """Write one plan into `folder`; files that plans of a set share may lie beside it.

        `inputs` are given only where the backend quantizes. Raises BuildError.
        """


# ---------------------------------------------------------------- running


class PlanOrigin(Protocol):
    """The versions that built a plan, and the machine it was built on."""

    @property
    def versions(self) -> Mapping[str, str]: ...

    @property
    def built_on(self) -> Mapping[str, str]: ...


@dataclass(frozen=True)
class PlanFile:
    """A plan on disk whose hash was verified, the graph it was built from, and its PlanOrigin."""

    path: Path
    graph: GraphSpec
    versions: Mapping[str, str] = field(default_factory=dict)
    built_on: Mapping[str, str] = field(default_factory=dict)


class DeviceArray(Protocol):
    """An array in the memory of a backend; it can be fed to engines of the same backend as it is."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def numpy(self) -> HostArray: ...


Array = HostArray | DeviceArray


class Engine(Protocol):
    """One opened plan, which is also a context manager.

    Outputs that are `on_host` in the graph's spec are NumPy arrays, others are the backend's own (with
    `.numpy()`). Outputs belong to the caller and are never overwritten.
    It is not safe to call from two threads at once: the bank holds a lock.
    """

    def __call__(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]: ...

    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class EngineLoader(Protocol):
    """Opens plans of one backend."""

    def open_engines(self, plans: Mapping[str, PlanFile], target: Any) -> Mapping[str, Engine]:
        """Open an engine for each name, each file once; raises BackendUnavailable, BundleError or EngineError."""

    def incompatibility(self, plans: Sequence[PlanOrigin], target: Any) -> str:
        """Say why these plans cannot run here; empty if they can."""

    def library_version(self) -> str:
        """Return name and version of the installed library."""

    def device_problem(self, device: str) -> tuple[str, str]:
        """Return (what is wrong with a device here, what to do), both empty if it works."""


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


class OpenedEngine(ProcessBound, Engine):
    """An engine over what a library opened in this process: the base of every backend's own.

    Closed once, and used no more. In a child made by fork it refuses calls, and closing it leaves it as it is.
    """

    def __init__(self) -> None:
        super().__init__()
        self._closed = False

    def __call__(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        self.check_process()
        if self._closed:
            raise EngineError("this engine is closed", "load the pipeline again")
        return self._run(inputs)

    def close(self) -> None:
        if self.is_foreign or self._closed:
            return
        self._closed = True
        self._release()

    @abstractmethod
    def _run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """Return the outputs of a call."""

    @abstractmethod
    def _release(self) -> None:
        """Free what the library holds."""


class LateEngine(OpenedEngine):
    """An engine that opens at its first call. The call raises what opening raises, and the next one tries again."""

    def __init__(self, opener: Callable[[], Engine]) -> None:
        super().__init__()
        self._opener = opener
        self._opened: Engine | None = None

    def _run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        self._opened = self._opened or self._opener()
        return self._opened(inputs)

    def _release(self) -> None:
        if self._opened:
            self._opened.close()


class FunctionEngine(Engine):
    """Any function of NumPy arrays as an engine: PyTorch references, tests, your own backend.

    With the spec of its graph, outputs that are not `on_host` are wrapped, as in other engines.
    """

    def __init__(self, function: Callable[[Arrays], Mapping[str, HostArray]], graph: GraphSpec | None = None) -> None:
        self._function = function
        self._wrapped = {tensor.name for tensor in graph.outputs} - graph.on_host if graph else set()

    def __call__(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        outputs = self._function({name: to_host(array) for name, array in inputs.items()})
        return {
            name: HostOutput(array.copy()) if name in self._wrapped else array.copy() for name, array in outputs.items()
        }

    def close(self) -> None:
        pass

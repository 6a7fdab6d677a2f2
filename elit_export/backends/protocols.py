"""The two seams of a backend: what builds its plans, and what opens and calls them.

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

OnShare = Callable[[float], None]  # hears the share of one plan's build that is done, 0 to 1


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
    """The folder that was given now holds one plan; `file` in it is what an engine opens.

    `label` says in the plan's name what distinguishes it: profile, library, device.
    """

    file: str
    label: str
    versions: dict[str, str]
    built_on: dict[str, str]


class RealInputs(Protocol):
    """Inputs of the graph `step` from real trajectories: `bundle.calibration_inputs.CalibrationInputs`."""

    def __len__(self) -> int: ...

    def inputs(self) -> Iterator[Arrays]:
        """One row at a time."""


class Builder(Protocol):
    """Makes plans of graphs. `target` is one table of a recipe, of the backend's own class."""

    def check(self, target: Any) -> None:
        """Raise BackendUnavailable or BuildError if nothing can be built for the target here."""

    def fingerprint(self, target: Any) -> dict[str, str]:
        """Versions, and what else of this machine plans depend on."""

    def group_profiles(self, profiles: Sequence[Profile], target: Any) -> list[tuple[Profile, ...]]:
        """The profiles of each plan."""

    def build_plan(
        self,
        graph: GraphFile,
        folder: Path,
        profiles: Sequence[Profile],
        target: Any,
        inputs: RealInputs | None,
        progress: OnShare,
    ) -> BuiltPlan:
        """Write one plan into `folder`; what plans of a set share may lie beside it.

        `inputs` are given only where the backend quantizes. Raises BuildError.
        """


# ---------------------------------------------------------------- running


class PlanOrigin(Protocol):
    """By which versions a plan was built, and on what."""

    @property
    def versions(self) -> Mapping[str, str]: ...

    @property
    def built_on(self) -> Mapping[str, str]: ...


@dataclass(frozen=True)
class PlanFile:
    """A plan on disk whose hash was verified, the graph it was made of, and its PlanOrigin."""

    path: Path
    graph: GraphSpec
    versions: Mapping[str, str] = field(default_factory=dict)
    built_on: Mapping[str, str] = field(default_factory=dict)


class DeviceArray(Protocol):
    """An array where the backend keeps it; goes back into engines of the same backend as it is."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def numpy(self) -> HostArray: ...


Array = HostArray | DeviceArray


class Engine(Protocol):
    """One opened plan; a context manager, which a subclass need not write again.

    Outputs that the graph's spec has `on_host` come back as NumPy arrays, others as the backend's own (with
    `.numpy()`). What comes back belongs to the caller and is never written again.
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


class EngineLoader(Protocol):
    """Opens plans of one backend."""

    def open_engines(self, plans: Mapping[str, PlanFile], target: Any) -> Mapping[str, Engine]:
        """An engine for each name, each file opened once; raises BackendUnavailable, BundleError or EngineError."""

    def incompatibility(self, plans: Sequence[PlanOrigin], target: Any) -> str:
        """Why these plans cannot run here; empty if they can."""

    def library_version(self) -> str:
        """Name and version of the installed library."""

    def device_problem(self, device: str) -> tuple[str, str]:
        """(what is wrong with a device here, what to do), both empty if it works."""


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
        """What a call gives."""

    @abstractmethod
    def _release(self) -> None:
        """Free what the library holds."""


class LateEngine(OpenedEngine):
    """An engine that its first call opens, with whatever that raises; if it fails, the next call tries again."""

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

    With the spec of its graph, outputs that are not `on_host` come back wrapped, as those of other engines do.
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

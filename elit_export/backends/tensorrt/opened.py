"""A deserialized TensorRT plan, and the kernels that TensorRT for RTX compiles for it on the device."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np

from elit_export.backends.ports import Port, open_dim
from elit_export.backends.protocols import PlanFile
from elit_export.backends.tensorrt.options import TensorRTTarget
from elit_export.bundle.atomic import write_bytes
from elit_export.errors import EngineError

logger = logging.getLogger(__name__)


class OpenedPlan:
    """A deserialized plan; its profiles share its weights.

    TensorRT for RTX compiles kernels on the device when they are first needed and keeps them in a
    runtime cache, which is read from the user's cache folder and written back when the plan is closed.
    """

    def __init__(self, trt: Any, plan: PlanFile, target: TensorRTTarget) -> None:
        flavour, path = target.flavour, plan.path
        self.trt = trt
        self.on_host = plan.graph.on_host
        self.captures = target.cuda_graphs and not flavour.compiles_on_device
        runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
        # A version-compatible plan brings code that runs on the host; it was trusted before.
        runtime.engine_host_code_allowed = target.fits_later_versions
        content = path.read_bytes()
        if flavour.tells_validity:
            _check_header(trt, runtime, content, path)
        self.engine: Any = runtime.deserialize_cuda_engine(content)
        if self.engine is None:
            raise EngineError(f"{trt.__name__} cannot open {path}; its reason was written to the error output")
        self._config: Any = None
        if flavour.compiles_on_device:
            self._cache_file = _cache_file(f"{path.parent.name}-{trt.__name__}-{trt.__version__}")
            self._config = self._runtime_config(captures=target.cuda_graphs)

    def _runtime_config(self, *, captures: bool) -> Any:
        trt, config = self.trt, self.engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if captures:
            config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self._cache = config.create_runtime_cache()
        self._load_cache()
        config.set_runtime_cache(self._cache)
        return config

    def ports(self) -> tuple[list[Port], list[Port]]:
        """Return the inputs and outputs of the plan."""
        names = [self.engine.get_tensor_name(number) for number in range(self.engine.num_io_tensors)]
        fed = [name for name in names if self.engine.get_tensor_mode(name) == self.trt.TensorIOMode.INPUT]
        return [self._port(name) for name in fed], [self._port(name) for name in names if name not in fed]

    def _port(self, name: str) -> Port:
        dtype = np.dtype(self.trt.nptype(self.engine.get_tensor_dtype(name)))
        return Port(name, dtype.name, tuple(map(open_dim, self.engine.get_tensor_shape(name))))

    def context(self) -> Any:
        """Return a new execution context without activation memory of its own."""
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
        except OSError as error:  # treated as no cache
            logger.warning("cannot read compiled kernels from %s: %s", self._cache_file, error)
            return
        if not self._cache.deserialize(kernels):
            logger.info("%s was made on another device or by another version; it is compiled again", self._cache_file)

    def _save_cache(self) -> None:
        try:
            write_bytes(self._cache_file, bytes(self._cache.serialize()))
        except OSError as error:  # the next start compiles again, nothing else is lost
            logger.warning("cannot keep compiled kernels in %s: %s", self._cache_file, error)

    def close(self) -> None:
        """Free the weights; call it after the contexts are dropped."""
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

"""The CUDA runtime calls that engines need. Only this file names cuda-python.

A failing call raises EngineError naming it.
"""

from __future__ import annotations

from typing import Any

from cuda.bindings import runtime as cudart

from elit_export.errors import EngineError

HOST_TO_DEVICE = cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
DEVICE_TO_HOST = cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
DEVICE_TO_DEVICE = cudart.cudaMemcpyKind.cudaMemcpyDeviceToDevice
THREAD_LOCAL = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
MAJOR = cudart.cudaDeviceAttr.cudaDevAttrComputeCapabilityMajor
MINOR = cudart.cudaDeviceAttr.cudaDevAttrComputeCapabilityMinor
DEVICE = 0


def device_problem() -> tuple[str, str]:
    """Return (what is wrong, what to do), both empty if there is a GPU and its driver fits."""
    error, count = cudart.cudaGetDeviceCount()
    if error == cudart.cudaError_t.cudaErrorInsufficientDriver:
        return _error_text(error), "install an NVIDIA driver for this CUDA or a later one, and see nvidia-smi"
    if error != cudart.cudaError_t.cudaSuccess:
        return _error_text(error), "see nvidia-smi"
    return ("", "") if count else ("no NVIDIA GPU is visible", "see nvidia-smi and CUDA_VISIBLE_DEVICES")


def _error_text(error: Any) -> str:
    text = cudart.cudaGetErrorString(error)[1].decode()
    if error == cudart.cudaError_t.cudaErrorInsufficientDriver:  # also where there is none
        text = "no NVIDIA driver, or one older than this CUDA"
    return f"{text} ({error.name})"


def _checked(call: str, result: tuple[Any, ...]) -> Any:
    """Return the result of a call, without its error code; raises EngineError if it failed."""
    error, *values = result
    if error != cudart.cudaError_t.cudaSuccess:
        raise EngineError(f"{call} failed: {_error_text(error)}")
    return values[0] if values else None


class Cuda:
    """One GPU as addresses, streams and graphs. Nothing is freed automatically."""

    def compute_capability(self) -> str:
        """Return the compute capability, like `8.9`."""
        major, minor = (
            _checked("cudaDeviceGetAttribute", cudart.cudaDeviceGetAttribute(attribute, DEVICE))
            for attribute in (MAJOR, MINOR)
        )
        return f"{major}.{minor}"

    # memory

    def allocate(self, size_bytes: int) -> int:
        return int(_checked("cudaMalloc", cudart.cudaMalloc(size_bytes)))

    def free(self, address: int) -> None:
        _checked("cudaFree", cudart.cudaFree(address))

    def allocate_pinned(self, size_bytes: int) -> int:
        """Allocate host memory that the GPU copies from and to directly."""
        return int(_checked("cudaHostAlloc", cudart.cudaHostAlloc(size_bytes, 0)))

    def free_pinned(self, address: int) -> None:
        _checked("cudaFreeHost", cudart.cudaFreeHost(address))

    def to_device(self, target: int, source: int, size_bytes: int, stream: int) -> None:
        self._copy(target, source, size_bytes, HOST_TO_DEVICE, stream)

    def to_host(self, target: int, source: int, size_bytes: int, stream: int) -> None:
        self._copy(target, source, size_bytes, DEVICE_TO_HOST, stream)

    def on_device(self, target: int, source: int, size_bytes: int, stream: int) -> None:
        self._copy(target, source, size_bytes, DEVICE_TO_DEVICE, stream)

    @staticmethod
    def _copy(target: int, source: int, size_bytes: int, kind: Any, stream: int) -> None:
        _checked("cudaMemcpyAsync", cudart.cudaMemcpyAsync(target, source, size_bytes, kind, stream))

    # streams

    def create_stream(self) -> int:
        return int(_checked("cudaStreamCreate", cudart.cudaStreamCreate()))

    def synchronize(self, stream: int) -> None:
        _checked("cudaStreamSynchronize", cudart.cudaStreamSynchronize(stream))

    def destroy_stream(self, stream: int) -> None:
        _checked("cudaStreamDestroy", cudart.cudaStreamDestroy(stream))

    # graphs

    def begin_capture(self, stream: int) -> None:
        _checked("cudaStreamBeginCapture", cudart.cudaStreamBeginCapture(stream, THREAD_LOCAL))

    def end_capture(self, stream: int) -> int:
        """Return a graph that launches what was captured."""
        captured = _checked("cudaStreamEndCapture", cudart.cudaStreamEndCapture(stream))
        instantiated = cudart.cudaGraphInstantiate(captured, 0)
        destroyed = cudart.cudaGraphDestroy(captured)  # even if the instantiation failed
        graph = int(_checked("cudaGraphInstantiate", instantiated))
        _checked("cudaGraphDestroy", destroyed)
        return graph

    def launch(self, graph: int, stream: int) -> None:
        _checked("cudaGraphLaunch", cudart.cudaGraphLaunch(graph, stream))

    def destroy_graph(self, graph: int) -> None:
        _checked("cudaGraphExecDestroy", cudart.cudaGraphExecDestroy(graph))

"""The CUDA layer where there is no GPU: every call says which one failed and why."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest

from elit_export.backends.tensorrt import cuda as layer
from elit_export.backends.tensorrt import engine as tensorrt_engine
from elit_export.backends.tensorrt.cuda import Cuda, cudart, device_problem
from elit_export.errors import EngineError

without_gpu = pytest.mark.skipif(device_problem() == ("", ""), reason="there is a GPU here")
DONE, LOST = cudart.cudaError_t.cudaSuccess, cudart.cudaError_t.cudaErrorStreamCaptureInvalidated
DRIVER = "no NVIDIA driver, or one older than this CUDA"

CALLS: dict[str, Callable[[Cuda], object]] = {
    "cudaDeviceGetAttribute": lambda cuda: cuda.compute_capability(),
    "cudaMalloc": lambda cuda: cuda.allocate(4),
    "cudaFree": lambda cuda: cuda.free(256),
    "cudaHostAlloc": lambda cuda: cuda.allocate_pinned(4),
    "cudaFreeHost": lambda cuda: cuda.free_pinned(256),
    "cudaStreamCreate": lambda cuda: cuda.create_stream(),
    "cudaStreamSynchronize": lambda cuda: cuda.synchronize(0),
    "cudaStreamDestroy": lambda cuda: cuda.destroy_stream(0),
    "cudaStreamBeginCapture": lambda cuda: cuda.begin_capture(0),
    "cudaStreamEndCapture": lambda cuda: cuda.end_capture(0),
    "cudaGraphLaunch": lambda cuda: cuda.launch(0, 0),
    "cudaGraphExecDestroy": lambda cuda: cuda.destroy_graph(0),
}


@without_gpu
@pytest.mark.parametrize("call", CALLS)
def test_a_failing_call_is_named(call: str) -> None:
    with pytest.raises(EngineError, match=rf"^{call} failed: .+ \(cudaError\w+\)$"):
        CALLS[call](Cuda())


@without_gpu
@pytest.mark.parametrize("direction", ["to_device", "to_host", "on_device"])
def test_a_failing_copy_is_named(direction: str) -> None:
    with pytest.raises(EngineError, match=r"^cudaMemcpyAsync failed: "):
        getattr(Cuda(), direction)(0, 0, 4, 0)


@without_gpu
def test_why_no_gpu_can_be_used_comes_with_a_remedy() -> None:
    problem, remedy = device_problem()
    assert problem
    assert "nvidia-smi" in remedy
    for loader in tensorrt_engine.LOADERS.values():
        assert loader.device_problem("cuda") == (problem, remedy)


# ---------------------------------------------------------------- what CUDA may answer


class Answers:
    """The functions of the CUDA runtime that answer as they are told; the rest stays."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self._functions = SimpleNamespace(cudaError_t=cudart.cudaError_t, cudaGetErrorString=cudart.cudaGetErrorString)
        monkeypatch.setattr(layer, "cudart", self._functions)

    def to(self, function: str, *answer: object) -> None:
        def called(*_: object) -> tuple[object, ...]:
            self.calls.append(function)
            return answer

        setattr(self._functions, function, called)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Answers:
    return Answers(monkeypatch)


@pytest.mark.parametrize(
    ("error", "count", "problem", "remedy"),
    [
        ("cudaSuccess", 1, "", ""),
        ("cudaSuccess", 0, "no NVIDIA GPU is visible", "CUDA_VISIBLE_DEVICES"),
        ("cudaErrorInsufficientDriver", 0, f"{DRIVER} (cudaErrorInsufficientDriver)", "install an NVIDIA driver"),
        ("cudaErrorNoDevice", 0, "no CUDA-capable device is detected (cudaErrorNoDevice)", "nvidia-smi"),
    ],
)
def test_device_problems(answers: Answers, error: str, count: int, problem: str, remedy: str) -> None:
    answers.to("cudaGetDeviceCount", getattr(cudart.cudaError_t, error), count)
    found = device_problem()
    assert found[0] == problem
    assert remedy in found[1]
    assert bool(found[1]) == bool(problem)


def test_the_compute_capability_is_major_and_minor(answers: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {layer.MAJOR: 12, layer.MINOR: 0}
    monkeypatch.setattr(
        layer.cudart, "cudaDeviceGetAttribute", lambda attribute, _: (DONE, values[attribute]), raising=False
    )
    assert Cuda().compute_capability() == "12.0"


def test_of_a_capture_only_what_launches_is_kept(answers: Answers) -> None:
    answers.to("cudaStreamEndCapture", DONE, 5)
    answers.to("cudaGraphInstantiate", DONE, 6)
    answers.to("cudaGraphDestroy", DONE)
    assert Cuda().end_capture(1) == 6
    assert answers.calls == ["cudaStreamEndCapture", "cudaGraphInstantiate", "cudaGraphDestroy"]


def test_of_a_capture_that_cannot_be_made_to_launch_nothing_is_kept(answers: Answers) -> None:
    answers.to("cudaStreamEndCapture", DONE, 5)
    answers.to("cudaGraphInstantiate", LOST, 0)
    answers.to("cudaGraphDestroy", DONE)
    with pytest.raises(EngineError, match="cudaGraphInstantiate failed"):
        Cuda().end_capture(1)
    assert answers.calls[-1] == "cudaGraphDestroy"


def test_of_a_capture_that_broke_off_there_is_nothing(answers: Answers) -> None:
    answers.to("cudaStreamEndCapture", LOST, 0)
    with pytest.raises(EngineError, match=r"cudaStreamEndCapture failed: .*\(cudaErrorStreamCaptureInvalidated\)"):
        Cuda().end_capture(1)

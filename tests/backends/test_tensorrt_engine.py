"""TensorRT engines over stand-ins for CUDA and TensorRT: whose memory is whose, when, and what if a call fails.

No GPU and no kernel is here; that the engines compute what PyTorch does is measured where there is one.
"""

from __future__ import annotations

import gc
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elit_export.arrays import HostArray
from elit_export.backends.protocols import FunctionEngine, to_host
from elit_export.backends.tensorrt import cuda as cuda_layer
from elit_export.backends.tensorrt import opened as opened_plans
from elit_export.backends.tensorrt.cuda import Cuda
from elit_export.backends.tensorrt.engine import LOADERS, TensorRTEngine
from elit_export.backends.tensorrt.memory import DeviceBuffer
from elit_export.errors import BackendUnavailable, BundleError, EngineError
from elit_export.runtime.bank import EngineBank, Slot
from elit_export.runtime.pipeline import Pipeline
from elit_export.spec import PIXELS, Budget, Precision, Profile, Range, default_profiles
from tests.backends.tensorrt_standin import SCRATCH_BYTES, Machine, StandInCuda, Tensors, step_tensors
from tests.helpers import tiny_spec

SPEC = tiny_spec(group_size=4)  # (1, 8, 8) pixels, 1 group of 16 latents
ROWS = Range(1, 2, 4)
LOW, HIGH = Profile("low", Range(1, 4, 8), ROWS), Profile("high", Range(9, 16, 16), ROWS)
BACKENDS = ("tensorrt", "tensorrt-rtx")
LAYOUTS = ("per-profile", "multi-profile")
RESIDUAL = (16, 16)
RESIDUAL_BYTES = 4 * 16 * 16  # of one row

STEP = step_tensors(SPEC.sample_shape, RESIDUAL)
# The step with the residual of an earlier one as an input, to feed back what an engine gave.
STEP_WITH_RESIDUAL = Tensors({**STEP.inputs, "residual_before": ["float32", ["rows", *RESIDUAL]]}, STEP.outputs)

Arrays = Mapping[str, HostArray]
MachineMaker = Callable[..., Machine]


def toy(inputs: Arrays) -> dict[str, HostArray]:
    """A step that depends on every input, with a residual that differs from row to row."""
    kept = len(inputs["latents"])
    assert inputs["latents"].tolist() == list(range(kept))
    by_row = (inputs["t"] + inputs["y"]).astype(np.float32)
    velocity = inputs["x"] * 2 + np.float32(kept) + by_row[:, None, None, None]
    before = inputs["residual_before"] if "residual_before" in inputs else np.float32(0)
    residual = before + np.repeat(velocity.reshape(len(velocity), -1)[:, :16, None], 16, axis=2)
    return {"velocity": velocity, "residual": residual}


def step_inputs(kept: int, rows: int = 2, seed: int = 0) -> dict[str, HostArray]:
    generator = np.random.default_rng(seed)
    return {
        "x": generator.standard_normal((rows, *SPEC.sample_shape), np.float32),
        "t": generator.uniform(0.1, 0.9, rows).astype(np.float32),
        "y": generator.integers(0, 3, rows),
        "latents": np.arange(kept),
    }


def fed(kept: int, rows: int = 2, seed: int = 0) -> dict[str, HostArray]:
    """The same, with a residual."""
    before = np.random.default_rng(seed + 1).standard_normal((rows, *RESIDUAL), np.float32)
    return {**step_inputs(kept, rows, seed), "residual_before": before}


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where runtime caches go: away from the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def machine_with(tmp_path: Path) -> MachineMaker:
    def machine(*profiles: Profile, tensors: Tensors = STEP, **choices: Any) -> Machine:
        return Machine(tmp_path / "plans", toy, tensors, profiles or (LOW, HIGH), **choices)

    return machine


@pytest.fixture
def closing() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def opened(machine: Machine, closing: ExitStack) -> dict[str, TensorRTEngine]:
    """The engines, closed when the test ends."""
    engines = machine.open()
    for engine in engines.values():
        closing.push(engine)
    return engines


def check(engine: TensorRTEngine, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Call, and compare all that comes back with the plain function."""
    found, expected = engine(inputs), toy({name: to_host(array) for name, array in inputs.items()})
    for name, array in expected.items():
        np.testing.assert_array_equal(to_host(found[name]), array)
    return found


# ---------------------------------------------------------------- what comes out


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_shape_of_every_profile_in_turn(
    machine_with: MachineMaker, closing: ExitStack, backend: str, layout: str, graphs: bool
) -> None:
    engines = opened(machine_with(backend=backend, layout=layout, cuda_graphs=graphs), closing)
    shapes = [(8, 1), (1, 4), (3, 2), (3, 2), (3, 2), (3, 2), (8, 4)]
    for seed, (kept, rows) in enumerate(shapes):
        check(engines["low"], step_inputs(kept, rows, seed))
        check(engines["high"], step_inputs(kept + 8, rows, seed))


TEXT = Range(2, 5, 9)
WITH_TEXT = Tensors(
    {**STEP.inputs, "text": ["float32", ["rows", "text", 3]], "text_mask": ["int64", ["rows", "text"]]}, STEP.outputs
)


def told(inputs: Arrays) -> dict[str, HostArray]:
    """A step that depends on the text, its length and its mask."""
    words = (inputs["text"].sum(axis=2) * inputs["text_mask"]).sum(axis=1)
    velocity = inputs["x"] + (words + inputs["text"].shape[1])[:, None, None, None].astype(np.float32)
    return {"velocity": velocity, "residual": np.repeat(velocity.reshape(len(velocity), -1)[:, :16, None], 16, axis=2)}


def with_text(tokens: int, rows: int, seed: int) -> dict[str, HostArray]:
    generator = np.random.default_rng(seed)
    text = generator.standard_normal((rows, tokens, 3), np.float32)
    return {**step_inputs(4, rows, seed), "text": text, "text_mask": generator.integers(0, 2, (rows, tokens))}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_text_of_every_length_in_turn(tmp_path: Path, closing: ExitStack, backend: str, layout: str) -> None:
    """The shapes change, come back and stay for as long as a graph is captured and replayed."""
    profiles = [replace(profile, text=TEXT) for profile in (LOW, HIGH)]
    engines = opened(Machine(tmp_path, told, WITH_TEXT, profiles, backend=backend, layout=layout), closing)
    shapes = [(9, 1), (2, 4), (5, 2), (5, 2), (5, 2), (5, 2), (7, 2), (5, 2), (9, 4)]
    for seed, (tokens, rows) in enumerate(shapes):
        inputs = with_text(tokens, rows, seed)
        found = engines["low"](inputs)
        for name, expected in told(inputs).items():
            np.testing.assert_array_equal(to_host(found[name]), expected)


@pytest.mark.parametrize("tokens", [1, 10])
def test_text_outside_of_the_profile_is_refused(tmp_path: Path, closing: ExitStack, tokens: int) -> None:
    engine = opened(Machine(tmp_path, told, WITH_TEXT, [replace(LOW, text=TEXT)]), closing)["low"]
    with pytest.raises(EngineError, match="set_input_shape text"):
        engine(with_text(tokens, 1, 0))


def test_graphs_change_no_bit(machine_with: MachineMaker, closing: ExitStack) -> None:
    plain, captured = (opened(machine_with(LOW, cuda_graphs=graphs), closing)["low"] for graphs in (False, True))
    for seed in range(5):
        inputs = step_inputs(4, seed=seed)
        for name, array in plain(inputs).items():
            np.testing.assert_array_equal(to_host(captured(inputs)[name]), to_host(array))


def test_velocity_is_on_the_host_and_residual_on_the_device(machine_with: MachineMaker, closing: ExitStack) -> None:
    outputs = opened(machine_with(LOW), closing)["low"](step_inputs(4))
    assert isinstance(outputs["velocity"], np.ndarray)
    assert isinstance(outputs["residual"], DeviceBuffer)
    assert outputs["residual"].shape == (2, 16, 16)
    assert outputs["residual"].numpy().dtype == np.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_are_never_written_again(machine_with: MachineMaker, closing: ExitStack, backend: str) -> None:
    engines = opened(machine_with(backend=backend), closing)
    calls = [(name, step_inputs(8 if name == "low" else 9, seed=seed)) for seed in range(4) for name in engines]
    outputs = [engines[name](inputs) for name, inputs in calls]
    for (_, inputs), found in zip(calls, outputs, strict=True):
        np.testing.assert_array_equal(found["velocity"], toy(inputs)["velocity"])
        np.testing.assert_array_equal(to_host(found["residual"]), toy(inputs)["residual"])


def test_outputs_are_no_views_of_what_the_engine_keeps(machine_with: MachineMaker, closing: ExitStack) -> None:
    """Memory that CUDA pinned is gone after closing."""
    engine = opened(machine_with(LOW), closing)["low"]
    inputs = step_inputs(4)
    outputs = engine(inputs)
    engine.close()
    np.testing.assert_array_equal(outputs["velocity"], toy(inputs)["velocity"])


def test_inputs_of_other_types_and_layouts_are_taken(machine_with: MachineMaker, closing: ExitStack) -> None:
    engine = opened(machine_with(LOW), closing)["low"]
    inputs = step_inputs(4)
    turned = np.asfortranarray(inputs["x"].astype(np.float64))
    again = engine({**inputs, "x": turned, "y": inputs["y"].astype(np.int32)})
    np.testing.assert_array_equal(again["velocity"], toy(inputs)["velocity"])


# ---------------------------------------------------------------- what goes back in


@pytest.fixture(params=LAYOUTS)
def fed_machine(machine_with: MachineMaker, request: pytest.FixtureRequest) -> Machine:
    return machine_with(tensors=STEP_WITH_RESIDUAL, layout=request.param)


def test_a_residual_goes_back_into_any_engine_without_the_host(fed_machine: Machine, closing: ExitStack) -> None:
    engines = opened(fed_machine, closing)
    inputs = fed(4)
    residual = engines["low"](inputs)["residual"]
    copies = fed_machine.cuda.calls["to_device"]
    again = engines["high"]({**inputs, "latents": np.arange(16), "residual_before": residual})
    assert fed_machine.cuda.calls["to_device"] == copies + 4  # x, t, y, latents
    expected = toy({**inputs, "latents": np.arange(16), "residual_before": toy(inputs)["residual"]})
    np.testing.assert_array_equal(to_host(again["residual"]), expected["residual"])


def test_feeding_back_call_after_call(fed_machine: Machine, closing: ExitStack) -> None:
    """With captured graphs, whose input stays where it is while the residual fed comes from elsewhere each time."""
    engine = opened(fed_machine, closing)["low"]
    found: Any = fed(4)["residual_before"]
    expected = found
    for seed in range(6):
        found = engine({**step_inputs(4, seed=seed), "residual_before": found})["residual"]
        expected = toy({**step_inputs(4, seed=seed), "residual_before": expected})["residual"]
    np.testing.assert_array_equal(found.numpy(), expected)


def test_a_residual_fed_back_stays_as_it_is(fed_machine: Machine, closing: ExitStack) -> None:
    engine = opened(fed_machine, closing)["low"]
    residual = engine(fed(4))["residual"]
    for seed in range(3):
        engine({**step_inputs(4, seed=seed), "residual_before": residual})
    np.testing.assert_array_equal(to_host(residual), toy(fed(4))["residual"])


def test_a_residual_of_another_bank_is_copied_over(machine_with: MachineMaker, closing: ExitStack) -> None:
    first, second = (opened(machine_with(LOW, tensors=STEP_WITH_RESIDUAL), closing)["low"] for _ in range(2))
    check(second, {**step_inputs(4), "residual_before": first(fed(4))["residual"]})


def test_a_residual_of_another_type_is_converted(machine_with: MachineMaker, closing: ExitStack) -> None:
    halved = Tensors(STEP_WITH_RESIDUAL.inputs, {**STEP.outputs, "residual": ["float16", ["rows", *RESIDUAL]]})
    engine = opened(machine_with(LOW, tensors=halved), closing)["low"]
    residual = engine(fed(4))["residual"]
    inputs = {**step_inputs(4), "residual_before": to_host(residual).astype(np.float32)}
    again = engine({**inputs, "residual_before": residual})["residual"]
    assert to_host(again).dtype == np.float16
    np.testing.assert_array_equal(to_host(again), toy(inputs)["residual"].astype(np.float16))


def test_a_residual_of_a_closed_bank_is_refused(machine_with: MachineMaker, closing: ExitStack) -> None:
    first, second = (opened(machine_with(LOW, tensors=STEP_WITH_RESIDUAL), closing)["low"] for _ in range(2))
    residual = first(fed(4))["residual"]
    first.close()
    with pytest.raises(EngineError, match=r"bank of this array is closed; copy it with \.numpy\(\) before"):
        second({**step_inputs(4), "residual_before": residual})
    check(second, fed(4))


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_dropped_residual_makes_room_for_the_next(
    machine_with: MachineMaker, closing: ExitStack, backend: str
) -> None:
    machine = machine_with(backend=backend)
    engines = opened(machine, closing)
    engines["low"](step_inputs(4))
    pieces = len(machine.cuda.sizes)
    for seed in range(4):
        engines["low"](step_inputs(4, seed=seed))
        engines["high"](step_inputs(16, seed=seed))
    assert len(machine.cuda.sizes) == pieces


def test_memory_grows_by_the_residuals_that_are_kept(machine_with: MachineMaker, closing: ExitStack) -> None:
    machine = machine_with(LOW)
    engine = opened(machine, closing)["low"]
    before = sum(machine.cuda.sizes)
    kept = [engine(step_inputs(4, rows=3)) for _ in range(5)]
    assert sum(machine.cuda.sizes) - before == len(kept) * 3 * RESIDUAL_BYTES


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bank_has_one_stream_and_scratch_for_its_largest_profile(
    machine_with: MachineMaker, closing: ExitStack, backend: str, layout: str
) -> None:
    machine = machine_with(HIGH, LOW, backend=backend, layout=layout)
    opened(machine, closing)
    assert machine.cuda.calls["create_stream"] == 1
    [(address, size_bytes)] = {context.scratch for context in machine.cuda.users}
    assert size_bytes == HIGH.latents.max * SCRATCH_BYTES
    assert len(machine.cuda.on_gpu(address, size_bytes)) == size_bytes


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_plan_file_is_opened_once_and_everything_is_freed(
    machine_with: MachineMaker, backend: str, layout: str
) -> None:
    machine = machine_with(backend=backend, layout=layout)
    engines = machine.open()
    assert machine.trt.calls["deserialize_cuda_engine"] == len({plan.path for plan in machine.plans.values()})
    for engine in engines.values():
        residual = [engine(step_inputs(8 if engine is engines["low"] else 9)) for _ in range(3)][-1]["residual"]
    for engine in engines.values():
        assert machine.left()
        engine.close()
    assert machine.left() == []
    del residual  # a finalizer after closing frees nothing twice
    gc.collect()
    assert machine.left() == []


def test_closing_an_engine_leaves_the_others_running(machine_with: MachineMaker, closing: ExitStack) -> None:
    engines = opened(machine_with(layout="multi-profile"), closing)
    engines["low"].close()
    engines["low"].close()
    check(engines["high"], step_inputs(16))
    with pytest.raises(EngineError, match="this engine is closed"):
        engines["low"](step_inputs(4))


def test_a_residual_cannot_be_read_after_closing(machine_with: MachineMaker) -> None:
    with machine_with(LOW).open()["low"] as engine:
        residual = engine(step_inputs(4))["residual"]
    with pytest.raises(EngineError, match=r"bank of this array is closed; copy it with \.numpy\(\) before"):
        to_host(residual)


def in_time(work: Callable[[], object]) -> None:
    """Run in a thread that may hang, and fail if it does."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()


def test_memory_may_come_back_in_the_midst_of_taking_some(machine_with: MachineMaker) -> None:
    machine = machine_with(LOW)
    engine = machine.open()["low"]
    residual: Any = engine(step_inputs(4))["residual"]
    residual.itself = residual  # only garbage collection can drop it now
    del residual
    machine.cuda.before["allocate"] = gc.collect
    kept = []
    in_time(lambda: kept.append(engine(step_inputs(4, rows=3))["residual"]))
    pieces = len(machine.cuda.sizes)
    kept.append(engine(step_inputs(4))["residual"])
    assert len(machine.cuda.sizes) == pieces  # in the memory that came back
    engine.close()


def test_another_thread_reads_a_residual_before_or_after_a_capture(
    machine_with: MachineMaker, closing: ExitStack
) -> None:
    machine = machine_with(LOW)
    engine = opened(machine, closing)["low"]
    residual: Any = engine(step_inputs(4))["residual"]
    read: list[HostArray] = []
    reader = threading.Thread(target=lambda: read.append(residual.numpy()))

    def start_reading() -> None:
        reader.start()
        reader.join(0.05)
        assert not read

    machine.trt.before["execute_async_v3"] = start_reading
    check_later = engine(step_inputs(4, seed=1))
    reader.join(10)
    assert machine.cuda.calls["begin_capture"] == 1
    np.testing.assert_array_equal(check_later["velocity"], toy(step_inputs(4, seed=1))["velocity"])
    np.testing.assert_array_equal(read[0], toy(step_inputs(4))["residual"])


# ---------------------------------------------------------------- CUDA graphs


def graph_calls(cuda: StandInCuda) -> tuple[int, int, int]:
    """How often a graph was captured, launched, destroyed."""
    return cuda.calls["begin_capture"], cuda.calls["launch"], cuda.calls["destroy_graph"]


def test_the_first_call_is_plain_the_second_captures_the_third_replays(
    machine_with: MachineMaker, closing: ExitStack
) -> None:
    machine = machine_with(LOW)
    engine = opened(machine, closing)["low"]
    seen, executed = [], []
    for seed in range(4):
        check(engine, step_inputs(4, seed=seed))
        seen.append(graph_calls(machine.cuda))
        executed.append(machine.trt.calls["execute_async_v3"])
    assert seen == [(0, 0, 0), (1, 1, 0), (1, 2, 0), (1, 3, 0)]
    assert executed == [1, 2, 2, 2]


def test_a_change_of_shape_drops_the_graph_and_captures_anew(machine_with: MachineMaker, closing: ExitStack) -> None:
    machine = machine_with(LOW)
    engine = opened(machine, closing)["low"]
    seen = []
    for seed, (kept, rows) in enumerate([(4, 2), (4, 2), (5, 2), (5, 2), (5, 3), (4, 2), (4, 2), (4, 2)]):
        check(engine, step_inputs(kept, rows, seed))
        seen.append(graph_calls(machine.cuda))
    assert seen == [(0, 0, 0), (1, 1, 0), (1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 2), (3, 3, 2), (3, 4, 2)]


def test_a_call_of_another_profile_leaves_the_graph(machine_with: MachineMaker, closing: ExitStack) -> None:
    machine = machine_with(layout="multi-profile")
    engines = opened(machine, closing)
    for seed in range(4):
        check(engines["low"], step_inputs(4, seed=seed))
        check(engines["high"], step_inputs(16, seed=seed))
    assert graph_calls(machine.cuda) == (2, 6, 0)


def test_no_graph_without_cuda_graphs(machine_with: MachineMaker, closing: ExitStack) -> None:
    machine = machine_with(LOW, cuda_graphs=False)
    engine = opened(machine, closing)["low"]
    for seed in range(4):
        check(engine, step_inputs(4, seed=seed))
    assert graph_calls(machine.cuda) == (0, 0, 0)
    assert machine.trt.calls["execute_async_v3"] == 4


@pytest.mark.parametrize(("graphs", "strategy"), [(True, "WHOLE_GRAPH_CAPTURE"), (False, "DISABLED")])
def test_tensorrt_for_rtx_captures_itself(
    machine_with: MachineMaker, closing: ExitStack, graphs: bool, strategy: str
) -> None:
    machine = machine_with(backend="tensorrt-rtx", cuda_graphs=graphs)
    engines = opened(machine, closing)
    for seed in range(4):
        check(engines["low"], step_inputs(4, seed=seed))
    assert {context.config.cuda_graph_strategy.name for context in machine.cuda.users if context.config} == {strategy}
    assert graph_calls(machine.cuda) == (0, 0, 0)


# ---------------------------------------------------------------- failures


def test_what_a_profile_does_not_take_is_refused_and_forgotten(machine_with: MachineMaker, closing: ExitStack) -> None:
    engine = opened(machine_with(LOW), closing)["low"]
    for _ in range(3):
        check(engine, step_inputs(4))
    with pytest.raises(EngineError, match=r"tensorrt: set_input_shape x \(5, 1, 8, 8\) failed"):
        engine(step_inputs(4, rows=5))
    with pytest.raises(EngineError, match=r"set_input_shape latents \(9,\) failed"):
        engine(step_inputs(9, rows=3))  # after x has taken its three rows
    for _ in range(3):
        check(engine, step_inputs(4))


def test_inputs_must_be_those_of_the_plan(machine_with: MachineMaker, closing: ExitStack) -> None:
    """One left out would keep its value of the call before."""
    engine = opened(machine_with(LOW), closing)["low"]
    engine(step_inputs(4))
    with pytest.raises(EngineError, match="takes x, t, y, latents, not x, t, latents"):
        engine({name: array for name, array in step_inputs(4).items() if name != "y"})
    with pytest.raises(EngineError, match=r"takes x, t, y, latents, not .*residual_before"):
        engine(fed(4))


CUDA_METHODS = sorted(name for name in vars(Cuda) if not name.startswith("_") and name != "compute_capability")
FREEING = ("free", "free_pinned", "destroy_stream", "destroy_graph")
LIBRARY_METHODS = {
    "deserialize_cuda_engine": "cannot open",
    "create_execution_context": "cannot make an execution context",
    "set_optimization_profile_async": "set_optimization_profile_async . failed",
    "set_input_shape": r"set_input_shape \w+ \(.*\) failed",
    "set_tensor_address": r"set_tensor_address \w+ failed",
    "execute_async_v3": "execute_async_v3 failed",
}


def use(engines: Mapping[str, TensorRTEngine]) -> None:
    """Plain, captured and replayed calls, a change of shape, a residual fed back and one read."""
    residual: Any = fed(4)["residual_before"]
    for seed in range(3):
        residual = engines["low"]({**step_inputs(4, seed=seed), "residual_before": residual})["residual"]
    engines["high"](fed(16))
    engines["low"](fed(5, rows=3))
    residual.numpy()


def open_use_close(machine: Machine) -> None:
    with ExitStack() as closing:
        use(opened(machine, closing))


def times_called(machine_with: MachineMaker, method: str, layout: str) -> int:
    machine = machine_with(tensors=STEP_WITH_RESIDUAL, layout=layout)
    open_use_close(machine)
    assert machine.left() == []
    return machine.cuda.calls[method] + machine.trt.calls[method]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", CUDA_METHODS)
def test_a_failing_cuda_call_is_told_and_leaves_nothing(machine_with: MachineMaker, method: str, layout: str) -> None:
    """Each call in turn, from opening to closing; what cannot be freed is all that is left."""
    times = times_called(machine_with, method, layout)
    assert times
    for call in range(1, times + 1):
        machine = machine_with(tensors=STEP_WITH_RESIDUAL, layout=layout)
        machine.cuda.fail(method, call)
        with pytest.raises(EngineError, match=f"^{method} failed, as it was told to"):
            open_use_close(machine)
        assert len(machine.left()) == (method in FREEING), f"{method} {call}: {machine.left()}"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", LIBRARY_METHODS)
def test_a_failing_library_call_is_told_and_leaves_nothing(
    machine_with: MachineMaker, method: str, layout: str
) -> None:
    times = times_called(machine_with, method, layout)
    assert times
    for call in range(1, times + 1):
        machine = machine_with(tensors=STEP_WITH_RESIDUAL, layout=layout)
        machine.trt.fail(method, call)
        with pytest.raises(EngineError, match=f"tensorrt:? {LIBRARY_METHODS[method]}"):
            open_use_close(machine)
        assert machine.left() == [], f"{method} {call}"


def after_opening(machine: Machine, closing: ExitStack, method: str, call: int) -> dict[str, TensorRTEngine]:
    """Engines of which the n-th call of a method, counted from now, fails."""
    engines = opened(machine, closing)
    for books in (machine.cuda, machine.trt):
        books.calls.clear()
        books.fail(method, call)
    return engines


IN_CALLS = {
    "tensorrt": ["allocate", "on_device", "to_device", "to_host", "synchronize", "set_input_shape", "execute_async_v3"],
    "tensorrt-rtx": ["synchronize", "set_input_shape", "execute_async_v3"],
}
IN_CALLS["tensorrt"] += ["begin_capture", "end_capture", "launch", "destroy_graph"]


@pytest.mark.parametrize(("backend", "method"), [(name, method) for name in BACKENDS for method in IN_CALLS[name]])
def test_after_a_failing_call_the_next_ones_are_right(
    machine_with: MachineMaker, closing: ExitStack, backend: str, method: str
) -> None:
    """Above all after a capture that broke off: what was captured by then must never run."""
    dry = machine_with(tensors=STEP_WITH_RESIDUAL, backend=backend)
    use(after_opening(dry, closing, method, 0))
    times = dry.cuda.calls[method] + dry.trt.calls[method]
    assert times
    for call in range(1, times + 1):
        machine = machine_with(tensors=STEP_WITH_RESIDUAL, backend=backend)
        engines = after_opening(machine, closing, method, call)
        with pytest.raises(EngineError, match=f"{method}.* failed"):
            use(engines)
        for seed in range(10, 13):
            check(engines["low"], fed(4, seed=seed))
            check(engines["high"], fed(16, seed=seed))


def test_a_capture_that_fails_ends_with_the_first_error(machine_with: MachineMaker, closing: ExitStack) -> None:
    machine = machine_with(LOW)
    engine = opened(machine, closing)["low"]
    engine(step_inputs(4))
    machine.trt.fail("execute_async_v3", 2)
    machine.cuda.fail("end_capture", 1)  # as CUDA does with a capture that broke off
    with pytest.raises(EngineError, match="execute_async_v3 failed"):
        engine(step_inputs(4))
    check(engine, step_inputs(4, seed=1))


@pytest.mark.parametrize("method", ["synchronize", "free", "destroy_stream"])
def test_a_bank_closes_all_its_engines_though_one_fails(machine_with: MachineMaker, method: str) -> None:
    machine = machine_with()
    bank = bank_of(machine)
    machine.cuda.fail(method, 1 + machine.cuda.calls[method])
    with pytest.raises(EngineError, match=f"{method} failed"):
        bank.close()
    assert len(machine.left()) == (method in FREEING)


# ---------------------------------------------------------------- the cache of TensorRT for RTX


def rtx_run(machine: Machine) -> list[str]:
    """What was compiled while each profile ran once."""
    with ExitStack() as closing:
        engines = opened(machine, closing)
        engines["low"](step_inputs(4))
        engines["high"](step_inputs(16))
    return machine.trt.compiled


@pytest.mark.parametrize(("layout", "files"), [("per-profile", 2), ("multi-profile", 1)])
def test_what_is_compiled_once_is_there_the_next_time(
    machine_with: MachineMaker, cache_home: Path, layout: str, files: int
) -> None:
    first, second = (machine_with(backend="tensorrt-rtx", layout=layout) for _ in range(2))
    assert len(rtx_run(first)) == 2
    assert len(list(cache_home.glob("elit_export/*-tensorrt_rtx-10.14.1.48.cache"))) == files
    assert first.trt.calls["serialize"] == files  # each cache is written once
    assert rtx_run(second) == []


def test_a_cache_of_another_device_is_made_again(machine_with: MachineMaker, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, opened_plans.__name__)
    rtx_run(machine_with(backend="tensorrt-rtx"))
    other = machine_with(backend="tensorrt-rtx")
    other.cuda._capability = "12.0"
    assert len(rtx_run(other)) == 2
    assert "made on another device or by another version" in caplog.text


def test_a_cache_that_cannot_be_kept_is_only_logged(
    machine_with: MachineMaker, cache_home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache_home.write_text("a file where the folder should be")
    machine = machine_with(backend="tensorrt-rtx")
    assert len(rtx_run(machine)) == 2
    assert "cannot keep compiled kernels in" in caplog.text
    assert machine.left() == []


def test_a_cache_that_cannot_be_read_is_only_logged(
    machine_with: MachineMaker, cache_home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rtx_run(machine_with(backend="tensorrt-rtx", layout="multi-profile"))
    [cache] = cache_home.glob("elit_export/*.cache")
    cache.unlink()
    cache.mkdir()
    assert len(rtx_run(machine_with(backend="tensorrt-rtx", layout="multi-profile"))) == 2
    assert "cannot read compiled kernels from" in caplog.text


def test_tensorrt_itself_has_no_cache(machine_with: MachineMaker, cache_home: Path) -> None:
    rtx_run(machine_with(backend="tensorrt"))
    assert not cache_home.exists()


# ---------------------------------------------------------------- may it run here


class Here:
    """This machine with a stand-in's GPU and library."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def has(self, machine: Machine, problem: tuple[str, str] = ("", "")) -> None:
        self._monkeypatch.setitem(sys.modules, machine.trt.__name__, machine.trt)  # type: ignore[arg-type]
        self._monkeypatch.setattr(cuda_layer, "Cuda", lambda: machine.cuda)
        self._monkeypatch.setattr(cuda_layer, "device_problem", lambda: problem)


def incompatibility(machine: Machine) -> str:
    return LOADERS[machine.target.backend].incompatibility(list(machine.plans.values()), machine.target)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Here:
    return Here(monkeypatch)


@pytest.mark.parametrize("backend", BACKENDS)
def test_plans_for_this_gpu_and_version_run_here(machine_with: MachineMaker, here: Here, backend: str) -> None:
    machine = machine_with(backend=backend, compute_capabilities=["7.5", "8.9"])
    here.has(machine)
    assert incompatibility(machine) == ""
    assert LOADERS[backend].library_version() == f"{machine.trt.__name__} 10.14.1.48"
    for engine in LOADERS[backend].open_engines(machine.plans, machine.target).values():
        engine.close()
    assert machine.left() == []


def test_another_version_is_refused_with_both(machine_with: MachineMaker, here: Here) -> None:
    machine = machine_with(built_with="10.14.0.1", version="10.15.0.2")
    here.has(machine)
    assert incompatibility(machine) == (
        "built with tensorrt 10.14.0.1, installed is 10.15.0.2: pip install 'tensorrt==10.14.0.1' or build again"
    )


@pytest.mark.parametrize("compatibility", ["version", "both"])
def test_version_compatible_plans_open_in_later_versions_only(
    machine_with: MachineMaker, here: Here, closing: ExitStack, compatibility: str
) -> None:
    later = machine_with(built_with="10.9.0.1", version="10.15.0.2", compatibility=compatibility)
    here.has(later)
    assert incompatibility(later) == ""
    check(opened(later, closing)["low"], step_inputs(4))  # they bring code for the host, which must be allowed
    earlier = machine_with(built_with="10.15.0.2", version="10.9.0.1", compatibility=compatibility)
    here.has(earlier)
    assert "built with tensorrt 10.15.0.2, installed is 10.9.0.1" in incompatibility(earlier)


def test_tensorrt_for_rtx_opens_plans_of_its_own_version_only(machine_with: MachineMaker, here: Here) -> None:
    machine = machine_with(backend="tensorrt-rtx", built_with="1.4.0.1", version="1.7.1.116", compatibility="version")
    here.has(machine)
    assert "built with tensorrt-rtx 1.4.0.1, installed is 1.7.1.116" in incompatibility(machine)


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_a_plan_of_another_graph_is_refused_and_leaves_nothing(machine_with: MachineMaker, backend: str) -> None:
    machine = machine_with(LOW, backend=backend)
    machine.plans = {"low": replace(machine.plans["low"], graph=STEP_WITH_RESIDUAL.graph)}
    told = r"is not a plan of the graph `step`: it takes x float32\[\?, .*residual_before.*; copy the bundle again, or"
    with pytest.raises(BundleError, match=told):
        machine.open()
    assert machine.left() == []


def test_code_in_a_plan_is_not_run_unless_it_was_asked_for(machine_with: MachineMaker) -> None:
    machine = machine_with()
    machine.host_code = True
    machine.write(machine.plans["low"].path, STEP, [LOW])
    with pytest.raises(EngineError, match=r"tensorrt cannot open .*low.step\.plan"):
        machine.open()
    assert machine.left() == []


def test_a_plan_whose_header_does_not_fit_is_not_deserialized(machine_with: MachineMaker) -> None:
    machine = machine_with(backend="tensorrt-rtx")
    machine.plans["low"].path.write_bytes(b"ftrt" + bytes(60))
    with pytest.raises(EngineError, match=r"cannot run .*: unsupported cc, malformed engine"):
        machine.open()
    assert "deserialize_cuda_engine" not in machine.trt.calls
    assert machine.left() == []


def test_a_device_problem_is_told_with_its_remedy(machine_with: MachineMaker, here: Here) -> None:
    machine = machine_with()
    here.has(machine, problem=("no NVIDIA GPU is visible", "see nvidia-smi"))
    assert incompatibility(machine) == "no NVIDIA GPU is visible: see nvidia-smi"


def test_another_gpu_is_refused_unless_the_hardware_may_differ(machine_with: MachineMaker, here: Here) -> None:
    wanted = {"compute_capabilities": ["8.6", "12.0"]}
    machine = machine_with(**wanted)
    here.has(machine)
    assert incompatibility(machine) == (
        "built for compute capability 8.6, 12.0, this GPU has 8.9: "
        "add it to the target's compute_capabilities and build again"
    )
    for compatibility, fits in (("version", False), ("hardware", True), ("both", True)):
        compatible = machine_with(**wanted, compatibility=compatibility)
        here.has(compatible)
        assert (incompatibility(compatible) == "") == fits


def test_no_byte_of_an_unfit_plan_is_read(machine_with: MachineMaker, here: Here) -> None:
    machine = machine_with(built_with="9.0")
    here.has(machine)
    for plan in machine.plans.values():
        plan.path.unlink()
    with pytest.raises(BackendUnavailable, match=r"^these plans cannot run here: built with tensorrt 9\.0"):
        LOADERS["tensorrt"].open_engines(machine.plans, machine.target)
    assert not machine.cuda.calls


# ---------------------------------------------------------------- from above


def bank_of(machine: Machine) -> EngineBank:
    engines = machine.open()
    slots = [Slot(profile, engines[profile.name]) for profile in machine.profiles]
    return EngineBank(slots, SPEC.budgets, Precision.FP32)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bank_of_four_profiles(machine_with: MachineMaker, backend: str, layout: str) -> None:
    machine = machine_with(*default_profiles(16, Range(1, 2, 8)), backend=backend, layout=layout)
    with bank_of(machine) as bank:
        for seed, kept in enumerate((16, 16, 16, 2, 5, 16, 3, 3, 1, 12, 16)):
            inputs = step_inputs(kept, rows=1 + seed % 3, seed=seed)
            expected = toy(inputs)
            del inputs["latents"]
            found = bank(Budget(kept, 16), inputs).outputs
            np.testing.assert_array_equal(found["velocity"], expected["velocity"])
            np.testing.assert_array_equal(to_host(found["residual"]), expected["residual"])
    assert machine.left() == []


@pytest.mark.parametrize("guidance", ["none", "cfg:2", "ccfg:2@sixteenth"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_samples_equal_those_of_the_plain_function(machine_with: MachineMaker, backend: str, guidance: str) -> None:
    profiles = default_profiles(16, Range(1, 2, 8))
    machine = machine_with(*profiles, backend=backend, layout="multi-profile")
    plain = EngineBank([Slot(profile, FunctionEngine(toy)) for profile in profiles], SPEC.budgets, Precision.FP32)
    samples = []
    for bank in (bank_of(machine), plain):
        with Pipeline(bank, SPEC, PIXELS) as pipeline:
            choices = {"steps": 6, "schedule": "0-2:quarter,3-5:full", "guidance": guidance, "sampler": "heun"}
            samples.append(pipeline.sample([0, 1, 2], **choices).latents)  # type: ignore[arg-type]
    np.testing.assert_array_equal(*samples)
    assert machine.left() == []


# ---------------------------------------------------------------- the stand-in itself


def signatures(kind: type) -> dict[str, tuple[str, ...]]:
    return {
        name: method.__code__.co_varnames[: method.__code__.co_argcount]
        for name, method in vars(kind).items()
        if not name.startswith("_") and hasattr(method, "__code__")
    }


def test_the_stand_in_has_the_methods_of_the_cuda_layer() -> None:
    assert signatures(Cuda).items() <= signatures(StandInCuda).items()


def test_the_stand_in_does_nothing_before_it_is_waited_for() -> None:
    cuda = StandInCuda()
    stream, memory, pinned = cuda.create_stream(), cuda.allocate(4), cuda.allocate_pinned(4)
    cuda.on_host(pinned, 4)[:] = 7
    cuda.to_device(memory, pinned, 4, stream)
    assert not (cuda.on_gpu(memory, 4) == 7).any()
    cuda.synchronize(stream)
    assert (cuda.on_gpu(memory, 4) == 7).all()


@pytest.mark.parametrize(
    ("told", "misuse"),
    [
        ("is not allocated", lambda cuda, memory, stream: [cuda.free(memory), cuda.free(memory)]),
        ("nothing is allocated", lambda cuda, memory, stream: [cuda.free(memory), cuda.on_gpu(memory, 1)]),
        ("reach too far", lambda cuda, memory, stream: cuda.on_device(memory, memory, 5, stream)),
        ("nothing is allocated", lambda cuda, memory, stream: cuda.to_device(memory, id(cuda), 4, stream)),
        ("on the device", lambda cuda, memory, stream: cuda.to_host(memory, memory, 4, stream)),
        ("no such stream", lambda cuda, memory, stream: cuda.on_device(memory, memory, 4, stream + 1)),
        ("no such stream", lambda cuda, memory, stream: [cuda.destroy_stream(stream) for _ in range(2)]),
        ("no such graph", lambda cuda, memory, stream: cuda.launch(1, stream)),
        ("nothing is being captured", lambda cuda, memory, stream: cuda.end_capture(stream)),
        ("being captured", lambda cuda, memory, stream: [cuda.begin_capture(stream), cuda.synchronize(stream)]),
        (
            "while work is under way",
            lambda cuda, memory, stream: [cuda.on_device(memory, memory, 4, stream), cuda.free(memory)],
        ),
    ],
)
def test_the_stand_in_catches(told: str, misuse: Callable[[StandInCuda, int, int], object]) -> None:
    cuda = StandInCuda()
    memory, stream = cuda.allocate(4), cuda.create_stream()
    assert len(cuda.left()) == 2
    with pytest.raises(AssertionError, match=told):
        misuse(cuda, memory, stream)

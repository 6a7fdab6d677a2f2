"""One contract over every engine that runs on this machine."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elit_export.arrays import HostArray
from elit_export.backends.onnxruntime.engine import OnnxRuntimeEngine
from elit_export.backends.protocols import Engine, to_host
from elit_export.bundle.reading import Bundle
from elit_export.bundle.recipe import recipe_from_values
from elit_export.compiler.build import compile_bundle
from elit_export.errors import BackendUnavailable, EngineError
from elit_export.models.sit import ElitSiT
from elit_export.runtime.opening import open_bank
from elit_export.spec import Profile, Range
from elit_export.verify.reference import torch_engine
from tests.conftest import recipe_values

Inputs = dict[str, HostArray]


def step_inputs(rows: int, kept: int, seed: int = 0) -> Inputs:
    generator = np.random.default_rng(seed)
    return {
        "x": generator.standard_normal((rows, 4, 16, 16)).astype(np.float32),
        "t": generator.uniform(0.1, 0.9, rows).astype(np.float32),
        "y": generator.integers(0, 1001, rows),
        "latents": np.arange(kept),
    }


@pytest.fixture(scope="module")
def function(golden_g4_model: ElitSiT) -> Engine:
    return torch_engine(golden_g4_model)


@pytest.fixture(scope="module")
def onnxruntime(golden_g4_bundle: Bundle) -> Iterator[Engine]:
    with open_bank(golden_g4_bundle, golden_g4_bundle.manifest.plan_sets[0]) as bank:
        yield bank.slots[0].engine


@pytest.fixture(scope="module")
def tensorrt(golden_g4_model: ElitSiT, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Over stand-ins for CUDA and TensorRT, whose plan is the PyTorch model itself."""
    pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-python")
    from tests.backends.tensorrt_standin import Machine, step_tensors

    model = torch_engine(golden_g4_model)
    machine = Machine(
        tmp_path_factory.mktemp("plans"),
        lambda inputs: {name: to_host(array) for name, array in model(inputs).items()},
        step_tensors((4, 16, 16), residual=(64, 64)),
        [Profile("all", Range(1, 8, 16), Range(1, 2, 4))],
    )
    with machine.open()["all"] as made:
        yield made
    assert machine.left() == []


@pytest.fixture(scope="module")
def openvino(golden_g4_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """In float32; `test_openvino.py` has its other precisions."""
    pytest.importorskip("openvino", reason="needs openvino")
    folder = Path(shutil.copytree(golden_g4_bundle.folder, tmp_path_factory.mktemp("openvino") / "bundle"))
    values: Any = recipe_values(golden_g4_bundle.folder.parent / "g4.safetensors")
    values["targets"]["ov"] = {"backend": "openvino", "precision": "fp32", "threads": 1}
    bundle = compile_bundle(recipe_from_values(values, "test"), "ov", out=folder)
    with open_bank(bundle, bundle.manifest.plan_sets[-1]) as bank:
        yield bank.slots[0].engine


@pytest.fixture(scope="module", params=["function", "onnxruntime", "openvino", "tensorrt"])
def engine(request: pytest.FixtureRequest) -> Engine:
    made: Engine = request.getfixturevalue(request.param)
    return made


def test_velocity_is_numpy_and_residual_the_backends_own(engine: Engine) -> None:
    outputs = engine(step_inputs(rows=2, kept=4))
    velocity, residual = outputs["velocity"], outputs["residual"]
    assert isinstance(velocity, np.ndarray)
    assert velocity.dtype == np.float32
    assert velocity.shape == (2, 4, 16, 16)
    assert not isinstance(residual, np.ndarray)
    assert residual.numpy().shape == (2, 64, 64)


def test_outputs_belong_to_the_caller(engine: Engine) -> None:
    first = engine(step_inputs(rows=2, kept=4))
    kept = {name: to_host(array).copy() for name, array in first.items()}
    engine(step_inputs(rows=2, kept=4, seed=1))
    for name, array in first.items():
        np.testing.assert_array_equal(to_host(array), kept[name])


def test_inputs_are_not_changed(engine: Engine) -> None:
    inputs = step_inputs(rows=2, kept=3)
    before = {name: array.copy() for name, array in inputs.items()}
    engine(inputs)
    for name, array in inputs.items():
        np.testing.assert_array_equal(array, before[name])


def test_equal_calls_give_equal_results(engine: Engine) -> None:
    first, second = (engine(step_inputs(rows=3, kept=5)) for _ in range(2))
    np.testing.assert_array_equal(to_host(first["velocity"]), to_host(second["velocity"]))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kept", [1, 2, 7, 16])
def test_every_shape_equals_pytorch(engine: Engine, golden_g4_model: ElitSiT, rows: int, kept: int) -> None:
    inputs = step_inputs(rows, kept)
    found, expected = engine(inputs), torch_engine(golden_g4_model)(inputs)
    for name in ("velocity", "residual"):
        error = np.abs(to_host(found[name]) - to_host(expected[name])).max()
        assert error <= 5e-6 * np.abs(to_host(expected[name])).max()


def test_arrays_that_are_not_contiguous_are_taken(engine: Engine) -> None:
    inputs = step_inputs(rows=2, kept=4)
    strided = {**inputs, "x": np.asfortranarray(inputs["x"])}
    np.testing.assert_array_equal(to_host(engine(strided)["velocity"]), to_host(engine(inputs)["velocity"]))


# ---------------------------------------------------------------- onnxruntime alone


def plan_of(bundle: Bundle) -> Path:
    plan = bundle.manifest.plan_sets[0].plans[0]
    return bundle.verified(plan.artifact) / plan.file


def engine_of(bundle: Bundle) -> OnnxRuntimeEngine:
    return OnnxRuntimeEngine(plan_of(bundle), device="cpu", threads=1)


def test_wrong_shape_is_an_engine_error(golden_g4_bundle: Bundle) -> None:
    with engine_of(golden_g4_bundle) as engine, pytest.raises(EngineError, match="onnxruntime failed"):
        engine({**step_inputs(rows=1, kept=1), "x": np.zeros((1, 3, 16, 16), np.float32)})


def test_its_own_arrays_go_back_in(golden_g4_bundle: Bundle) -> None:
    """`x` is not what will be fed back later, but any input shows that no host copy is needed."""
    inputs = step_inputs(rows=1, kept=2)
    with engine_of(golden_g4_bundle) as engine:
        from onnxruntime import OrtValue

        from elit_export.backends.onnxruntime.engine import OrtArray

        device = {**inputs, "x": OrtArray(OrtValue.ortvalue_from_numpy(inputs["x"]))}
        np.testing.assert_array_equal(to_host(engine(device)["velocity"]), to_host(engine(inputs)["velocity"]))


def test_absent_provider_is_refused_not_replaced(golden_g4_bundle: Bundle) -> None:
    """ONNX Runtime itself falls back to the CPU without a word."""
    with pytest.raises(BackendUnavailable, match="CUDAExecutionProvider"):
        OnnxRuntimeEngine(plan_of(golden_g4_bundle), device="cuda", threads=0)

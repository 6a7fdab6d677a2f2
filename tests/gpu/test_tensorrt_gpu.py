"""TensorRT engines on a real GPU: `make test-gpu`. Not run on a GPU so far.

Each test runs for every TensorRT library that is installed and builds for the GPU at hand.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elit_export.backends import BACKENDS
from elit_export.backends.protocols import to_host
from elit_export.backends.tensorrt.cuda import Cuda
from elit_export.bundle.reading import Bundle
from elit_export.bundle.recipe import recipe_from_values
from elit_export.compiler.build import compile_bundle
from elit_export.errors import ElitExportError
from elit_export.runtime.pipeline import Pipeline

pytestmark = pytest.mark.gpu

LIBRARIES = ("tensorrt", "tensorrt-rtx")
PRECISIONS = ("fp32", "fp16", "bf16")
SWITCHES = 1000
LEAK_LIMIT_BYTES = 16 << 20


def recipe(backend: str, precision: str, **options: Any) -> Any:
    capabilities = [Cuda().compute_capability()]
    target = {"backend": backend, "precision": precision, "compute_capabilities": capabilities, **options}
    values = {
        "name": "gpu",
        "checkpoint": "shipped:fashion",
        "rows": {"min": 1, "opt": 8, "max": 32},
        "targets": {"gpu": target},
    }
    return recipe_from_values(values, "test")


@pytest.fixture(scope="session", params=LIBRARIES)
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    try:
        target = recipe(name, "bf16").target("gpu")
        BACKENDS[name].builder().check(target)
    except ElitExportError as error:
        pytest.skip(str(error))
    return name


@pytest.fixture(scope="session")
def bundle(backend: str, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return compile_bundle(recipe(backend, "bf16"), "gpu", out=tmp_path_factory.mktemp(backend))


@pytest.fixture
def pipeline(bundle: Bundle) -> Iterator[Pipeline]:
    with Pipeline.load(bundle.folder) as opened:
        yield opened


def inputs(pipeline: Pipeline, rows: int) -> dict[str, Any]:
    generator = np.random.default_rng(rows)
    return {
        "x": generator.standard_normal((rows, *pipeline.spec.sample_shape)).astype(np.float32),
        "t": generator.random(rows).astype(np.float32),
        "y": generator.integers(0, pipeline.spec.num_classes, rows),
    }


def velocity(pipeline: Pipeline, kept: int, rows: int) -> Any:
    return to_host(pipeline.bank(pipeline.spec.budget(kept), inputs(pipeline, rows)).outputs["velocity"])


# Building verifies every profile at its corners and whole trajectories against PyTorch; a miss is a ParityError.


@pytest.mark.parametrize("layout", ["per-profile", "multi-profile"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_profile_and_trajectory_agrees_with_pytorch(
    backend: str, precision: str, layout: str, tmp_path: Path
) -> None:
    built = compile_bundle(recipe(backend, precision, layout=layout), "gpu", out=tmp_path)
    (plan_set,) = built.manifest.plan_sets
    assert {profile.parity.status for profile in plan_set.profiles} == {"passed"}


def test_switching_is_safe_with_a_poisoned_activation_buffer(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one profile leaves in the shared buffer must not reach another."""
    from cuda.bindings import runtime as cudart

    allocated: list[tuple[int, int]] = []
    allocate = Cuda.allocate

    def noting(cuda: Cuda, size_bytes: int) -> int:
        allocated.append((allocate(cuda, size_bytes), size_bytes))
        return allocated[-1][0]

    monkeypatch.setattr(Cuda, "allocate", noting)
    with Pipeline.load(bundle.folder) as pipeline:
        address, size_bytes = allocated[0]  # the activation buffer comes before all others
        alone = {kept: velocity(pipeline, kept, 4) for kept in (1, 4, 8, 16)}
        for kept in (16, 1, 8, 4, 16):
            (error,) = cudart.cudaMemset(address, 0xFF, size_bytes)  # every float a NaN
            assert error == cudart.cudaError_t.cudaSuccess
            assert np.array_equal(velocity(pipeline, kept, 4), alone[kept])


def test_cuda_graphs_change_nothing(backend: str, tmp_path: Path) -> None:
    samples = []
    for graphs in (True, False):
        folder = tmp_path / str(graphs)
        compile_bundle(recipe(backend, "bf16", cuda_graphs=graphs), "gpu", out=folder)
        with Pipeline.load(folder) as pipeline:
            samples.append(pipeline.sample([1, 2, 3], steps=8, schedule="0-3:quarter,4-7:full", guidance="cfg:2"))
    assert np.array_equal(samples[0].latents, samples[1].latents)


def test_attention_is_fused(backend: str, tmp_path: Path) -> None:
    """One fused kernel for each attention of the model, as the engine inspector tells."""
    import importlib

    trt = importlib.import_module(BACKENDS[backend].library)
    built = compile_bundle(recipe(backend, "bf16", detailed_inspection=True), "gpu", out=tmp_path)
    plan = built.manifest.plan_sets[0].plans[0]
    runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
    engine = runtime.deserialize_cuda_engine((built.verified(plan.artifact) / plan.file).read_bytes())
    told = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    kernels = [str(layer.get("TacticName", "")).lower() for layer in json.loads(told)["Layers"]]
    fused = [kernel for kernel in kernels if "mha" in kernel or "flash" in kernel]
    spec = built.manifest.model.spec
    assert len(fused) >= spec.depth + 2  # the blocks', Read's and Write's


def test_switching_leaks_nothing(pipeline: Pipeline) -> None:
    from cuda.bindings import runtime as cudart

    def free_bytes() -> int:
        error, free, _total = cudart.cudaMemGetInfo()
        assert error == cudart.cudaError_t.cudaSuccess
        return int(free)

    for kept in (16, 8, 4, 1):
        velocity(pipeline, kept, 4)
    before = free_bytes()
    for turn in range(SWITCHES):
        velocity(pipeline, (16, 8, 4, 1)[turn % 4], 1 + turn % 8)
    assert before - free_bytes() < LEAK_LIMIT_BYTES

"""Models and bundles that are made once for the whole run."""

from __future__ import annotations

import copy
import functools
import gc
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from hypothesis import settings
from torch.onnx._internal.exporter._registration import ONNXRegistry

from elit_export.graphs import export
from elit_export.models.elit import Elit
from elit_export.spec import Precision

# ---------------------------------------------------------------- exports that the whole run shares

EXPORTS = "ELIT_EXPORT_TEST_EXPORTS"  # the folder that holds them, for all workers of a run
Export = Callable[[Elit, str, Path, Precision], Path]


def remembering(export_graph: Export) -> Export:
    """Real exports, each made once: torch takes seconds for one, and most here are of the same few models."""

    @functools.wraps(export_graph)
    def remembered(model: Elit, name: str, target: Path, precision: Precision = Precision.FP32) -> Path:
        folder = os.environ.get(EXPORTS)
        if folder is None:
            return export_graph(model, name, target, precision)
        made = Path(folder) / f"{fingerprint(model)}-{name}-{precision.value}"
        with FileLock(f"{made}.lock"):
            if not made.is_dir():
                export_graph(model, name, made.with_suffix(".part"), precision)
                made.with_suffix(".part").rename(made)
        for file in (f"{name}.onnx.data", f"{name}.onnx"):
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(made / file, target / file)
        return target / f"{name}.onnx"

    return remembered


def registry_made_once() -> None:
    """torch parses some 500 functions of its library anew at every export; here each export gets a copy."""
    make = ONNXRegistry.from_torchlib
    registries = functools.cache(make)

    def from_torchlib(*arguments: Any, **named: Any) -> ONNXRegistry:
        made = copy.copy(registries(*arguments, **named))
        made.functions = {name: list(overloads) for name, overloads in made.functions.items()}
        return made

    ONNXRegistry.from_torchlib = staticmethod(from_torchlib)  # type: ignore[assignment,method-assign]


# Before the modules of tests and of the package import it by name.
unremembered_export = export.export_graph
export.export_graph = remembering(export.export_graph)  # type: ignore[assignment]
registry_made_once()


def pytest_configure(config: pytest.Config) -> None:
    """Workers of a run inherit the folder from the process that starts them."""
    if EXPORTS not in os.environ:
        base = Path(os.environ.get("TMPDIR", "/tmp")) / f"elit-export-exports-{os.getpid()}"
        base.mkdir(parents=True, exist_ok=True)
        os.environ[EXPORTS] = str(base)
        config.add_cleanup(lambda: shutil.rmtree(base, ignore_errors=True))


from elit_export import Pipeline, compile_bundle  # noqa: E402
from elit_export.bench import timing  # noqa: E402
from elit_export.bundle.calibration_inputs import save_inputs  # noqa: E402
from elit_export.bundle.reading import Bundle  # noqa: E402
from elit_export.bundle.recipe import Recipe, recipe_from_values, shipped_recipe  # noqa: E402
from elit_export.calibrate.inputs import SampleRecipe, recorded_rows, select_samples  # noqa: E402
from elit_export.checkpoints.native import load_checkpoint, save_checkpoint  # noqa: E402
from elit_export.models.sit import ElitSiT  # noqa: E402
from tests.helpers import Golden, golden, tiny_model  # noqa: E402

# Exports make millions of objects that live till their end, and it takes time to look through them for cycles.
gc.freeze()
gc.set_threshold(50_000, 20, 100)
torch.set_num_threads(1)  # the models here are tiny; a second thread only waits for the first
# Fuzzing anew at every run and for longer than `make test` does:
#     python -m pytest tests/test_corruption.py --hypothesis-profile=long
# `--hypothesis-seed=N` repeats a run, and what failed is tried first at the next one.
settings.register_profile("long", max_examples=5000)


def fingerprint(model: Elit) -> str:
    """Of the spec and every weight, whatever it is stored in: the graph is the same."""
    digest = hashlib.sha256(str(model.spec).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.float().numpy().tobytes())
    return digest.hexdigest()[:16]


@pytest.fixture(scope="session", autouse=True)
def _small_matrix_products() -> Iterator[None]:
    """Those that benches take for the peak of a machine take seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "PEAK_SIZES", (64,))
        yield


@pytest.fixture(scope="session", params=["tiny_g4", "tiny_g2_qknorm"])
def any_golden(request: pytest.FixtureRequest) -> Golden:
    return golden(request.param)


@pytest.fixture(scope="session")
def golden_g4() -> Golden:
    return golden("tiny_g4")


@pytest.fixture(scope="session")
def golden_g4_model(golden_g4: Golden, tmp_path_factory: pytest.TempPathFactory) -> ElitSiT:
    return golden_g4.load(tmp_path_factory.mktemp("g4"))


def recipe_values(checkpoint: Path, name: str = "test") -> dict[str, object]:
    """A recipe as TOML would give it."""
    return {
        "name": name,
        "checkpoint": str(checkpoint),
        "rows": {"min": 1, "opt": 2, "max": 8},
        "targets": {"cpu": {"backend": "onnxruntime", "device": "cpu", "precision": "fp32", "threads": 2}},
    }


@pytest.fixture(scope="session")
def golden_g4_bundle(golden_g4_model: ElitSiT, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """ONNX Runtime engines of the golden 4-channel model. Do not change it: copy it first."""
    folder = tmp_path_factory.mktemp("g4_bundle")
    save_checkpoint(folder / "g4.safetensors", golden_g4_model)
    recipe = recipe_from_values(recipe_values(folder / "g4.safetensors"), "test")
    return compile_bundle(recipe, "cpu", out=folder / "bundle")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pixel model in the own format."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.safetensors"
    save_checkpoint(path, tiny_model())
    return path


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path) -> Bundle:
    """ONNX Runtime engines of the tiny pixel model. Do not change it: copy it first."""
    recipe = recipe_from_values(recipe_values(tiny_checkpoint), "test")
    return compile_bundle(recipe, "cpu", out=tiny_checkpoint.parent / "bundle")


@pytest.fixture(scope="session")
def fused_bundle(tiny_bundle: Bundle, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny bundle with the graph `fused`. Do not change it: copy it first."""
    folder = Path(shutil.copytree(tiny_bundle.folder, tmp_path_factory.mktemp("fused") / "bundle"))
    return compile_bundle(fused_recipe(tiny_checkpoint), "cpu", out=folder)


def fused_recipe(checkpoint: Path) -> Recipe:
    values: Any = recipe_values(checkpoint)
    values["targets"]["cpu"]["fused"] = True
    return recipe_from_values(values, "test")


@pytest.fixture(scope="session")
def tiny_samples(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration samples of the tiny model, as `calibrate samples` takes them."""
    recipe = SampleRecipe(images=5, steps=8, sampler="euler", guidance=("none", "cfg:2"), samples=96, seed=4, rows=3)
    with Pipeline.load(tiny_bundle.folder) as pipeline:
        checkpoint = tiny_bundle.manifest.model.checkpoint_sha256
        found = select_samples(list(recorded_rows(pipeline, recipe)), pipeline, recipe, checkpoint)
    path = tmp_path_factory.mktemp("samples") / "samples.npz"
    save_inputs(found.samples, path)
    return path


def openvino_recipe(checkpoint: Path, **changes: Any) -> Recipe:
    """Targets ov-fp32 (with `fused`), ov-bf16 and ov-int8 beside that of ONNX Runtime; `changes` are in each."""
    values: Any = recipe_values(checkpoint)
    for precision in ("fp32", "bf16", "int8"):
        values["targets"][f"ov-{precision}"] = {
            "backend": "openvino",
            "precision": precision,
            "threads": 1,
            "fused": precision == "fp32",
        } | changes
    return recipe_from_values(values, "test")


@pytest.fixture(scope="session")
def openvino_bundle(
    fused_bundle: Bundle, tiny_checkpoint: Path, tiny_samples: Path, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    """The tiny model for OpenVINO in every precision that this CPU has. Do not change it: copy it first."""
    ov = pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    folder = Path(shutil.copytree(fused_bundle.folder, tmp_path_factory.mktemp("openvino") / "bundle"))
    recipe = openvino_recipe(tiny_checkpoint)
    bundle = compile_bundle(recipe, "ov-fp32", out=folder)
    if "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        bundle = compile_bundle(recipe, "ov-bf16", out=folder)
    if "INT8" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        bundle = compile_bundle(recipe, "ov-int8", out=folder, samples=tiny_samples)
    return bundle


@pytest.fixture(scope="session")
def fashion_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The shipped model through its own recipe."""
    return compile_bundle(shipped_recipe(), "cpu", out=tmp_path_factory.mktemp("fashion") / "bundle")


@pytest.fixture(scope="session")
def fashion_model() -> ElitSiT:
    """The shipped model. Do not change it."""
    return load_checkpoint("shipped:fashion")


@pytest.fixture(scope="session")
def fashion_graphs(fashion_model: ElitSiT, tmp_path_factory: pytest.TempPathFactory) -> dict[Precision, Path]:
    """The shipped model's graphs in half precision."""
    return {
        precision: export.export_graph(fashion_model, "step", tmp_path_factory.mktemp(precision.value), precision)
        for precision in (Precision.FP16, Precision.BF16)
    }

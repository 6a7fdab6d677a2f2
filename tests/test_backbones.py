"""Every backbone through the whole toolchain: graphs, engines of each backend, samplings, caches, training.

The table "backbone × capability" of docs/backbones.md names these tests.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from click.testing import CliRunner

from elit_export import Pipeline, compile_bundle, load_checkpoint
from elit_export.backends.onnxruntime.engine import OnnxRuntimeEngine
from elit_export.backends.protocols import to_host
from elit_export.bundle.reading import Bundle
from elit_export.bundle.recipe import Recipe, recipe_from_values
from elit_export.calibrate.inputs import SampleRecipe, recorded_rows, select_samples
from elit_export.calibrate.sensitivity import outputs_of
from elit_export.checkpoints.native import save_checkpoint
from elit_export.cli import main
from elit_export.cost.flops import layer_flops
from elit_export.cost.layers import layers_of
from elit_export.errors import CheckpointError, InputError, RecipeError
from elit_export.graphs import formats
from elit_export.graphs.program import export_program
from elit_export.graphs.quantize import PRODUCTS, quantized_graph
from elit_export.models.elit import Elit
from elit_export.spec import CACHE_GRAPHS, PIXELS, STEP, Budget, Precision
from elit_export.training.data import load_images
from elit_export.training.evaluate import held_out_errors
from elit_export.training.trainer import TrainConfig, Trainer
from elit_export.verify.metrics import difference
from elit_export.verify.reference import torch_engine, torch_pipeline
from tests.conftest import recipe_values
from tests.helpers import VARIANTS, max_relative, rounding_graph, tiny_model, tiny_spec

FASHION = Path(__file__).parent / "data" / "fashion"
each_variant = pytest.mark.parametrize("variant", list(VARIANTS))


def has(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


def computes_bf16() -> bool:
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@cache
def model_of(variant: str) -> Elit:
    """Do not change it."""
    return tiny_model(**VARIANTS[variant])


WITH_FUSED = ("ELIT-SiT",)  # that graph only calls methods of a model; tests of text models export it too


def recipe_of(checkpoint: Path, variant: str) -> Recipe:
    """ONNX Runtime, for some with `fused`, and where they are installed OpenVINO and TensorRT for RTX."""
    values: Any = recipe_values(checkpoint)
    values["targets"]["cpu"]["fused"] = variant in WITH_FUSED
    if has("openvino"):
        values["targets"]["ov"] = {"backend": "openvino", "precision": "bf16", "threads": 1}
    if has("tensorrt_rtx"):
        values["targets"]["rtx"] = {
            "backend": "tensorrt-rtx",
            "precision": "bf16",
            "compute_capabilities": ["8.9"],
        }
    return recipe_from_values(values, "test")


@dataclass(frozen=True)
class Built:
    """A checkpoint, its recipe, and a bundle with the target `cpu`. Do not change it."""

    variant: str
    checkpoint: Path
    bundle: Bundle

    @property
    def recipe(self) -> Recipe:
        return recipe_of(self.checkpoint, self.variant)


@pytest.fixture(scope="module", params=list(VARIANTS))
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("backbone")
    checkpoint = folder / "model.safetensors"
    save_checkpoint(checkpoint, model_of(request.param))
    return Built(
        request.param, checkpoint, compile_bundle(recipe_of(checkpoint, request.param), "cpu", out=folder / "bundle")
    )


@pytest.fixture
def pipeline(built: Built) -> Iterator[Pipeline]:
    with Pipeline.load(built.bundle.folder, target="cpu") as loaded:
        yield loaded


# ---------------------------------------------------------------- graphs


def inputs_of(model: Elit, graph: str, rows: int, kept: int) -> dict[str, np.ndarray[Any, Any]]:
    generator = np.random.default_rng((rows, kept))
    sizes = {"rows": rows, "latents": kept}
    found = {}
    for tensor in model.spec.graph(graph).inputs:
        shape = [sizes[size] if isinstance(size, str) else size for size in tensor.dims]
        found[tensor.name] = generator.standard_normal(shape).astype(np.float32)
    classes = generator.integers(0, model.spec.null_class + 1, rows)
    own = {"t": generator.uniform(0.02, 1, rows).astype(np.float32), "y": classes, "latents": np.arange(kept)}
    return {name: own.get(name, values) for name, values in found.items()}


@pytest.mark.parametrize("graph", [STEP, *CACHE_GRAPHS])
@each_variant
def test_a_graph_equals_torch(variant: str, graph: str, tmp_path: Path) -> None:
    model = model_of(variant)
    path = formats.export_graph(model, graph, tmp_path, Precision.FP32)
    reference = torch_engine(model, graph)
    with OnnxRuntimeEngine(path, device="cpu", threads=1) as engine:
        for budget in model.spec.budgets if graph == STEP else [model.spec.full]:
            for rows in (1, 2, 5):
                inputs = inputs_of(model, graph, rows, budget.kept)
                found, expected = engine(inputs), reference(inputs)
                errors = {name: max_relative(to_host(found[name]), to_host(expected[name])) for name in expected}
                assert max(errors.values()) <= 5e-6, (budget, rows, errors)


@pytest.mark.parametrize("precision", [Precision.FP16, Precision.BF16])
@each_variant
def test_a_graph_in_half_precision_is_near_torch_but_rounded(
    variant: str, precision: Precision, tmp_path: Path
) -> None:
    """Measured 66 to 74 dB in fp16 and 44 to 53 dB in bf16, which ONNX Runtime rounds in place of computing."""
    model = model_of(variant)
    path = formats.export_graph(model, STEP, tmp_path, precision)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if precision is Precision.BF16:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    source: Any = rounding_graph(path).SerializeToString() if precision is Precision.BF16 else path
    session, reference = ort.InferenceSession(source, options), torch_engine(model)
    least, most = {Precision.FP16: (60, 90), Precision.BF16: (40, 70)}[precision]
    for budget in model.spec.budgets:
        inputs = inputs_of(model, STEP, 4, budget.kept)
        expected = reference(inputs)
        found = dict(zip(expected, session.run(list(expected), inputs), strict=True))
        errors = [difference(found[name], to_host(array)).sqnr_db for name, array in expected.items()]
        assert all(least < error_db < most for error_db in errors), (budget, errors)


@each_variant
def test_a_program_for_torch_tensorrt_equals_torch(variant: str, tmp_path: Path) -> None:
    model = model_of(variant)
    program = torch.export.load(export_program(model, STEP, tmp_path)).module()
    for budget in model.spec.budgets:
        inputs = inputs_of(model, STEP, 2, budget.kept)
        tensors = [torch.from_numpy(inputs[tensor.name]) for tensor in model.spec.graph(STEP).inputs]
        with torch.inference_mode():
            torch.testing.assert_close(program(*tensors)[0], model(*tensors), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- engines and trajectories


def test_profiles_cover_every_budget(built: Built, pipeline: Pipeline) -> None:
    assert pipeline.coverage.covered == model_of(built.variant).spec.budgets


def test_verify_passes_and_needs_no_checkpoint(built: Built) -> None:
    done = CliRunner().invoke(main, ["verify", str(built.bundle.folder), "--target", "cpu"])
    assert done.exit_code == 0, done.output
    assert "mixed" in done.output
    assert ("fused" in done.output) == (built.variant in WITH_FUSED)


def test_bench_has_a_row_for_each_budget_that_has_a_name(built: Built) -> None:
    arguments = ["--target", "cpu", "--rows", "2", "--rounds", "1", "--no-sampling", "--json", "-"]
    done = CliRunner().invoke(main, ["bench", "engines", str(built.bundle.folder), *arguments])
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)["budgets"]
    assert [row["name"] for row in rows] == list(model_of(built.variant).spec.named_budgets)


CHOICES: dict[str, dict[str, Any]] = {
    "every budget in turn": {"schedule": "0-1:{least},2-3:half,4-5:full"},
    "guided cheaply": {"guidance": "ccfg:2@{least}", "sampler": "heun"},
    "cached": {"cache": "static:every@2", "schedule": "0-3:half,4-5:full"},
    "cached by time": {"cache": "static:time@0.2"},
}


@pytest.mark.parametrize("choice", list(CHOICES))
def test_trajectories_equal_those_of_torch(built: Built, pipeline: Pipeline, choice: str) -> None:
    model = model_of(built.variant)
    least = model.spec.budgets[0]
    choices: Any = {name: text.format(least=least) for name, text in CHOICES[choice].items()}
    given = {"labels": [0, 1, 2], "steps": 6, "seed": 1}
    found = pipeline.sample(**given, **choices).latents
    expected = torch_pipeline(model).sample(**given, **choices).latents
    assert max_relative(found, expected) <= 1e-4


def test_teacache_works_once_calibrated(built: Built, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(built.bundle.folder, tmp_path / "bundle"))
    arguments = ["calibrate", "cache", str(folder), "--target", "cpu", "--images", "4", "--steps", "6"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    choices: Any = {"steps": 6, "cache": "teacache:1e9", "sampler": "euler", "schedule": "0-2:half,3-5:full"}
    torch_bank = torch_pipeline(model_of(built.variant)).bank
    with Pipeline.load(folder, target="cpu") as pipeline:
        found = pipeline.sample([0, 1, 2], **choices)
        reference = Pipeline(torch_bank, pipeline.spec, pipeline.data, fits=pipeline.coverage.fits)
        expected = reference.sample([0, 1, 2], **choices)
    assert [call.reused for call in found.calls] == [call.reused for call in expected.calls]
    assert any(call.reused for call in found.calls)
    assert max_relative(found.latents, expected.latents) <= 1e-4


@pytest.mark.skipif(not has("openvino") or not computes_bf16(), reason="needs openvino on a CPU with bf16")
def test_openvino_engines_pass_and_are_rounded(built: Built, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(built.bundle.folder, tmp_path / "bundle"))
    plan_set = compile_bundle(built.recipe, "ov", out=folder).manifest.plan_sets[-1]
    assert all(facts.parity.status == "passed" for facts in plan_set.profiles)
    given: Any = {"labels": [0, 1], "steps": 4}
    with Pipeline.load(folder, target="cpu") as exact, Pipeline.load(folder, target="ov") as half:
        found = difference(half.sample(**given).latents, exact.sample(**given).latents)
    assert 30 < found.sqnr_db < 80


@pytest.mark.skipif(not has("tensorrt_rtx"), reason="needs tensorrt-rtx")
def test_tensorrt_for_rtx_builds_plans_that_are_not_run(built: Built, tmp_path: Path) -> None:
    bundle = compile_bundle(built.recipe, "rtx", out=tmp_path / "bundle")
    (plan_set,) = bundle.manifest.plan_sets
    assert all(facts.parity.status == "not run" for facts in plan_set.profiles)
    assert set(plan_set.cache) == set(CACHE_GRAPHS)
    assert all(bundle.verified(plan.artifact) for plan in plan_set.plans)


def modules_in_8_bits(graph: Path) -> set[str]:
    """The modules whose products read what was dequantized."""
    nodes = onnx.load(graph, load_external_data=False).graph.node
    made_by = {name: node.op_type for node in nodes for name in node.output}
    found = [node for node in nodes if "DequantizeLinear" in [made_by.get(name) for name in node.input]]
    return {node.name.rpartition("/")[0] for node in found}


@pytest.mark.skipif(not has("modelopt"), reason="needs nvidia-modelopt")
def test_a_graph_in_int8_is_quantized_in_every_kind_of_layer(built: Built, pipeline: Pipeline, tmp_path: Path) -> None:
    """Joins, and what merges and splits, too; on ONNX Runtime, as TensorRT's plans cannot run here."""
    recipe = SampleRecipe(images=3, steps=6, sampler="euler", guidance=("none",), samples=64, seed=4, rows=3)
    found = select_samples(list(recorded_rows(pipeline, recipe)), pipeline, recipe, "0" * 64).samples
    graph = built.bundle.manifest.graphs["step-fp32"]
    source = built.bundle.verified(graph.artifact) / graph.file
    layers = [name for name, count in layer_flops(pipeline.spec, pipeline.spec.full).items() if count]
    wanted = [name for name in layers if name != PRODUCTS]
    assert ("joins" in wanted) == (built.variant == "ELIT-U-ViT")
    assert ("merging" in wanted) == (built.variant == "ELIT-HDiT")
    rounded = quantized_graph(source, tmp_path, Precision.INT8, found, pipeline.spec, wanted)
    in_8_bits = modules_in_8_bits(rounded)
    assert in_8_bits == {layer.path for layer in layers_of(pipeline.spec) if layer.group in wanted}
    assert ("core_joins.0.linear" in in_8_bits) == (built.variant == "ELIT-U-ViT")
    assert ({"merge.linear", "split.linear"} <= in_8_bits) == (built.variant == "ELIT-HDiT")
    rows = {budget.kept: inputs_of(model_of(built.variant), STEP, 4, budget.kept) for budget in pipeline.spec.budgets}
    exact, eight_bits = outputs_of(source, rows), outputs_of(rounded, rows)
    for kept in rows:
        assert 15 < difference(eight_bits[kept]["velocity"], exact[kept]["velocity"]).sqnr_db < 60


# ---------------------------------------------------------------- training, checkpoints


@each_variant
def test_training_lowers_the_loss_and_every_budget_works(variant: str, tmp_path: Path) -> None:
    images = load_images(FASHION, split="train", size=32)
    size = {"input_size": 32, "in_channels": 1, "patch_size": 4, "num_classes": 10}
    spec = tiny_spec(**VARIANTS[variant] | size)
    config = TrainConfig(
        steps=30,
        batch_size=16,
        learning_rate=1e-2,
        warmup_steps=3,
        ema_decay=0.9,
        label_dropout=0.1,
        min_kept=1,
        full_share=0.25,
        seed=0,
    )
    trainer = Trainer(spec, PIXELS, images, config)
    records = list(trainer.run())
    losses = [record.loss for record in records]
    assert np.mean(losses[-5:]) < 0.75 * np.mean(losses[:5])
    runnable = {budget.kept for budget in spec.budgets}
    assert {record.kept for record in records} <= runnable
    assert len({record.kept for record in records}) > 1
    path = tmp_path / "trained.safetensors"
    save_checkpoint(path, trainer.ema)
    errors = list(held_out_errors(load_checkpoint(path), images, seed=0))
    assert [error.budget for error in errors] == list(reversed(spec.budgets))
    assert all(error.mse < losses[0] for error in errors)


def test_a_least_number_of_latents_that_the_backbone_cannot_keep_is_refused(tmp_path: Path) -> None:
    options = ["--backbone", "ELIT-HDiT", "--split", "1-3-1", "--patch", "4", "--size", "32", "--width", "16"]
    options += ["--heads", "2", "--batch-size", "8", "--min-kept", "6"]
    done = CliRunner().invoke(main, ["train", str(FASHION), "--out", str(tmp_path), *options])
    assert done.exit_code == 2
    assert "--min-kept 6: this model runs 4of16, 8of16" in " ".join(done.output.split())


def test_the_command_trains_any_backbone(tmp_path: Path) -> None:
    small = ["--size", "32", "--patch", "4", "--width", "16", "--heads", "2", "--batch-size", "8", "--steps", "2"]
    done = CliRunner().invoke(
        main,
        ["train", str(FASHION), "--out", str(tmp_path), "--backbone", "ELIT-HDiT", "--split", "1-4-1", *small],
    )
    assert done.exit_code == 0, done.output
    spec = load_checkpoint(tmp_path / "model.safetensors").spec
    assert (spec.backbone, spec.merge, spec.coarse_depth) == ("ELIT-HDiT", 4, 4)
    options = ["--backbone", "ELIT-U-ViT", "--split", "1-2-2"]
    done = CliRunner().invoke(main, ["train", str(FASHION), "--out", str(tmp_path / "other"), *options, *small])
    assert done.exit_code == 2
    assert "head_depth 1 and tail_depth 2 must be equal" in " ".join(done.output.split())


@each_variant
def test_a_checkpoint_comes_back_as_it_was(variant: str, tmp_path: Path) -> None:
    model, path = model_of(variant), tmp_path / "model.safetensors"
    save_checkpoint(path, model)
    loaded = load_checkpoint(path)
    assert type(loaded) is type(model)
    assert loaded.spec == model.spec
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_checkpoint_of_another_backbone_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    model = tiny_model(**VARIANTS["ELIT-U-ViT"])
    save_checkpoint(path, model)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"ELIT-U-ViT", b"ELIT-Mamba"))
    with pytest.raises(CheckpointError, match="unknown backbone 'ELIT-Mamba'; known: ELIT-SiT"):
        load_checkpoint(path)
    path.write_bytes(content.replace(b"ELIT-U-ViT", b"ELIT-SiT  "))
    with pytest.raises(CheckpointError, match="unknown backbone 'ELIT-SiT  '"):
        load_checkpoint(path)


# ---------------------------------------------------------------- what cannot run


def hdit_recipe(folder: Path, latents: dict[str, int]) -> Recipe:
    save_checkpoint(folder / "model.safetensors", model_of("ELIT-HDiT"))
    values: Any = recipe_values(folder / "model.safetensors") | {"profiles": [{"name": "low", "latents": latents}]}
    return recipe_from_values(values, "test")


@pytest.mark.parametrize("name", ["min", "opt", "max"])
def test_a_profile_of_budgets_that_the_backbone_cannot_run_is_refused(name: str, tmp_path: Path) -> None:
    wrong = {"min": 4, "opt": 8, "max": 12} | {name: {"min": 2, "opt": 6, "max": 14}[name]}
    with pytest.raises(RecipeError, match=rf"profiles\.0\.latents\.{name} is {wrong[name]}, .* runs 4of16, 8of16"):
        compile_bundle(hdit_recipe(tmp_path, wrong), "cpu", out=tmp_path / "bundle")


def test_a_bundle_refuses_budgets_that_the_backbone_cannot_run(tmp_path: Path) -> None:
    bundle = compile_bundle(hdit_recipe(tmp_path, {"min": 4, "opt": 8, "max": 16}), "cpu", out=tmp_path / "bundle")
    with Pipeline.load(bundle.folder) as pipeline:
        assert pipeline.coverage.covered == pipeline.spec.budgets
        with pytest.raises(InputError, match="cannot run budget 6of16; it runs 4of16, 8of16, 12of16, 16of16"):
            pipeline.sample([0], schedule="6")
        with pytest.raises(InputError, match="6of16"):
            pipeline.bank.slot_for(Budget(6, 16), 1)

"""A model that takes text in 8 bits: samples of prompts, the quantized graph, builds, the sensitivity of layers."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result

from elit_export import Pipeline, compile_bundle
from elit_export.bundle.calibration_inputs import CalibrationInputs, load_inputs, save_inputs
from elit_export.bundle.reading import MANIFEST, Bundle
from elit_export.bundle.recipe import Recipe
from elit_export.calibrate import sensitivity
from elit_export.calibrate.inputs import SampleRecipe, SelectedSamples, recorded_rows, select_samples
from elit_export.calibrate.sensitivity import flops_share, sensitivity_count
from elit_export.checkpoints.native import save_checkpoint
from elit_export.cli import main
from elit_export.cli.calibrate import stored_graph
from elit_export.compiler.build import NOTHING_CHANGED
from elit_export.cost.flops import layer_flops
from elit_export.cost.layers import layers_of, modules_kept_exact
from elit_export.errors import CalibrationError, InputError
from elit_export.graphs.quantize import LAYERS_IN, LINEAR, PRODUCTS
from elit_export.runtime.prompts import Embedded, Prompts
from elit_export.spec import Precision
from elit_export.text.files import save_prompts
from tests.conftest import recipe_values
from tests.test_text_models import embedded, recipe_of
from tests.text_models import text_model

PROMPTS = Prompts(embedded([5, 3, 7], 7), embedded([2, 4, 1], 4, seed=1))
SMALL = SampleRecipe(
    images=3, steps=8, sampler="euler", guidance=("none", "cfg:3"), budgets=(16, 8, 4, 1), samples=96, seed=4, rows=2
)


def recipe(checkpoint: Path) -> Recipe:
    """One plan of `step` in int8, and the engines that samples are taken with."""
    targets: Any = recipe_values(checkpoint)["targets"]
    rtx = {"backend": "tensorrt-rtx", "precision": "int8", "compute_capabilities": ["8.9"], "layout": "multi-profile"}
    return recipe_of(checkpoint, targets={**targets, "rtx": rtx})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.safetensors"
    save_checkpoint(path, text_model())
    return path


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Bundle:
    """Do not change it: copy it first."""
    return compile_bundle(recipe(checkpoint), "cpu", out=checkpoint.parent / "bundle")


@pytest.fixture(scope="module")
def pipeline(bundle: Bundle) -> Iterator[Pipeline]:
    with Pipeline.load(bundle.folder) as opened:
        yield opened


@pytest.fixture(scope="module")
def small(pipeline: Pipeline, bundle: Bundle) -> SelectedSamples:
    return sampled(pipeline, PROMPTS, bundle.manifest.model.checkpoint_sha256)


@pytest.fixture(scope="module")
def samples_file(small: SelectedSamples, checkpoint: Path) -> Path:
    save_inputs(small.samples, checkpoint.parent / "samples.npz")
    return checkpoint.parent / "samples.npz"


@pytest.fixture(scope="module")
def prompts_file(checkpoint: Path) -> Path:
    save_prompts(checkpoint.parent / "prompts.npz", PROMPTS)
    return checkpoint.parent / "prompts.npz"


@pytest.fixture(scope="module")
def recipe_file(checkpoint: Path) -> Path:
    path, values = checkpoint.parent / "recipe.toml", json.loads(SMALL.model_dump_json())
    path.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items()))
    return path


def sampled(pipeline: Pipeline, prompts: Prompts, sha256: str = "a" * 64, **changes: Any) -> SelectedSamples:
    wanted = SMALL.model_copy(update=changes)
    return select_samples(list(recorded_rows(pipeline, wanted, prompts)), pipeline, wanted, sha256)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def refused(*arguments: str | Path) -> str:
    done = run(*arguments)
    assert done.exit_code == 2, done.output
    return " ".join(done.output.split())


def row_of(told: Embedded, image: int, longest: int) -> bytes:
    """Text of an image as samples keep it: filled up with nothing."""
    text = np.zeros((longest, told.text.shape[2]), np.float32)
    length = int(told.mask[image].sum())
    text[:length] = told.text[image, :length]
    return text.tobytes()


# ---------------------------------------------------------------- samples


def test_samples_show_every_prompt_and_the_negative_ones_where_guidance_asks(small: SelectedSamples) -> None:
    negative = PROMPTS.negative
    assert negative
    texts, masks = (small.samples.conditioning[name] for name in ("text", "text_mask"))
    assert (texts.shape, masks.shape) == ((96, 7, 24), (96, 7))
    assert (texts.dtype, masks.dtype) == (np.float32, np.int64)
    known = {row_of(PROMPTS.positive, image, 7): (False, image) for image in range(3)}
    known |= {row_of(negative, image, 7): (True, image) for image in range(3)}
    found = [known[text.tobytes()] for text in texts]
    assert set(found) == set(known.values())
    assert [is_negative for is_negative, _ in found] == small.null.tolist()
    lengths = [(negative if is_negative else PROMPTS.positive).mask[image].sum() for is_negative, image in found]
    assert masks.sum(axis=1).tolist() == lengths
    assert not (small.null & ~small.guided).any()
    for kept in (16, 8, 4, 1):
        here = small.samples.kept == kept
        assert here.sum() == 24
        assert 4 <= (here & small.null).sum() < (here & small.guided).sum()


def test_without_negative_prompts_there_is_no_guidance_that_needs_them(pipeline: Pipeline) -> None:
    alone = Prompts(PROMPTS.positive)
    assert not sampled(pipeline, alone, guidance=("none", "autoguidance:2@1")).null.any()
    with pytest.raises(InputError, match="guidance cfg:3: it needs negative prompts, and there are none"):
        next(recorded_rows(pipeline, SMALL, alone))


def test_the_negative_rows_of_a_weak_branch_alone_are_told(pipeline: Pipeline) -> None:
    found = sampled(pipeline, PROMPTS, budgets=(16,), guidance=("ccfg:2@1",), images=12, sampler="heun")
    assert np.array_equal(found.null, found.samples.kept == 1)


def test_what_padding_holds_does_not_reach_the_samples(pipeline: Pipeline, small: SelectedSamples) -> None:
    text, mask = PROMPTS.positive.text.copy(), PROMPTS.positive.mask
    text[mask == 0] = np.nan
    assert sampled(pipeline, Prompts(Embedded(text, mask), PROMPTS.negative)).samples.sha256 == small.samples.sha256


def test_the_command_writes_samples_that_load(
    bundle: Bundle, prompts_file: Path, recipe_file: Path, tmp_path: Path
) -> None:
    out, facts = tmp_path / "samples.npz", tmp_path / "facts.json"
    places = ("--prompts", prompts_file, "--recipe", recipe_file, "--out", out, "--json", facts)
    done = run("calibrate", "samples", bundle.folder, *places)
    assert done.exit_code == 0, done.output
    for words in ("of these negative", "prompts", "96 samples"):
        assert words in done.output
    model = bundle.manifest.model
    said = json.loads(facts.read_text())
    assert said["sha256"] == load_inputs(out, model.spec, model.checkpoint_sha256).sha256
    assert {budget["subjects"] for budget in said["budgets"]} == {3}


REFUSED: dict[str, tuple[Prompts | None, str]] = {
    "none": (None, "--prompts is missing, this model takes text; write some with elit-export embed FOLDER"),
    "too wide": (
        Prompts(Embedded(np.zeros((1, 3, 32)), np.ones((1, 3), int))),
        "(1, 3, 32), must be (images, tokens, 24)",
    ),
    "too long": (Prompts(embedded([10], 10), embedded([2], 2)), "prompts of 10 tokens: profile "),
    "no negative": (Prompts(embedded([5], 5)), "guidance cfg:3: it needs negative prompts"),
}


@pytest.mark.parametrize("what", list(REFUSED))
def test_prompts_that_do_not_fit_are_refused(bundle: Bundle, recipe_file: Path, tmp_path: Path, what: str) -> None:
    prompts, told = REFUSED[what]
    if prompts:
        save_prompts(tmp_path / "p.npz", prompts)
    given = ["--recipe", recipe_file, *(["--prompts", tmp_path / "p.npz"] if prompts else [])]
    assert told in refused("calibrate", "samples", bundle.folder, *given, "--out", tmp_path / "s.npz")
    assert not (tmp_path / "s.npz").exists()


@pytest.mark.parametrize("command", [("samples", "--out"), ("sensitivity", "--precision", "int8", "--samples")])
def test_a_model_of_classes_takes_no_prompts(
    tiny_bundle: Bundle, prompts_file: Path, tmp_path: Path, command: tuple[str, ...]
) -> None:
    said = refused("calibrate", command[0], tiny_bundle.folder, "--prompts", prompts_file, *command[1:], tmp_path / "s")
    assert "this model takes no text, it draws classes; leave --prompts out" in said


def test_neither_takes_the_other_from_python(pipeline: Pipeline, tiny_bundle: Bundle) -> None:
    with pytest.raises(InputError, match="this model takes prompts, not"):
        next(recorded_rows(pipeline, SMALL))
    with (
        Pipeline.load(tiny_bundle.folder) as other,
        pytest.raises(InputError, match="takes labels 0 to 3, not prompts"),
    ):
        next(recorded_rows(other, SMALL.model_copy(update={"budgets": (), "images": 8}), PROMPTS))


# ---------------------------------------------------------------- files of them


def with_text(change: Callable[[Any, Any], tuple[Any, Any]]) -> Callable[[CalibrationInputs], CalibrationInputs]:
    def changed(samples: CalibrationInputs) -> CalibrationInputs:
        text, mask = change(*(samples.conditioning[name].copy() for name in ("text", "text_mask")))
        return replace(samples, conditioning={"text": text, "text_mask": mask})

    return changed


def with_nan(text: Any, mask: Any) -> tuple[Any, Any]:
    text[5, 0, 0] = np.nan
    return text, mask


def of_classes(samples: CalibrationInputs) -> CalibrationInputs:
    return replace(samples, conditioning={"y": np.zeros(len(samples), np.int64)})


def of_another_checkpoint(samples: CalibrationInputs) -> CalibrationInputs:
    return replace(samples, facts=samples.facts.model_copy(update={"checkpoint_sha256": "b" * 64}))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (with_text(with_nan), "text of sample 5 holds values that are not finite"),
        (with_text(lambda text, mask: (text, 2 * mask)), "text_mask runs from 0 to 2, in this model from 0 to 1"),
        (with_text(lambda text, mask: (text, mask[:, 1:])), r"text_mask is int64 \(96, 6\), .* int64 \(96, 7\)"),
        (with_text(lambda text, mask: (text[:, :, 1:], mask)), r"text is float32 \(96, 7, 23\), .* \(96, 7, 24\)"),
        (with_text(lambda text, mask: (text[:, :0], mask[:, :0])), "text of 0 tokens, .* positions for 1024"),
        (of_classes, "conditioned by y, this model by text, text_mask"),
        (of_another_checkpoint, "samples of another checkpoint"),
    ],
)
def test_unfit_samples_are_refused_before_anything_is_built(
    checkpoint: Path,
    small: SelectedSamples,
    tmp_path: Path,
    change: Callable[[CalibrationInputs], CalibrationInputs],
    problem: str,
) -> None:
    pytest.importorskip("modelopt.onnx.quantization", reason="needs the extra quantize")
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx")
    path = tmp_path / "bad.npz"
    save_inputs(change(small.samples), path)
    remedy = f"elit-export calibrate samples BUNDLE --prompts FILE.npz --out {path}"
    with pytest.raises(CalibrationError, match=f"{problem}.*{remedy}"):
        compile_bundle(recipe(checkpoint), "rtx", out=tmp_path / "bundle", samples=path)
    assert not (tmp_path / "bundle" / MANIFEST).exists()


# ---------------------------------------------------------------- the graph


def products(bundle: Bundle) -> list[str]:
    graph = onnx.load(stored_graph(bundle), load_external_data=False).graph
    return [node.name.rpartition("/")[0] for node in graph.node if node.op_type == "MatMul"]


def groups_of(bundle: Bundle, product: str) -> list[str]:
    """The kinds of layers that a product counts as; one that stays in floating point has none."""
    return [layer.group for layer in layers_of(bundle.manifest.model.spec) if layer.path == product and layer.group]


def products_of(bundle: Bundle, groups: Sequence[str]) -> list[str]:
    return [name for name in products(bundle) for group in groups_of(bundle, name) if group in groups]


def test_every_product_of_both_streams_belongs_to_one_kind_of_layer(bundle: Bundle) -> None:
    kinds = {name: groups_of(bundle, name) for name in products(bundle)}
    assert {name for name, found in kinds.items() if not found} == {"img_in", "txt_in", "final.linear"}
    assert max(map(len, kinds.values())) == 1
    assert kinds["core.1.text.attn.k"] == ["core attention"]
    assert kinds["head.0.image.mlp.fc2"] == ["head MLP"]
    assert kinds["tail.0"] == kinds["read"] == [PRODUCTS]
    count = layer_flops(bundle.manifest.model.spec, bundle.manifest.model.spec.full, text=7)
    assert {layer for layer, flops in count.items() if flops} == {layer for found in kinds.values() for layer in found}


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt-rtx")
def test_an_int8_plan_is_built_of_a_graph_that_keeps_its_decibels(
    bundle: Bundle, checkpoint: Path, samples_file: Path, small: SelectedSamples, tmp_path: Path
) -> None:
    """Compared with PyTorch by ONNX Runtime; the plan is for a GPU that is not here."""
    pytest.importorskip("modelopt.onnx.quantization", reason="needs the extra quantize")
    folder = Path(shutil.copytree(bundle.folder, tmp_path / "bundle"))
    made = compile_bundle(recipe(checkpoint), "rtx", out=folder, samples=samples_file)
    (plan_set,) = (one for one in made.manifest.plan_sets if one.target == "rtx")
    graph = made.manifest.graphs[plan_set.graph]
    assert graph.sqnr_db is not None
    assert 25 <= graph.sqnr_db < 60  # measured: 34
    assert plan_set.samples == small.samples.facts
    assert plan_set.accepted is None
    assert {facts.parity.status for facts in plan_set.profiles} == {"not run"}
    assert all(made.verified(facts.plan.artifact) for facts in plan_set.profiles)
    nodes = list(onnx.load(made.verified(graph.artifact) / graph.file, load_external_data=False).graph.node)
    made_by = {name: node.op_type for node in nodes for name in node.output}
    rounded = {node.name for node in nodes if "DequantizeLinear" in [made_by.get(name) for name in node.input]}
    wanted = products_of(bundle, LAYERS_IN[Precision.INT8])
    assert sorted(name.rpartition("/")[0] for name in rounded) == sorted(wanted)
    stages: list[str] = []
    compile_bundle(
        recipe(checkpoint), "rtx", out=folder, samples=samples_file, progress=lambda stage, _: stages.append(stage)
    )
    assert stages == [NOTHING_CHANGED]


def test_openvino_rounds_the_same_linear_layers_and_the_tails(bundle: Bundle, small: SelectedSamples) -> None:
    """Embedders of image and text stay out, as those of models of classes do."""
    ov = pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    from elit_export.backends.openvino import build

    kept_exact = modules_kept_exact(bundle.manifest.model.spec)
    model = build._quantized(ov.Core().read_model(stored_graph(bundle)), small.samples, kept_exact)
    rounded = set()
    for node in model.get_ordered_ops():
        sources = [node.input_value(index).get_node().get_type_name() for index in range(node.get_input_size())]
        if node.get_type_name() == "MatMul" and sources == ["FakeQuantize", "Multiply"]:  # a weight behind its scale
            rounded.add(node.get_friendly_name().rpartition("/")[0])
    assert rounded == set(products_of(bundle, LINEAR))


def test_what_openvino_keeps_exact_has_no_products_that_it_rounds(bundle: Bundle) -> None:
    """A module kept exact is kept with all its products, those of attention among them."""
    spec = bundle.manifest.model.spec
    rounded = {layer.path for layer in layers_of(spec) if layer.group}
    assert {"read", "write", "core.0"} <= rounded
    assert not rounded & set(modules_kept_exact(spec))


def test_a_build_without_samples_says_that_they_need_prompts(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("modelopt.onnx.quantization", reason="needs the extra quantize")
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx")
    told = rf"elit-export calibrate samples {tmp_path / 'b'} --prompts FILE\.npz --out samples\.npz"
    with pytest.raises(CalibrationError, match=told):
        compile_bundle(recipe(checkpoint), "rtx", out=tmp_path / "b")


# ---------------------------------------------------------------- sensitivity


def test_sensitivity_tells_what_each_kind_of_layer_costs(
    bundle: Bundle, samples_file: Path, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two kinds here; the whole table is a test of models of classes."""
    pytest.importorskip("modelopt.onnx.quantization", reason="needs the extra quantize")
    facts, spec = tmp_path / "facts.json", bundle.manifest.model.spec
    assert sensitivity_count(spec) == 10
    monkeypatch.setattr(sensitivity, "_layer_kinds", lambda _: ["core attention", "Write"])
    command = ("calibrate", "sensitivity", bundle.folder, "--samples", samples_file, "--precision", "int8")
    assert "--prompts is missing, this model takes text" in refused(*command)
    done = run(*command, "--prompts", prompts_file, "--json", facts)
    assert done.exit_code == 0, done.output
    rows = {row["layers"]: row for row in json.loads(facts.read_text())["rows"]}
    assert list(rows) == ["core attention", "Write", "all as built"]
    for row in rows.values():
        assert set(row["velocity_db"]) == {"1", "4", "8", "16"}
        assert all(25 < db < 90 for db in row["velocity_db"].values())
    shares = rows["all as built"]["flops_share"]
    for kept in (1, 16):
        expected = flops_share(spec, kept, LAYERS_IN[Precision.INT8], text=7)  # the longest of the prompts
        assert shares[str(kept)] == pytest.approx(expected)

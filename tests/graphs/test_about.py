"""What exported ONNX files say of themselves."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest
from click.testing import CliRunner

from elit_export import compile_bundle
from elit_export.bundle.manifest import Graph
from elit_export.bundle.reading import Bundle
from elit_export.checkpoints.native import checkpoint_sha256
from elit_export.cli import main
from elit_export.compiler.build import NOTHING_CHANGED
from elit_export.graphs.about import MEANINGS, NEXT, Origin, describe, meaning_of
from elit_export.spec import SD_VAE, STEP, DecoderSpec, Precision
from elit_export.spec.graphs import MODEL_GRAPHS
from tests.conftest import fused_recipe
from tests.helpers import tiny_spec
from tests.text_models import text_spec

DECODER = DecoderSpec(channels=4, image_channels=3, scale=(1.0,) * 4, shift=(0.0,) * 4, factor=8, side=8)


def path_of(bundle: Bundle, graph: Graph) -> Path:
    return bundle.verified(graph.artifact) / graph.file


def test_every_graph_of_a_bundle_says_what_it_is(fused_bundle: Bundle) -> None:
    """As ONNX Runtime shows it; the doc strings of inputs and outputs, as a viewer does."""
    manifest = fused_bundle.manifest
    assert {graph.graph for graph in manifest.graphs.values()} == set(MODEL_GRAPHS)
    for graph in manifest.graphs.values():
        model = onnx.load(path_of(fused_bundle, graph), load_external_data=False)
        told = {entry.key: entry.value for entry in model.metadata_props}
        assert told["elit_export.model"] == manifest.model.name
        assert told["elit_export.checkpoint_sha256"] == manifest.model.checkpoint_sha256
        assert told["elit_export.version"] == model.producer_version == version("elit-export")
        assert (told["elit_export.graph"], told["elit_export.precision"]) == (graph.graph, "fp32")
        assert manifest.model.checkpoint_sha256 in model.doc_string
        assert all(value.doc_string == meaning_of(value.name) for value in (*model.graph.input, *model.graph.output))
    step = next(graph for graph in manifest.graphs.values() if graph.graph == STEP)
    shown = ort.InferenceSession(path_of(fused_bundle, step)).get_modelmeta()
    assert shown.description.startswith("Graph `step` of the ELIT model test, fp32, checkpoint sha256 ")
    assert shown.custom_metadata_map["elit_export.input.x"] == "float32[rows, 1, 8, 8]: noisy samples"
    assert "its length K is the budget" in shown.custom_metadata_map["elit_export.input.latents"]


def test_every_input_and_output_has_a_meaning_and_no_other_word_has() -> None:
    specs = [spec.graph(name) for spec in (tiny_spec(), text_spec()) for name in MODEL_GRAPHS]
    names = {tensor.name for graph in (*specs, DECODER.graph) for tensor in (*graph.inputs, *graph.outputs)}
    assert all(meaning_of(name) for name in names)
    assert {name for name in names if not name.endswith(NEXT)} == set(MEANINGS)


def test_export_describes_its_graph(tiny_checkpoint: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["export", str(tiny_checkpoint), "--out", str(tmp_path)])
    assert done.exit_code == 0
    told = ort.InferenceSession(tmp_path / "step.onnx").get_modelmeta().custom_metadata_map
    assert told["elit_export.model"] == "tiny"
    assert told["elit_export.checkpoint_sha256"] == checkpoint_sha256(tiny_checkpoint)


def test_describing_changes_no_weight_and_can_be_repeated(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """The same words give the same bytes, so that plans stay fresh; others replace them."""
    graph = tiny_bundle.manifest.graphs[tiny_bundle.manifest.plan_sets[0].graph]
    source, path = path_of(tiny_bundle, graph), tmp_path / "step.onnx"
    facts, spec = tiny_bundle.manifest.model, tiny_bundle.manifest.model.spec.graph(STEP)
    path.write_bytes(source.read_bytes())
    describe(path, spec, Origin(facts.name, facts.checkpoint_sha256), Precision.FP32)
    assert path.read_bytes() == source.read_bytes()
    describe(path, spec, Origin("other", "0" * 64), Precision.FP32)
    other, model = (onnx.load(each, load_external_data=False) for each in (path, source))
    assert len(other.metadata_props) == len(model.metadata_props)
    assert {entry.key: entry.value for entry in other.metadata_props}["elit_export.model"] == "other"
    assert other.graph == model.graph
    assert not (tmp_path / "step.onnx.data").exists()


def test_a_later_version_of_the_package_remakes_no_graph(
    fused_bundle: Bundle, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What made a graph is no part of its key: its own code is."""
    monkeypatch.setattr("elit_export.graphs.about.version", lambda _: "99.0")
    before = hashlib.sha256((fused_bundle.folder / "manifest.json").read_bytes()).hexdigest()
    said: list[str] = []
    compile_bundle(
        fused_recipe(tiny_checkpoint), "cpu", out=fused_bundle.folder, progress=lambda stage, _: said.append(stage)
    )
    assert said == [NOTHING_CHANGED]
    assert hashlib.sha256((fused_bundle.folder / "manifest.json").read_bytes()).hexdigest() == before


def test_a_decoder_says_which_class_it_is_of(tiny_bundle: Bundle, tmp_path: Path) -> None:
    assert SD_VAE.kind == "vae"
    path = tmp_path / "decode.onnx"
    value = onnx.helper.make_tensor_value_info
    shape, made = ["rows", 4, 8, 8], ["rows", 3, 64, 64]
    node = onnx.helper.make_node("Identity", ["z"], ["pixels"])
    inputs, outputs = value("z", 1, shape), value("pixels", 1, made)
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "decode", [inputs], [outputs])), path)
    describe(path, DECODER.graph, Origin("AutoencoderKL", "1" * 64), Precision.FP32)
    told = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert told["elit_export.model"] == "AutoencoderKL"
    assert told["elit_export.output.pixels"] == "float32[rows, 3, 64, 64]: pictures with values in -1..1"

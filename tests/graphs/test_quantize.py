"""Graphs in 8 bits: which products, which scales, how far from float32; plans of them; the sensitivity of layers."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from click.testing import CliRunner, Result
from onnx import TensorProto, numpy_helper

from elit_export import Pipeline, compile_bundle
from elit_export.backends.onnxruntime.engine import OnnxRuntimeEngine
from elit_export.backends.protocols import GraphFile
from elit_export.backends.tensorrt.options import TensorRTTarget
from elit_export.bundle.calibration_inputs import CalibrationInputs, save_inputs
from elit_export.bundle.reading import Bundle
from elit_export.bundle.recipe import shipped_recipe
from elit_export.calibrate.inputs import SampleRecipe, recorded_rows, select_samples
from elit_export.calibrate.sensitivity import (
    AS_BUILT,
    flops_share,
    held_out_rows,
    outputs_of,
    sensitivities,
    sensitivity_count,
)
from elit_export.cli import main
from elit_export.cli.calibrate import stored_graph
from elit_export.cost.flops import layer_flops
from elit_export.cost.layers import GROUPS, PRODUCTS
from elit_export.errors import BackendUnavailable, BundleError, CalibrationError, pip_install
from elit_export.graphs import quantize
from elit_export.graphs.check import check_graph
from elit_export.graphs.export import export_graph
from elit_export.graphs.quantize import LAYERS_IN, LINEAR, quantized_graph
from elit_export.models.elit import Elit
from elit_export.spec import QUANTIZED, STEP, ModelSpec, Precision, Range, default_profiles
from elit_export.verify.metrics import difference
from elit_export.verify.reference import torch_pipeline
from tests.helpers import VARIANTS, tiny_model, tiny_spec

pytest.importorskip("modelopt.onnx.quantization", reason="needs the extra quantize")

LEAST_DB = {Precision.INT8: 30, Precision.FP8: 25}  # of every profile, for the shipped model
EIGHT_BITS = {Precision.INT8: TensorProto.INT8, Precision.FP8: TensorProto.FLOAT8E4M3FN}
SMALL = SampleRecipe(images=2, steps=10, sampler="euler", guidance=("none", "cfg:2"), samples=128, seed=3, rows=2)


def samples_of(bundle: Bundle, recipe: SampleRecipe) -> CalibrationInputs:
    with Pipeline.load(bundle.folder) as pipeline:
        parts = list(recorded_rows(pipeline, recipe))
        return select_samples(parts, pipeline, recipe, bundle.manifest.model.checkpoint_sha256).samples


@pytest.fixture(scope="module")
def samples(fashion_bundle: Bundle) -> CalibrationInputs:
    return samples_of(fashion_bundle, SMALL)


@pytest.fixture(scope="module")
def graphs(
    fashion_bundle: Bundle, samples: CalibrationInputs, tmp_path_factory: pytest.TempPathFactory
) -> dict[Precision, Path]:
    """The shipped model in 8 bits. Do not change it."""
    source, spec = stored_graph(fashion_bundle), fashion_bundle.manifest.model.spec
    before = contents(source.parent)
    made = {
        precision: quantized_graph(source, tmp_path_factory.mktemp(precision.value), precision, samples, spec)
        for precision in QUANTIZED
    }
    assert contents(source.parent) == before  # the library writes into what it reads
    return made


@pytest.fixture(scope="module")
def tiny_samples(tiny_bundle: Bundle) -> CalibrationInputs:
    return samples_of(tiny_bundle, SMALL.model_copy(update={"images": 4, "steps": 6}))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def nodes_of(path: Path) -> list[onnx.NodeProto]:
    return list(onnx.load(path, load_external_data=False).graph.node)


def products_in_8_bits(path: Path) -> set[str]:
    nodes = nodes_of(path)
    made = {name: node.op_type for node in nodes for name in node.output}
    return {node.name for node in nodes if any(made.get(name) == "DequantizeLinear" for name in node.input)}


IN_BLOCK = r"\d+(\.(text|image))?"  # blocks with streams have weights for each of them
# Kind of layer → the modules whose products it holds: what names of nodes must say, written down once more.
MODULES: dict[str, str] = {
    **{f"{part} attention": rf"{part}\.{IN_BLOCK}\.attn\.(qkv|q|k|v|proj)" for part in ("head", "core", "tail")},
    **{f"{part} MLP": rf"{part}\.{IN_BLOCK}\.mlp\.fc[12]" for part in ("head", "core", "tail")},
    "joins": r"(core|tail)_joins\.\d+\.linear",
    "merging": r"(merge|split)\.linear",
    **{part.title(): rf"{part}\.(attn\.(q_proj|kv_proj|proj)|mlp\.fc[12])" for part in ("read", "write")},
    PRODUCTS: r"(head|core|tail)\.\d+(\.attn)?|read|write",  # streams meet outside their own attention
}


def module_of(product: str) -> str:
    """`core.3.attn.qkv/MatMul_93` → `core.3.attn.qkv`"""
    return product.rpartition("/")[0]


def matmuls_of(path: Path) -> set[str]:
    return {node.name for node in nodes_of(path) if node.op_type == "MatMul"}


def products_of(path: Path, layers: Iterable[str]) -> set[str]:
    return {name for name in matmuls_of(path) for layer in layers if re.fullmatch(MODULES[layer], module_of(name))}


# ---------------------------------------------------------------- the graph

each_precision = pytest.mark.parametrize("precision", QUANTIZED)


@each_precision
def test_it_is_a_step_graph_like_the_one_it_was_made_from(
    graphs: dict[Precision, Path], fashion_bundle: Bundle, precision: Precision
) -> None:
    spec, path = fashion_bundle.manifest.model.spec, graphs[precision]
    check_graph(path, spec.graph(STEP), opset=20)
    assert set(contents(path.parent)) == {"step.onnx", "step.onnx.data"}
    half = stored_graph(fashion_bundle).with_name("step.onnx.data").stat().st_size * 0.6
    assert path.with_name("step.onnx.data").stat().st_size < half


@each_precision
def test_just_the_wanted_products_are_in_8_bits(
    graphs: dict[Precision, Path], fashion_bundle: Bundle, precision: Precision
) -> None:
    """And nothing else reads what is dequantized, such as the sums of Write."""
    found = products_in_8_bits(graphs[precision])
    assert found == products_of(stored_graph(fashion_bundle), LAYERS_IN[precision])
    assert len(found) == {Precision.INT8: 47, Precision.FP8: 49}[precision]
    kinds = Counter(node.op_type for node in nodes_of(graphs[precision]))
    kinds.subtract(Counter(node.op_type for node in nodes_of(stored_graph(fashion_bundle))))
    assert {kind: count for kind, count in kinds.items() if count} == {
        "QuantizeLinear": len(found),  # weights are stored in 8 bits
        "DequantizeLinear": 2 * len(found),
        "Cast": {Precision.INT8: 24 * 3 + 2 * 2, Precision.FP8: 24 * 3}[precision],
    }


@each_precision
def test_the_other_products_are_in_float16_and_the_final_layer_is_not(
    graphs: dict[Precision, Path], fashion_bundle: Bundle, precision: Precision
) -> None:
    model = onnx.load(graphs[precision])
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*inferred.value_info, *inferred.output)}
    halves = {node.name for node in model.graph.node if types.get(node.output[0]) == TensorProto.FLOAT16}
    every = products_of(stored_graph(fashion_bundle), GROUPS)
    assert {name for name in halves if "/MatMul" in name and "input" not in name and "output" not in name} == (
        every - products_in_8_bits(graphs[precision])
    )


@each_precision
def test_weights_have_a_scale_for_each_output(graphs: dict[Precision, Path], precision: Precision) -> None:
    model = onnx.load(graphs[precision])
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    found = [node for node in model.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in weights]
    for node in found:
        weight, scale = weights[node.input[0]], weights[node.input[1]]
        assert weight.data_type == EIGHT_BITS[precision]
        assert list(scale.dims) == [weight.dims[1]]
        assert not any(numpy_helper.to_array(weights[node.input[2]]).astype(np.float32))  # symmetric
    assert len(found) == len(products_in_8_bits(graphs[precision]))


def test_a_scale_is_the_maximum_over_all_samples(
    graphs: dict[Precision, Path], fashion_bundle: Bundle, samples: CalibrationInputs
) -> None:
    model = onnx.load(stored_graph(fashion_bundle))
    (product,) = [node for node in model.graph.node if node.name.startswith("core.3.attn.qkv/MatMul")]
    tensor = product.input[0]
    model.graph.output.add().name = tensor
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    largest = max(float(np.abs(session.run([tensor], inputs)[0]).max()) for inputs in samples.inputs())
    for precision, highest in ((Precision.INT8, 127), (Precision.FP8, 127**2 / 448)):  # of 448: the rest is room
        made = onnx.load(graphs[precision])
        (quantized,) = [
            node for node in made.graph.node if node.op_type == "QuantizeLinear" and node.input[0] == tensor
        ]
        scale = next(t for t in made.graph.initializer if t.name == quantized.input[1])
        assert float(numpy_helper.to_array(scale)) * highest == pytest.approx(largest, rel=1e-3)


@each_precision
def test_every_profile_of_the_shipped_model_keeps_its_decibels(
    graphs: dict[Precision, Path], fashion_bundle: Bundle, samples: CalibrationInputs, precision: Precision
) -> None:
    """On trajectories that nothing was calibrated on, at the least, best and most K of every profile."""
    model = fashion_bundle.manifest.model
    exact_graph = stored_graph(fashion_bundle)
    with OnnxRuntimeEngine(exact_graph, device="cpu", threads=2) as exact:
        rows = held_out_rows(exact, model.spec, model.data, samples)
    profiles = default_profiles(model.spec.latents, Range(1, 1, 1))
    assert set(rows) == {kept for profile in profiles for kept in profile.latents.corners()}
    expected, found = outputs_of(exact_graph, rows), outputs_of(graphs[precision], rows)
    for kept in rows:
        for name in ("velocity", "residual"):
            assert difference(found[kept][name], expected[kept][name]).sqnr_db >= LEAST_DB[precision], (kept, name)


def test_held_out_rows_are_of_other_images_at_the_same_times(
    fashion_bundle: Bundle, samples: CalibrationInputs
) -> None:
    model = fashion_bundle.manifest.model
    with OnnxRuntimeEngine(stored_graph(fashion_bundle), device="cpu", threads=2) as exact:
        rows = held_out_rows(exact, model.spec, model.data, samples)
    calibrated = {x.tobytes() for x in samples.x}
    for batch in rows.values():
        assert np.array_equal(batch["t"], rows[1]["t"])
        assert batch["t"].min() == np.float32(0.1)
        assert batch["t"].max() == 1
        assert not any(x.tobytes() in calibrated for x in batch["x"])
        assert model.spec.null_class in batch["y"].tolist()


def test_the_same_samples_give_the_same_graph(
    tiny_bundle: Bundle, tiny_samples: CalibrationInputs, tmp_path: Path
) -> None:
    source, spec = stored_graph(tiny_bundle), tiny_bundle.manifest.model.spec
    for name in ("a", "b"):
        quantized_graph(source, tmp_path / name, Precision.INT8, tiny_samples, spec)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_layers_may_be_chosen(tiny_bundle: Bundle, tiny_samples: CalibrationInputs, tmp_path: Path) -> None:
    source, spec = stored_graph(tiny_bundle), tiny_bundle.manifest.model.spec
    path = quantized_graph(source, tmp_path, Precision.FP8, tiny_samples, spec, ("core MLP", "Read"))
    assert products_in_8_bits(path) == products_of(source, ("core MLP", "Read"))
    assert len(products_in_8_bits(path)) == 2 * 2 + 4


def test_products_of_attention_may_be_chosen(
    fashion_bundle: Bundle, samples: CalibrationInputs, tmp_path: Path
) -> None:
    source, spec = stored_graph(fashion_bundle), fashion_bundle.manifest.model.spec
    path = quantized_graph(source, tmp_path, Precision.INT8, samples, spec, (PRODUCTS,))
    assert products_in_8_bits(path) == products_of(source, (PRODUCTS,))
    assert len(products_in_8_bits(path)) == 2 * 12


def test_kinds_of_layers_are_those_whose_cost_is_known(fashion_bundle: Bundle) -> None:
    spec = fashion_bundle.manifest.model.spec
    assert set(MODULES) == set(GROUPS) == set(layer_flops(spec, spec.full))
    assert flops_share(spec, 16, LAYERS_IN[Precision.INT8]) == pytest.approx(0.86, abs=0.005)
    assert flops_share(spec, 1, LAYERS_IN[Precision.INT8]) == pytest.approx(0.73, abs=0.005)
    assert flops_share(spec, 16, LINEAR) == pytest.approx(0.92, abs=0.005)
    every = products_of(stored_graph(fashion_bundle), GROUPS)
    left = matmuls_of(stored_graph(fashion_bundle)) - every
    assert {module_of(name) for name in left} == {"final.linear"}


# ---------------------------------------------------------------- other backbones


@pytest.fixture(scope="module", params=["ELIT-U-ViT", "ELIT-HDiT"])
def backbone(request: pytest.FixtureRequest) -> Elit:
    """With layers that a model of plain blocks has not: those that join a skip, or merge tokens and split them."""
    return tiny_model(**VARIANTS[request.param])


@pytest.fixture(scope="module")
def backbone_graph(backbone: Elit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_graph(backbone, STEP, tmp_path_factory.mktemp(backbone.spec.backbone))


def chosen(path: Path, spec: ModelSpec, layers: Sequence[str]) -> dict[str, str]:
    return quantize._products(onnx.load(path, load_external_data=False), spec, layers)


def test_layers_that_join_merge_and_split_are_among_the_products(backbone: Elit, backbone_graph: Path) -> None:
    """Each of these layers of the model has one product, and all of them are chosen."""
    layers = {
        name for name, _ in backbone.named_modules() if re.fullmatch(r"(\w+_joins\.\d+|merge|split)\.linear", name)
    }
    assert layers
    products = {name for name in matmuls_of(backbone_graph) if module_of(name) in layers}
    assert {module_of(name) for name in products} == layers
    assert products == chosen(backbone_graph, backbone.spec, ("joins", "merging")).keys()
    for precision in QUANTIZED:
        assert products <= chosen(backbone_graph, backbone.spec, LAYERS_IN[precision]).keys()


def test_every_kind_of_layer_that_costs_something_has_products(backbone: Elit, backbone_graph: Path) -> None:
    spec = backbone.spec
    costing = [group for group, count in layer_flops(spec, spec.full).items() if count]
    assert {"joins", "merging"} & set(costing)
    found = chosen(backbone_graph, spec, GROUPS)
    assert set(found.values()) == set(costing)
    for group in costing:
        assert chosen(backbone_graph, spec, (group,)).keys() == products_of(backbone_graph, (group,))
    assert {module_of(name) for name in matmuls_of(backbone_graph) - found.keys()} == {"final.linear"}


def test_a_graph_of_it_has_all_its_linear_layers_in_8_bits(
    backbone: Elit, backbone_graph: Path, tmp_path: Path
) -> None:
    pipeline, budgets = torch_pipeline(backbone), tuple(budget.kept for budget in backbone.spec.budgets)
    recipe = SMALL.model_copy(update={"budgets": budgets})
    samples = select_samples(list(recorded_rows(pipeline, recipe)), pipeline, recipe, "none").samples
    path = quantized_graph(backbone_graph, tmp_path, Precision.FP8, samples, backbone.spec)
    assert products_in_8_bits(path) == products_of(backbone_graph, LINEAR)
    check_graph(path, backbone.spec.graph(STEP), opset=20)


# ---------------------------------------------------------------- what is refused


@pytest.fixture
def source(tiny_bundle: Bundle) -> Path:
    return stored_graph(tiny_bundle)


def test_unknown_layers_are_refused(source: Path, tiny_samples: CalibrationInputs, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"no kind of layer 'MLP'; there are head attention, .*Write"):
        quantized_graph(source, tmp_path, Precision.INT8, tiny_samples, tiny_spec(), ("MLP",))


def test_a_graph_without_such_products_is_refused(
    tiny_bundle: Bundle, tiny_samples: CalibrationInputs, tmp_path: Path
) -> None:
    time, spec = tiny_bundle.manifest.graphs["time-fp32"], tiny_bundle.manifest.model.spec
    path = tiny_bundle.verified(time.artifact) / time.file
    with pytest.raises(CalibrationError, match="quantize an fp32 graph of `step`"):
        quantized_graph(path, tmp_path, Precision.INT8, tiny_samples, spec)


def test_without_the_library_the_remedy_is_told(
    source: Path, tiny_samples: CalibrationInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "modelopt.onnx.quantization", None)
    with pytest.raises(BackendUnavailable, match=r"need modelopt .*; pip install -e '.*\[quantize\]'"):
        quantized_graph(source, tmp_path, Precision.INT8, tiny_samples, tiny_spec())
    assert list(tmp_path.iterdir()) == []


def test_what_the_library_cannot_do_leaves_the_folder_as_it_was(
    source: Path, tiny_samples: CalibrationInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "step.onnx").write_bytes(b"old")

    def failing(*_: object, **__: object) -> None:
        raise RuntimeError("no kernel\nand a long tale")

    monkeypatch.setattr(quantize, "_library", lambda: failing)
    with pytest.raises(CalibrationError, match=r"cannot quantize step.onnx in fp8: no kernel; pip install"):
        quantized_graph(source, tmp_path, Precision.FP8, tiny_samples, tiny_spec())
    assert contents(tmp_path) == {"step.onnx": b"old"}


@pytest.mark.parametrize("what", ["product", "input"])
def test_a_library_that_does_less_or_more_is_found(
    what: str, source: Path, tiny_samples: CalibrationInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = quantize._library()

    def other(path: str, *, nodes_to_quantize: list[str], output_path: str, **options: Any) -> None:
        wanted = nodes_to_quantize[1:] if what == "product" else nodes_to_quantize
        library(path, nodes_to_quantize=wanted, output_path=output_path, **options)
        if what == "input":
            model = onnx.load(output_path, load_external_data=False)
            model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16
            Path(output_path).write_bytes(model.SerializeToString())

    monkeypatch.setattr(quantize, "_library", lambda: other)
    told = {"product": "left 1 of 23 products in float32, .*/MatMul_", "input": "changed the inputs"}[what]
    with pytest.raises(CalibrationError, match=f"{told}.*pip install 'nvidia-modelopt"):
        quantized_graph(source, tmp_path, Precision.INT8, tiny_samples, tiny_spec())
    assert list(tmp_path.iterdir()) == []


def test_the_library_is_kept_from_printing(
    source: Path, tiny_samples: CalibrationInputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    quantized_graph(source, tmp_path, Precision.FP8, tiny_samples, tiny_spec())
    assert capfd.readouterr() == ("", "")


# ---------------------------------------------------------------- plans


@each_precision
def test_tensorrt_builds_a_plan_of_it(
    graphs: dict[Precision, Path], fashion_bundle: Bundle, precision: Precision, tmp_path: Path
) -> None:
    """For a GPU that is not here."""
    trt = pytest.importorskip("tensorrt_rtx")
    from elit_export.backends.tensorrt import build as tensorrt

    builder, spec = tensorrt.BUILDERS["tensorrt-rtx"], fashion_bundle.manifest.model.spec
    values = {"backend": "tensorrt-rtx", "precision": Precision.FP32, "compute_capabilities": ["8.9"]}
    target = TensorRTTarget.model_validate(values)
    (profile, *_) = default_profiles(16, Range(1, 2, 4))
    sizes = {}
    for arithmetic, graph in ((Precision.FP32, stored_graph(fashion_bundle)), (precision, graphs[precision])):
        folder = tmp_path / arithmetic.value
        folder.mkdir()
        wanted = target.model_copy(update={"precision": arithmetic})
        file = GraphFile(graph, spec.graph(STEP))
        plan = builder.build_plan(file, folder, [profile], wanted, None, lambda _: None)
        sizes[arithmetic] = (folder / plan.file).stat().st_size
    assert sizes[precision] < 0.9 * sizes[Precision.FP32]
    made = trt.Builder(tensorrt._log(trt))
    network = tensorrt._parsed(trt, made, graphs[precision], tensorrt._log(trt), precision)
    kinds = Counter(network.get_layer(index).type for index in range(network.num_layers))
    products = len(products_in_8_bits(graphs[precision]))
    assert (kinds[trt.LayerType.QUANTIZE], kinds[trt.LayerType.DEQUANTIZE]) == (products, 2 * products)


# ---------------------------------------------------------------- sensitivity


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def tiny_file(tiny_samples: CalibrationInputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("samples") / "tiny.npz"
    save_inputs(tiny_samples, path)
    return path


def test_sensitivity_has_a_row_for_each_kind_of_layer_and_one_for_all(
    tiny_bundle: Bundle, tiny_samples: CalibrationInputs
) -> None:
    model = tiny_bundle.manifest.model
    found = list(sensitivities(stored_graph(tiny_bundle), model.spec, model.data, Precision.FP8, tiny_samples))
    assert len(found) == sensitivity_count(model.spec) == 10
    assert [row.layers for row in found] == [
        name for name, count in layer_flops(model.spec, model.spec.full).items() if count
    ] + [AS_BUILT]
    *alone, built = found
    for kept in (1, 2, 3, 4):
        inside = [row.velocity[kept].sqnr_db for row in alone if row.layers in LINEAR]
        assert built.velocity[kept].sqnr_db < min(inside) + 1
        assert 15 < built.velocity[kept].sqnr_db < 60
        shares = [row.flops_share[kept] for row in alone]
        assert sum(shares[:-1]) == pytest.approx(built.flops_share[kept])
        assert 0.5 < sum(shares) < 1


def test_the_command_shows_low_budgets_beside_high_ones(tiny_bundle: Bundle, tiny_file: Path, tmp_path: Path) -> None:
    facts = tmp_path / "facts.json"
    done = run(
        *("calibrate", "sensitivity", tiny_bundle.folder, "--samples", tiny_file),
        *("--precision", "int8", "--json", facts),
    )
    assert done.exit_code == 0, done.output
    for word in ("core MLP", "Write", "all as built", "at 1", "at 4", "worst", "FLOPs at 1"):
        assert word in done.output
    said = json.loads(facts.read_text())
    assert (said["precision"], len(said["rows"])) == ("int8", 10)
    assert set(said["rows"][-1]["velocity_db"]) == {"1", "2", "3", "4"}


def test_the_command_refuses_with_the_remedy(
    tiny_bundle: Bundle, fashion_bundle: Bundle, tiny_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(bundle: Bundle, samples: Path, precision: str = "int8") -> str:
        done = run("calibrate", "sensitivity", bundle.folder, "--samples", samples, "--precision", precision)
        assert done.exit_code == 2
        return " ".join(done.output.split())

    assert "another checkpoint" in told(fashion_bundle, tiny_file)
    assert "elit-export calibrate samples BUNDLE --out" in told(tiny_bundle, tmp_path / "none.npz")
    assert "'fp16' is not one of" in told(tiny_bundle, tiny_file, "fp16")
    monkeypatch.setitem(sys.modules, "modelopt.onnx.quantization", None)
    assert pip_install("quantize") in told(tiny_bundle, tiny_file)


def test_a_bundle_without_the_graph_is_told_how_to_get_it(tiny_bundle: Bundle) -> None:
    bare = Bundle(tiny_bundle.folder, tiny_bundle.manifest.model_copy(update={"graphs": {}}))
    with pytest.raises(BundleError, match="no graph step-fp32; build a target with precision fp32 into it"):
        stored_graph(bare)


# ---------------------------------------------------------------- OpenVINO, which quantizes in its own build


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_the_shipped_recipe_builds_for_openvino(
    fashion_bundle: Bundle, samples: CalibrationInputs, tmp_path: Path, precision: str
) -> None:
    """Every profile and trajectory within its tolerance, by targets of the recipe as it is."""
    pytest.importorskip("openvino")
    from elit_export.backends.openvino import build as openvino

    if precision.upper() not in openvino._capabilities():
        pytest.skip(f"this CPU has no {precision} arithmetic")
    folder = Path(shutil.copytree(fashion_bundle.folder, tmp_path / "bundle"))
    save_inputs(samples, tmp_path / "samples.npz")
    places = {"samples": tmp_path / "samples.npz"} if precision == "int8" else {}
    made = compile_bundle(shipped_recipe(), f"openvino-{precision}", out=folder, **places)
    (plan_set,) = (one for one in made.manifest.plan_sets if one.precision.value == precision)
    assert [facts.parity.status for facts in plan_set.profiles] == ["passed"] * 4
    found = [facts.parity.sqnr_db for facts in plan_set.profiles]
    assert all(db is not None and db < 60 for db in found)  # beyond that nothing was rounded

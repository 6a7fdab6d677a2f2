from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from elit_export.bundle.reading import Bundle
from elit_export.errors import ExportError
from elit_export.graphs import check
from elit_export.graphs.check import check_graph
from elit_export.graphs.export import export_graph
from elit_export.spec import GraphSpec, Role, TensorSpec
from tests.conftest import unremembered_export
from tests.helpers import tiny_model


@pytest.fixture(scope="module")
def graph(golden_g4_bundle: Bundle) -> onnx.GraphProto:
    return onnx.load(graph_file(golden_g4_bundle), load_external_data=False).graph


def graph_file(bundle: Bundle) -> Path:
    graph = bundle.manifest.graphs["step-fp32"]
    return bundle.verified(graph.artifact) / graph.file


def test_weights_lie_in_one_file_beside_the_graph(golden_g4_bundle: Bundle) -> None:
    assert set(golden_g4_bundle.manifest.graphs["step-fp32"].artifact.files) == {"step.onnx", "step.onnx.data"}


def test_rows_and_latents_are_the_only_dynamic_dimensions(graph: onnx.GraphProto) -> None:
    symbols = {
        value.name: [dim.dim_param for dim in value.type.tensor_type.shape.dim if dim.dim_param]
        for value in (*graph.input, *graph.output)
    }
    assert symbols == {
        **{name: ["rows"] for name in ("x", "t", "y", "velocity", "residual")},
        "latents": ["latents"],
    }


def test_attention_is_six_nodes_and_layernorm_one(graph: onnx.GraphProto, golden_g4_bundle: Bundle) -> None:
    operators = [node.op_type for node in graph.node]
    spec = golden_g4_bundle.manifest.model.spec
    assert operators.count("Softmax") == spec.depth + 2  # one a block, one each in Read and Write
    assert operators.count("LayerNormalization") == 2 * spec.depth + 3  # two a block, two in Read, the final one
    assert "Cast" not in operators


def test_projected_queries_are_a_constant(graph: onnx.GraphProto, golden_g4_bundle: Bundle) -> None:
    """What Read expands is stored as (h, J, D/h): nothing projects or normalises it at run time."""
    spec = golden_g4_bundle.manifest.model.spec
    constants = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    expanded = [constants.get(node.input[0]) for node in graph.node if node.op_type == "Expand"]
    head_size = spec.hidden_size // spec.num_heads
    assert (spec.num_heads, spec.latents, head_size) in expanded


def test_graph_carries_no_trace_of_the_exporting_machine(golden_g4_bundle: Bundle) -> None:
    content = graph_file(golden_g4_bundle).read_bytes()
    assert str(Path(__file__).parent.parent.parent).encode() not in content
    assert b"site-packages" not in content


# ---------------------------------------------------------------- the checker refuses what is wrong

X = TensorSpec("x", "float32", ("rows", 2), Role.SAMPLE)
LATENTS = TensorSpec("latents", "int64", ("latents",), Role.LATENTS)
VELOCITY = TensorSpec("velocity", "float32", ("latents", 2), Role.RESULT, on_host=True)
STEP = GraphSpec("step", (X, LATENTS), (VELOCITY,), elastic=True)


def write_graph(path: Path, nodes: list[onnx.NodeProto], inputs: tuple[TensorSpec, ...] = STEP.inputs) -> Path:
    constant = helper.make_tensor("two", TensorProto.FLOAT, [1], [2.0])
    values = [
        [
            helper.make_tensor_value_info(
                tensor.name, helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype)), tensor.dims
            )
            for tensor in tensors
        ]
        for tensors in (inputs, STEP.outputs)
    ]
    graph = helper.make_graph(nodes, "step", *values, initializer=[constant])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), path)
    return path


GATHER = helper.make_node("Gather", ["x", "latents"], ["velocity"], axis=0)


def test_a_sound_graph_passes(tmp_path: Path) -> None:
    check_graph(write_graph(tmp_path / "g.onnx", [GATHER]), STEP, opset=20)


def test_another_signature_is_refused(tmp_path: Path) -> None:
    path = write_graph(tmp_path / "g.onnx", [GATHER], (replace(X, dims=(3, 2)), LATENTS))
    with pytest.raises(ExportError, match=r"inputs are \[\('x', 'float32', \(3, 2\)\), .*, wanted .*'rows', 2"):
        check_graph(path, STEP, opset=20)


def test_a_forbidden_node_is_named(tmp_path: Path) -> None:
    nonzero = helper.make_node("NonZero", ["x"], ["where"], name="finds_where")
    with pytest.raises(ExportError, match=r"forbidden node NonZero \(finds_where\)"):
        check_graph(write_graph(tmp_path / "g.onnx", [GATHER, nonzero]), STEP, opset=20)


def test_an_unfolded_constant_is_named(tmp_path: Path) -> None:
    double = helper.make_node("Add", ["two", "two"], ["four"], name="adds_constants")
    with pytest.raises(ExportError, match=r"Add \(adds_constants\) computes a constant"):
        check_graph(write_graph(tmp_path / "g.onnx", [GATHER, double]), STEP, opset=20)


def test_latents_must_select_by_gather(tmp_path: Path) -> None:
    expand = helper.make_node("Expand", ["two", "latents"], ["velocity"])
    path = write_graph(tmp_path / "g.onnx", [expand])
    with pytest.raises(ExportError, match="`latents` feeds"):
        check_graph(path, STEP, opset=20)
    check_graph(path, replace(STEP, elastic=False), opset=20)  # of others nothing is asked of it


def test_invalid_onnx_is_refused(tmp_path: Path) -> None:
    unknown = helper.make_node("NoSuchOperator", ["x"], ["velocity"])
    with pytest.raises(ExportError, match="not valid ONNX"):
        check_graph(write_graph(tmp_path / "g.onnx", [unknown]), STEP, opset=20)


def test_another_operator_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"operator sets are .*, wanted 19"):
        check_graph(write_graph(tmp_path / "g.onnx", [GATHER]), STEP, opset=19)


def test_a_model_with_one_latent_per_group_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="one budget only"):
        export_graph(tiny_model(group_size=1), "step", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_check_leaves_the_old_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "step.onnx").write_text("old")
    monkeypatch.setattr(check, "FORBIDDEN", {"Softmax"})
    with pytest.raises(ExportError, match="forbidden node Softmax"):
        unremembered_export(tiny_model(), "step", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step.onnx"]
    assert (tmp_path / "step.onnx").read_text() == "old"

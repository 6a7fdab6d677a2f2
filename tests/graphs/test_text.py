"""Graphs of a model that takes text: any number of tokens, padding, and the mask in each form of attention."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from elit_export.graphs.export import export_graph
from elit_export.graphs.fused import fused
from elit_export.graphs.program import export_program
from elit_export.graphs.rounding import in_precision
from elit_export.models.mmdit import ElitMMDiT
from elit_export.spec import CACHE_GRAPHS, FUSED, LATENTS, MAX_TEXT_TOKENS, ROWS, STEP, TEXT, Precision, Role
from elit_export.spec.graphs import FUSED_SETTINGS
from tests.helpers import max_relative
from tests.text_models import inputs_of, shallow_text_model, text_model

# Rows, text tokens, kept latents: none is that of the example the exporter sees alone.
SIZES = [(1, 1, 1), (2, 9, 16), (3, 5, 2), (4, 40, 3), (1, MAX_TEXT_TOKENS, 16)]
NEAREST = 2e-6  # measured 5e-7
Inputs = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def model() -> ElitMMDiT:
    return text_model()


@pytest.fixture(scope="module")
def shallow() -> ElitMMDiT:
    return shallow_text_model()


@pytest.fixture(scope="module")
def step(model: ElitMMDiT, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_graph(model, STEP, tmp_path_factory.mktemp("step"))


def answer(session: ort.InferenceSession, inputs: Inputs) -> list[np.ndarray]:
    found: list[np.ndarray] = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return found


def expected_of(model: ElitMMDiT, graph: str, inputs: Inputs) -> list[np.ndarray]:
    with torch.inference_mode():
        outputs = fused(model, *inputs.values()) if graph == FUSED else getattr(model, graph)(*inputs.values())
    return [output.numpy() for output in (outputs if isinstance(outputs, tuple) else (outputs,))]


# ---------------------------------------------------------------- graphs equal torch


@pytest.mark.parametrize("graph", [STEP, *CACHE_GRAPHS])
def test_a_graph_equals_torch_at_any_rows_text_and_budget(
    model: ElitMMDiT, step: Path, tmp_path: Path, graph: str
) -> None:
    session = ort.InferenceSession(step if graph == STEP else export_graph(model, graph, tmp_path))
    for rows, text, kept in SIZES:
        inputs = inputs_of(model.spec, graph, rows=rows, text=text, kept=kept)
        for found, expected in zip(answer(session, inputs), expected_of(model, graph, inputs), strict=True):
            assert max_relative(found, expected) <= NEAREST, (rows, text, kept)


def test_fused_equals_torch_where_it_computes_and_where_it_reuses(shallow: ElitMMDiT, tmp_path: Path) -> None:
    model = shallow
    session = ort.InferenceSession(export_graph(model, FUSED, tmp_path))
    choices = {"threshold": np.inf, "low": -np.inf, "high": np.inf, "most": 3, "order": 1, "reused": 0}
    types = {tensor.name: getattr(torch, tensor.dtype) for tensor in model.spec.graph(FUSED).inputs}
    for rows, text, kept in SIZES:
        inputs = inputs_of(model.spec, FUSED, rows=rows, text=text, kept=min(kept, model.spec.latents))
        inputs |= {name: torch.tensor(value, dtype=types[name]) for name, value in choices.items()}
        for force in (True, False):
            given = inputs | {"force": torch.tensor(force)}
            outputs = list(zip(answer(session, given), expected_of(model, FUSED, given), strict=True))
            assert outputs[1] == (force, force)  # computed
            for found, expected in outputs[:1] + outputs[2:]:
                assert np.abs(found - expected).max() <= NEAREST * max(1, np.abs(expected).max())


def test_the_settings_of_fused_come_last(model: ElitMMDiT) -> None:
    inputs = model.spec.graph(FUSED).inputs
    assert [tensor.name for tensor in inputs[:5]] == ["x", "t", "text", "text_mask", "latents"]
    assert inputs[-len(FUSED_SETTINGS) :] == FUSED_SETTINGS
    assert [tensor for tensor in inputs if tensor.role is Role.SETTING] == list(FUSED_SETTINGS)


def test_padding_may_hold_anything_in_the_graph_too(model: ElitMMDiT, step: Path) -> None:
    session = ort.InferenceSession(step)
    inputs = inputs_of(model.spec, STEP, rows=3, text=6, kept=2)
    plain = answer(session, inputs)
    inputs["text"] = torch.where(inputs["text_mask"][:, :, None] != 0, inputs["text"], torch.nan)
    assert all(np.array_equal(mine, theirs) for mine, theirs in zip(answer(session, inputs), plain, strict=True))


# ---------------------------------------------------------------- what is in them


@cache
def loaded(path: Path) -> onnx.GraphProto:
    return onnx.load(path, load_external_data=False).graph


def test_the_dynamic_dimensions_are_rows_text_and_latents(step: Path) -> None:
    graph = loaded(step)
    symbols = {
        value.name: [dim.dim_param for dim in value.type.tensor_type.shape.dim if dim.dim_param]
        for value in (*graph.input, *graph.output)
    }
    assert symbols == {
        **{name: [ROWS] for name in ("x", "t", "velocity", "residual")},
        **{name: [ROWS, TEXT] for name in ("text", "text_mask")},
        LATENTS: [LATENTS],
    }


def test_rotations_are_constants_that_are_cut_to_length(model: ElitMMDiT, step: Path) -> None:
    graph = loaded(step)
    operators = [node.op_type for node in graph.node]
    assert operators.count("Cos") == operators.count("Sin") == 1  # those of the embedding of t
    assert "Range" not in operators
    tables = {tuple(tensor.dims) for tensor in graph.initializer}
    assert {(2, MAX_TEXT_TOKENS, 16), (2, model.spec.tokens, 16)} <= tables


@pytest.mark.parametrize("graph", ["probe", "reuse"])
def test_graphs_that_run_no_block_take_no_text(model: ElitMMDiT, graph: str) -> None:
    assert not {TEXT, "text_mask"} & {tensor.name for tensor in model.spec.graph(graph).inputs}


# ---------------------------------------------------------------- half precision


@pytest.mark.parametrize("precision", [Precision.FP16, Precision.BF16])
def test_native_attention_takes_a_bias_for_every_query(model: ElitMMDiT, tmp_path: Path, precision: Precision) -> None:
    path = export_graph(model, STEP, tmp_path, precision)
    joint = [node for node in loaded(path).node if node.op_type == "Attention" and len(node.input) > 3]
    assert len(joint) == model.spec.depth
    if precision is Precision.FP16:  # ONNX Runtime has no bfloat16 on a CPU
        session = ort.InferenceSession(path)
        half = in_precision(model, precision)
        for rows, text, kept in SIZES[:4]:
            inputs = inputs_of(model.spec, STEP, rows=rows, text=text, kept=kept)
            for found, expected in zip(answer(session, inputs), expected_of(half, STEP, inputs), strict=True):
                assert max_relative(found, expected) <= 3e-3  # measured 6e-4


def test_fused_in_half_precision_spells_the_bias_out(shallow: ElitMMDiT, tmp_path: Path) -> None:
    session = ort.InferenceSession(export_graph(shallow, FUSED, tmp_path, Precision.FP16))
    inputs = inputs_of(shallow.spec, FUSED, rows=2, text=6, kept=3) | {"force": torch.tensor(True)}
    inputs |= {name: torch.tensor(1) for name in ("most", "order", "reused")}
    found, expected = answer(session, inputs)[0], expected_of(in_precision(shallow, Precision.FP16), FUSED, inputs)[0]
    assert max_relative(found, expected) <= 3e-3


# ---------------------------------------------------------------- programs


def test_the_program_of_step_runs_at_any_rows_text_and_budget(shallow: ElitMMDiT, tmp_path: Path) -> None:
    program = torch.export.load(export_program(shallow, STEP, tmp_path)).module()
    for rows, text, kept in SIZES:
        inputs = inputs_of(shallow.spec, STEP, rows=rows, text=text, kept=min(kept, shallow.spec.latents))
        with torch.no_grad():
            torch.testing.assert_close(tuple(program(*inputs.values())), shallow.step(*inputs.values()))

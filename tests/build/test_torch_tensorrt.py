"""What Torch-TensorRT is asked for. The library cannot be imported without a GPU: a stand-in keeps what it is given."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from elit_export.graphs.program import export_program
from elit_export.models.elit import Elit
from elit_export.spec import CACHE_GRAPHS, STEP, Profile, Range
from tests.helpers import tiny_model
from tests.text_models import text_model

ROWS, LATENTS, TEXT = Range(1, 2, 8), Range(4, 16, 16), Range(2, 5, 9)


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, over a library whose `Input` is what it was made with."""
    library = ModuleType("torch_tensorrt")
    library.Input = lambda **facts: SimpleNamespace(**facts)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_tensorrt", library)
    name = "elit_export.build.torch_tensorrt"
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module(name)
    sys.modules.pop(name, None)


def asked(builder: Any, model: Elit, graph: str, profile: Profile, folder: Path) -> dict[str, list[tuple[int, ...]]]:
    """The least, usual and largest shape of each input."""
    program = torch.export.load(export_program(model, graph, folder))
    found = builder._inputs(program, profile, elastic=graph == STEP)
    names = [tensor.name for tensor in model.spec.inputs_of(graph)]
    shapes = [[tuple(shape) for shape in (one.min_shape, one.opt_shape, one.max_shape)] for one in found]
    return dict(zip(names, shapes, strict=True))


def test_text_has_a_range_of_its_own(builder: Any, tmp_path: Path) -> None:
    found = asked(builder, text_model(), STEP, Profile("full", LATENTS, ROWS, TEXT), tmp_path)
    pairs = list(zip(ROWS.corners(), TEXT.corners(), strict=True))
    assert found["text"] == [(rows, tokens, 24) for rows, tokens in pairs]
    assert found["text_mask"] == pairs
    assert found["x"] == [(rows, 4, 16, 16) for rows in ROWS.corners()]
    assert found["t"] == [(rows,) for rows in ROWS.corners()]
    assert found["latents"] == [(kept,) for kept in LATENTS.corners()]


@pytest.mark.parametrize("graph", CACHE_GRAPHS)
def test_graphs_without_text_have_rows_alone(builder: Any, tmp_path: Path, graph: str) -> None:
    model = text_model()
    found = asked(builder, model, graph, Profile(graph, Range(1, 1, 1), ROWS), tmp_path)
    for tensor in model.spec.inputs_of(graph):
        assert found[tensor.name] == [(rows, *tensor.shape[1:]) for rows in ROWS.corners()]


def test_models_of_classes_have_rows_and_latents(builder: Any, tmp_path: Path) -> None:
    found = asked(builder, tiny_model(), STEP, Profile("full", Range(1, 2, 4), ROWS), tmp_path)
    assert found["y"] == [(rows,) for rows in ROWS.corners()]
    assert found["latents"] == [(1,), (2,), (4,)]

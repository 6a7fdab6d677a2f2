"""The saved torch program that Torch-TensorRT reads; its compiler needs a GPU, the program does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from elit_export.graphs.program import export_program
from elit_export.models.sit import ElitSiT
from elit_export.spec import CACHE_GRAPHS, STEP, Precision
from elit_export.verify.cases import ReferenceCase as Case
from elit_export.verify.cases import cache_inputs, case_inputs
from tests.helpers import tiny_model


@pytest.fixture(scope="module")
def model() -> ElitSiT:
    return tiny_model().eval()


def test_the_step_program_runs_at_every_budget_and_number_of_rows(model: ElitSiT, tmp_path: Path) -> None:
    program = torch.export.load(export_program(model, STEP, tmp_path)).module()
    for kept in range(1, model.spec.latents + 1):
        case = Case(profile="", kept=kept, rows=1 + kept % 3)
        inputs = [torch.from_numpy(array) for array in case_inputs(case, kept, model.spec).values()]
        with torch.no_grad():
            expected = model.step(*inputs, torch.arange(kept))
            found = program(*inputs, torch.arange(kept))
        torch.testing.assert_close(tuple(found), expected)


@pytest.mark.parametrize("graph", CACHE_GRAPHS)
def test_programs_of_the_cache_run(model: ElitSiT, tmp_path: Path, graph: str) -> None:
    program = torch.export.load(export_program(model, graph, tmp_path)).module()
    inputs = cache_inputs(graph, 3, model.spec)
    tensors = [torch.from_numpy(inputs[tensor.name]) for tensor in model.spec.graph(graph).inputs]
    with torch.no_grad():
        expected, found = getattr(model, graph)(*tensors), program(*tensors)
    torch.testing.assert_close(found, expected if isinstance(found, torch.Tensor) else tuple(expected))


def test_half_precision_is_in_the_program(model: ElitSiT, tmp_path: Path) -> None:
    program = torch.export.load(export_program(model, STEP, tmp_path, Precision.BF16))
    assert {tensor.dtype for tensor in program.state_dict.values()} == {torch.float32, torch.bfloat16}

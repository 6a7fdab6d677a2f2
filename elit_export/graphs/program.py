"""Model → a saved torch.export program, for backends that read it in place of ONNX.

Takes: a model, a folder.  Gives: `NAME.pt2`.  May touch: that folder.
Knows nothing of: backends, budgets other than as a dynamic dimension.
"""

from __future__ import annotations

from pathlib import Path

import torch

from elit_export.errors import ExportError
from elit_export.files import written_whole
from elit_export.graphs.export import GraphModule, dynamic_shapes, example_inputs
from elit_export.models.elit import Elit
from elit_export.models.precision import in_precision
from elit_export.spec import Precision


def export_program(model: Elit, name: str, folder: Path, precision: Precision = Precision.FP32) -> Path:
    """Write the program `step`, `probe` or `reuse` into `folder` (made if missing); raises ExportError."""
    module = GraphModule(in_precision(model, precision), name).eval()
    inputs = model.spec.inputs_of(name)
    try:
        program = torch.export.export(
            module,
            example_inputs(inputs, model.spec),
            dynamic_shapes=dynamic_shapes(inputs, model.spec),
            prefer_deferred_runtime_asserts_over_guards=True,  # as torch.onnx.export: K = J − 1 is no special case
        )
    except (torch._dynamo.exc.UserError, ValueError) as error:
        raise ExportError(f"torch.export failed: {error}") from error
    _drop_assertions(program)
    folder.mkdir(parents=True, exist_ok=True)
    with written_whole(folder / f"{name}.pt2") as temporary:
        torch.export.save(program, temporary)
    return folder / f"{name}.pt2"


def _drop_assertions(program: torch.export.ExportedProgram) -> None:
    """torch asserts that no dimension is empty; at the full budget no latent is dropped, and one is."""
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.target is torch.ops.aten._assert_scalar.default:
            graph.erase_node(node)
    graph.eliminate_dead_code()
    program.graph_module.recompile()

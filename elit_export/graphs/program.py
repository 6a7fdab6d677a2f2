"""Model → a saved torch.export program, for backends that read it in place of ONNX.

Takes: a model, a folder.  Gives: `step.pt2`.  May touch: that folder.
Knows nothing of: backends, budgets other than as a dynamic dimension.
"""

from __future__ import annotations

from pathlib import Path

import torch

from elit_export.errors import ExportError
from elit_export.files import written_whole
from elit_export.graphs.export import StepModule, dynamic_shapes, example_inputs
from elit_export.models.precision import in_precision
from elit_export.models.sit import ElitSiT
from elit_export.spec import Precision

PROGRAM_FILE = "step.pt2"


def export_program(model: ElitSiT, folder: Path, precision: Precision = Precision.FP32) -> Path:
    """Write the `step` program into `folder` (made if missing) and give its path; raises ExportError."""
    step = StepModule(in_precision(model, precision)).eval()
    shapes = dynamic_shapes(model.spec)
    try:
        program = torch.export.export(
            step,
            example_inputs(model.spec),
            dynamic_shapes=shapes,
            prefer_deferred_runtime_asserts_over_guards=True,  # as torch.onnx.export: K = J − 1 is no special case
        )
    except (torch._dynamo.exc.UserError, ValueError) as error:
        raise ExportError(f"torch.export failed: {error}") from error
    _drop_assertions(program)
    folder.mkdir(parents=True, exist_ok=True)
    with written_whole(folder / PROGRAM_FILE) as temporary:
        torch.export.save(program, temporary)
    return folder / PROGRAM_FILE


def _drop_assertions(program: torch.export.ExportedProgram) -> None:
    """torch asserts that no dimension is empty; at the full budget no latent is dropped, and one is."""
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.target is torch.ops.aten._assert_scalar.default:
            graph.erase_node(node)
    graph.eliminate_dead_code()
    program.graph_module.recompile()

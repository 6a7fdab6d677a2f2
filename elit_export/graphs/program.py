"""Exports a model as a saved torch.export program, for backends that read it in place of ONNX."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from elit_export.bundle.atomic import atomic_write
from elit_export.errors import ExportError
from elit_export.graphs.export import EXAMPLE_ROWS, Traceable, traceable, traceable_decoder
from elit_export.models.elit import Elit
from elit_export.models.upcast import upcast_whole
from elit_export.spec import DECODE, DecoderSpec, Precision


def export_program(model: Elit, name: str, folder: Path, precision: Precision = Precision.FP32) -> Path:
    """Write the program `step`, `probe` or `reuse` into `folder` (made if missing); raises ExportError."""
    return _written(traceable(upcast_whole(model), name, precision), folder / f"{name}.pt2")


def export_decoder_program(decoder: nn.Module, spec: DecoderSpec, max_rows: int, folder: Path) -> Path:
    """Write the program `decode` of a VAE's decoder, in fp32.

    It takes at most `max_rows` rows, because diffusers switches to another code path for very large inputs.
    """
    return _written(traceable_decoder(decoder, spec, max(max_rows, EXAMPLE_ROWS)), folder / f"{DECODE}.pt2")


def _written(described: Traceable, path: Path) -> Path:
    try:
        program = torch.export.export(
            described.module,
            described.examples,
            dynamic_shapes=described.dynamic_shapes,
            prefer_deferred_runtime_asserts_over_guards=True,  # as torch.onnx.export: K = J − 1 needs no case
        )
    except (torch._dynamo.exc.UserError, ValueError) as error:
        raise ExportError(f"torch.export failed: {error}") from error
    _drop_assertions(program)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        torch.export.save(program, temporary)
    return path


def _drop_assertions(program: torch.export.ExportedProgram) -> None:
    """Remove torch's assertions that no dimension is empty: at the full budget the dropped latents are."""
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.target is torch.ops.aten._assert_scalar.default:
            graph.erase_node(node)
    graph.eliminate_dead_code()
    program.graph_module.recompile()

"""export: a checkpoint as one ONNX graph for every budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from elit_export.bundle.atomic import check_writable
from elit_export.cli.common import FOLDER, INTERFACE_OPTION, NAME, architecture_options, say, say_lines
from elit_export.spec import STEP, Precision

PRECISION = click.Choice([precision.value for precision in Precision if not precision.quantized])


@click.command()
@click.argument("checkpoint", type=NAME)
@click.option("--out", type=FOLDER, required=True, help="Folder for step.onnx and its weights.")
@click.option("--precision", type=PRECISION, default=Precision.FP32.value, show_default=True)
@INTERFACE_OPTION
@architecture_options
def export(checkpoint: str, out: Path, precision: str, interface: Path | None, **numbers: Any) -> None:
    """Export CHECKPOINT as one ONNX graph for every budget.

    CHECKPOINT is a .pt or .safetensors file, shipped:fashion or, with --interface, a folder of diffusers. Its weights
    are read one by one, so that it may be larger than the memory.
    """
    from elit_export.backends.tensorrt.trtexec import trtexec_line
    from elit_export.checkpoints.native import checkpoint_sha256, stored_checkpoint
    from elit_export.compiler.usual_recipe import usual_name, usual_profiles
    from elit_export.graphs.about import Origin, describe
    from elit_export.graphs.export import export_graph

    check_writable(out / f"{STEP}.onnx")
    model = stored_checkpoint(checkpoint, interface=interface, **numbers)
    path = export_graph(model, STEP, out, Precision(precision))
    origin = Origin(usual_name(checkpoint), checkpoint_sha256(checkpoint, interface))
    describe(path, model.spec.graph(STEP), origin, Precision(precision))
    say(f"wrote {path} and {path.name}.data")
    lines = [trtexec_line(path, model.spec.graph(STEP), [profile]) for profile in usual_profiles(model.spec)]
    say_lines("engines of the usual profiles by trtexec", lines)

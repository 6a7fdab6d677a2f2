"""inspect: what a bundle, a checkpoint or another file holds, or a named model would ask of a GPU."""

from __future__ import annotations

from pathlib import Path

import click

from elit_export.cli.common import (
    INTERFACE_OPTION,
    JSON_OPTION,
    NAME,
    Count,
    architecture_options,
    say_lines,
    show,
    write_json,
)
from elit_export.cli.tables.inspect import inspection_tables
from elit_export.cli.tables.presets import preset_lines
from elit_export.spec.limits import SIDE_PIXELS, TEXT


@click.command()
@click.argument("path", type=NAME)
@INTERFACE_OPTION
@click.option(
    "--resolution",
    type=Count(SIDE_PIXELS),
    default=256,
    show_default=True,
    help="Pixels along a side, of a named model.",
)
@click.option(
    "--text", type=Count(TEXT), help="Tokens of a prompt, for FLOPs.  [default: a bundle's usual ones, else 128]"
)
@architecture_options
@click.option("--target", help="Of a bundle, only this one.  [default: all]")
@click.option("--precision", help="Of a bundle, only this one.  [default: all]")
@JSON_OPTION
def inspect(
    path: str,
    interface: Path | None,
    resolution: int,
    text: int | None,
    target: str | None,
    precision: str | None,
    json_to: str | None,
    **numbers: int | None,
) -> None:
    """Show what a checkpoint or a bundle holds: shapes, budgets, FLOPs, profiles, plans, versions, presets.

    PATH may also be a recipe, a .npz of samples, prompts or calibration inputs, an ONNX graph or a folder of `train`,
    or the name of a model, which shows what it would ask of a GPU.
    """
    from elit_export.cli.tables.deployment import deployment_tables
    from elit_export.report.inspection import inspect_path

    facts = inspect_path(
        path, interface=interface, resolution=resolution, text=text, target=target, precision=precision, **numbers
    )
    tables = [*inspection_tables(facts), *deployment_tables(facts)]
    show(*tables, json_to=json_to)
    for title, lines in preset_lines(facts.get("presets", ())):
        say_lines(title, lines, json_to=json_to)
    say_lines("the same engines by trtexec", facts.get("trtexec", ()), json_to=json_to)
    write_json(facts, json_to)

"""init: a commented recipe for a checkpoint."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import click

from elit_export.cli.common import FILE, INTERFACE_OPTION, NAME, architecture_options, say
from elit_export.errors import InputError


@click.command()
@click.argument("checkpoint", type=NAME)
@click.option("--target", "targets", default="cpu", show_default=True, help="One or several, e.g. cpu,openvino,rtx.")
@click.option("--out", type=FILE, default=Path("recipe.toml"), show_default=True)
@INTERFACE_OPTION
@architecture_options
def init(checkpoint: str, targets: str, out: Path, interface: Path | None, **numbers: int | None) -> None:
    """Write a commented recipe for CHECKPOINT: what it holds, rows, profiles, and a table per target.

    CHECKPOINT is a .pt or .safetensors file, shipped:fashion or, with --interface, a folder of diffusers.
    `build CHECKPOINT --target NAME` builds by the same recipe without writing it.
    """
    from elit_export.bundle.atomic import write_text

    if out.exists():
        raise InputError(f"--out {out}: there is such a file", "choose another name, or remove it")
    names = [name.strip() for name in targets.split(",")]
    usual = usual_recipe(checkpoint, names, interface, numbers, beside=out.absolute().parent)
    usual.recipe()  # what is written can be read
    write_text(out, usual.text())
    say(f"wrote {out}; next: elit-export build {shlex.quote(str(out))} --target {names[0]}")


def usual_recipe(
    checkpoint: str, targets: list[str], interface: Path | None, numbers: dict[str, int | None], *, beside: Path | None
) -> Any:
    """A UsualRecipe of what a checkpoint holds; its paths are relative to `beside`, or as they were given."""
    from elit_export.backends import usual_target

    for name in targets:  # before torch is imported and a checkpoint read
        usual_target(name)
    from elit_export.checkpoints.native import stored_checkpoint
    from elit_export.checkpoints.stored import SHIPPED_PREFIX
    from elit_export.compiler.usual_recipe import UsualRecipe, usual_name

    model = stored_checkpoint(checkpoint, interface=interface, **numbers)

    def path(location: str) -> str:
        return os.path.relpath(location, beside) if beside and not location.startswith(SHIPPED_PREFIX) else location

    return UsualRecipe(
        name=usual_name(checkpoint),
        checkpoint=path(checkpoint),
        spec=model.spec,
        data=model.data,
        targets=targets,
        interface=path(str(interface)) if interface else None,
        given={name: value for name, value in numbers.items() if value is not None},
    )

"""build: a recipe's engines into a bundle."""

from __future__ import annotations

from pathlib import Path

import click

from elit_export.cli.common import (
    FILE,
    FOLDER,
    INTERFACE_OPTION,
    NAME,
    TRUST_OPTION,
    build_progress,
    progress_bar,
    say,
    show,
)
from elit_export.cli.tables.inspect import inspection_tables

DEFAULT_BUILD_FOLDER = Path("engines/build")


@click.command()
@click.argument("recipe", type=FILE)
@click.option("--target", help="Which [targets.NAME]; needed if the recipe has several.")
@click.option("--out", type=FOLDER, help=f"Bundle folder.  [default: {DEFAULT_BUILD_FOLDER}/NAME]")
@click.option("--checkpoint", type=NAME, help="In place of the recipe's checkpoint: a file, or a folder of diffusers.")
@INTERFACE_OPTION
@click.option("--samples", type=FILE, help="What an int8 or fp8 target is calibrated on, by calibrate samples.")
@TRUST_OPTION
def build(
    recipe: Path,
    target: str | None,
    out: Path | None,
    checkpoint: str | None,
    interface: Path | None,
    samples: Path | None,
    trust: bool,
) -> None:
    """Build RECIPE's engines into a bundle and compare each profile with PyTorch."""
    from elit_export.bundle.recipe import load_recipe

    loaded = load_recipe(recipe)
    from elit_export.compiler.build import NOTHING_CHANGED, compile_bundle  # torch, when the recipe is right
    from elit_export.report.inspection import bundle_facts

    folder = out or DEFAULT_BUILD_FOLDER / loaded.name
    stages: list[str] = []
    with progress_bar() as progress:
        bar = build_progress(progress)

        def on_stage(stage: str, share: float) -> None:
            stages.append(stage)
            bar(stage, share)

        bundle = compile_bundle(
            loaded,
            target or loaded.only_target(),
            out=folder,
            checkpoint=checkpoint,
            interface=interface,
            samples=samples,
            trust=trust,
            progress=on_stage,
        )
    if stages == [NOTHING_CHANGED]:
        say(f"{folder}: nothing changed, nothing done")
        return
    show(*inspection_tables(bundle_facts(bundle)))
    say(f"wrote {folder}; next: elit-export sample {folder}")

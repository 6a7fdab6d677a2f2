"""build: a recipe's engines into a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from elit_export.cli.common import (
    FILE,
    FOLDER,
    INTERFACE_OPTION,
    JSON_OPTION,
    NAME,
    TRUST_OPTION,
    build_progress,
    progress_bar,
    say,
    show,
    write_json,
)
from elit_export.cli.tables.inspect import plan_set_tables
from elit_export.errors import InputError

if TYPE_CHECKING:
    from elit_export.bundle.recipe import Recipe

DEFAULT_BUILD_FOLDER = Path("engines/build")


@click.command()
@click.argument("recipe", type=NAME)
@click.option("--target", help="Which [targets.NAME]; needed if the recipe has several. Of a CHECKPOINT: cpu, rtx, …")
@click.option("--out", type=FOLDER, help=f"Bundle folder.  [default: {DEFAULT_BUILD_FOLDER}/NAME]")
@click.option("--checkpoint", type=NAME, help="In place of the recipe's checkpoint: a file, or a folder of diffusers.")
@INTERFACE_OPTION
@click.option("--samples", type=FILE, help="What an int8 or fp8 target is calibrated on, by calibrate samples.")
@TRUST_OPTION
@JSON_OPTION
def build(
    recipe: str,
    target: str | None,
    out: Path | None,
    checkpoint: str | None,
    interface: Path | None,
    samples: Path | None,
    trust: bool,
    json_to: str | None,
) -> None:
    """Build RECIPE's engines into a bundle and compare each profile with PyTorch.

    In place of a RECIPE a CHECKPOINT (.pt, .safetensors, shipped:fashion, a folder) is built by the recipe that
    `init` would write for it.
    """
    from elit_export.bundle.recipe import load_recipe
    from elit_export.compiler.asked import check_asked

    is_checkpoint = names_checkpoint(recipe)
    loaded = recipe_of(recipe, target, checkpoint, interface) if is_checkpoint else load_recipe(Path(recipe))
    name, folder = target or loaded.only_target(), out or DEFAULT_BUILD_FOLDER / loaded.name
    check_asked(loaded, name, samples, folder)
    from elit_export.cli.advice import after_build
    from elit_export.compiler.build import NOTHING_CHANGED, compile_bundle  # torch, when the recipe is right
    from elit_export.report.inspection import plan_set_facts

    stages: list[str] = []
    with progress_bar() as progress:
        bar = build_progress(progress)

        def on_stage(stage: str, share: float) -> None:
            stages.append(stage)
            bar(stage, share)

        bundle = compile_bundle(
            loaded,
            name,
            out=folder,
            checkpoint=checkpoint,
            interface=interface,
            samples=samples,
            trust=trust,
            progress=on_stage,
        )
    built = bundle.manifest.plan_set(name, loaded.target(name).precision)
    facts = plan_set_facts(built, bundle.manifest)
    write_json({"bundle": str(folder), "changed": stages != [NOTHING_CHANGED], "plan_set": facts}, json_to)
    if stages == [NOTHING_CHANGED]:
        say(f"{folder}: nothing changed, nothing done", json_to=json_to)
        return
    show(*plan_set_tables(facts), json_to=json_to)
    say(f"wrote {folder}; next: {after_build(folder, bundle.manifest, built)}", json_to=json_to)


def names_checkpoint(text: str) -> bool:
    """Is it a checkpoint, not a recipe?"""
    from elit_export.checkpoints.stored import SHIPPED_PREFIX, SUFFIXES

    return text.startswith(SHIPPED_PREFIX) or Path(text).suffix in SUFFIXES or Path(text).is_dir()


def recipe_of(path: str, target: str | None, checkpoint: str | None, interface: Path | None) -> Recipe:
    """The usual recipe of a checkpoint; raises InputError for a second checkpoint."""
    from elit_export.cli.init import usual_recipe
    from elit_export.compiler.usual_recipe import USUAL_TARGETS

    if checkpoint is not None:
        raise InputError(f"--checkpoint {checkpoint}: {path} is a checkpoint too", "give one of them")
    recipe: Recipe = usual_recipe(
        path, [target] if target else list(USUAL_TARGETS), interface, {}, beside=None
    ).recipe()
    return recipe

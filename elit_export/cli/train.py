"""train: a model on images."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from elit_export.bundle.atomic import append_text, check_writable
from elit_export.cli.common import (
    FOLDER,
    JSON_OPTION,
    Count,
    complain,
    progress_bar,
    say,
    show,
    stop_requested,
    write_json,
)
from elit_export.cli.tables.layout import table
from elit_export.errors import InputError
from elit_export.models.registry import CLASS_BACKBONES, backbone_named
from elit_export.spec import QK_NORM_KINDS, RELEASED_BACKBONE, DataFacts, ModelSpec, limits

if TYPE_CHECKING:
    from elit_export.training.data import LabelledImages


def parse_split(_ctx: click.Context, _param: click.Parameter, value: str) -> tuple[int, int, int]:
    parts = value.split("-")
    if len(parts) != 3 or not all(re.fullmatch(r"\d+", part, re.ASCII) for part in parts):
        raise click.BadParameter(f"{value!r} is not HEAD-CORE-TAIL, e.g. 1-8-1")
    try:
        head, core, tail = (limits.BLOCKS.whole(part, "a part of it") for part in parts)
    except InputError as error:
        raise click.BadParameter(str(error)) from error
    return head, core, tail


@click.command()
@click.argument("data", type=FOLDER)
@click.option("--out", type=FOLDER, required=True, help="Folder for state.pt, model.safetensors and train.jsonl.")
@click.option(
    "--size",
    type=Count(limits.SIDE),
    default=32,
    show_default=True,
    help="Image side; data is padded or cropped to it.",
)
@click.option("--patch", type=Count(limits.SIDE), default=4, show_default=True)
@click.option(
    "--group",
    type=Count(limits.GROUP_SIDE),
    default=4,
    show_default=True,
    help="Group side in tokens; its square is J.",
)
@click.option("--width", type=Count(limits.WIDTH), default=128, show_default=True)
@click.option("--heads", type=Count(limits.HEADS), default=4, show_default=True)
@click.option("--split", default="1-8-1", show_default=True, callback=parse_split, help="Blocks HEAD-CORE-TAIL.")
@click.option("--backbone", type=click.Choice(CLASS_BACKBONES), default=RELEASED_BACKBONE, show_default=True)
@click.option("--rope", is_flag=True, help="Rotary embedding (RoPE) of queries and keys by their 2-D positions.")
@click.option("--qk-norm", type=click.Choice(["none", *QK_NORM_KINDS]), default="none", show_default=True)
@click.option("--steps", type=Count(limits.TRAINING_STEPS), default=4500, show_default=True)
@click.option("--batch-size", type=Count(limits.BATCH), default=128, show_default=True)
@click.option("--learning-rate", default=1e-3, show_default=True)
@click.option("--warmup-steps", type=Count(limits.TRAINING_STEPS), default=200, show_default=True)
@click.option("--ema-decay", default=0.999, show_default=True)
@click.option("--label-dropout", default=0.1, show_default=True)
@click.option(
    "--min-kept", type=Count(limits.BUDGETS), default=1, show_default=True, help="Smallest number of latents drawn."
)
@click.option("--full-share", default=0.25, show_default=True, help="Share of steps at the full budget.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--save-every",
    type=Count(limits.TRAINING_STEPS),
    default=200,
    show_default=True,
    help="Steps between two saved states.",
)
@click.option("--class-names", default="", help="Comma-separated, for IDX data.")
@click.option("--half", is_flag=True, help="Store the final weights as float16.")
@JSON_OPTION
def train(
    *,
    data: Path,
    out: Path,
    size: int,
    patch: int,
    group: int,
    width: int,
    heads: int,
    split: tuple[int, int, int],
    backbone: str,
    rope: bool,
    qk_norm: str,
    save_every: int,
    class_names: str,
    half: bool,
    json_to: str | None,
    **choices: Any,
) -> None:
    """Train a model on DATA: IDX files, or one folder of images per class. Run again to resume.

    With more --steps a run is extended: the learning rate goes on along the cosine of that many steps.

    Held-out images (IDX t10k, or a folder test/) give the velocity error at every budget.
    """
    from elit_export.training.data import has_split, load_images

    state, weights, errors = files_in(out)
    names = [name.strip() for name in class_names.split(",") if name.strip()]
    images = load_images(data, split="train", size=size, class_names=names)
    import torch  # takes seconds, of which refused data costs none

    from elit_export.checkpoints.native import load_checkpoint, save_checkpoint
    from elit_export.cost.params import parameters
    from elit_export.training.trainer import TrainConfig, Trainer

    shape = {"input_size": size, "patch_size": patch, "group_size": group, "hidden_size": width, "num_heads": heads}
    spec = spec_for(images, split, qk_norm, backbone, rope=rope, **shape)
    limits.TRAINED_PARAMETERS.check(
        parameters(spec).total, "the size of this model", "train a narrower or a shallower one"
    )
    facts = DataFacts(kind="pixels", class_names=images.class_names)
    trainer = Trainer(spec, facts, images, TrainConfig(**choices))
    resume(trainer, state, json_to)
    run_training(trainer, state, save_every)
    save_checkpoint(weights, trainer.ema, dtype=torch.float16 if half else torch.float32)
    say(f"wrote {weights}", json_to=json_to)
    held_out_facts = None
    if has_split(data, "test"):
        held_out = load_images(data, split="test", size=size, class_names=images.class_names)
        held_out_facts = report_held_out(load_checkpoint(weights), held_out, errors, json_to)
    write_json({"weights": str(weights), "step": trainer.step, "held_out": held_out_facts}, json_to)


def spec_for(
    images: LabelledImages, split: tuple[int, int, int], qk_norm: str, backbone: str, *, rope: bool, **shape: int
) -> ModelSpec:
    """The model that the options describe, for the channels and classes of some images."""
    head, core, tail = split
    return ModelSpec(
        in_channels=images.images.shape[1],
        num_classes=images.num_classes,
        head_depth=head,
        core_depth=core,
        tail_depth=tail,
        qk_norm=qk_norm != "none",
        qk_norm_kind="layer" if qk_norm == "none" else qk_norm,
        mlp_ratio=4.0,
        backbone=backbone,
        rope=rope,
        **shape,
        **backbone_named(backbone).fields(core),
    )


def files_in(out: Path) -> list[Path]:
    """Return the files that a training writes; raises OSError before it begins."""
    files = [out / name for name in ("state.pt", "model.safetensors", "held_out.json")]
    for path in files:
        check_writable(path)
    return files


def resume(trainer: Any, state: Path, json_to: str | None) -> None:
    """Go on where an earlier run stopped, if one did, and say what other --steps change."""
    if state.exists():
        planned, steps = trainer.resume(state), trainer.config.steps
        say(f"resumed at step {trainer.step}", json_to=json_to)
        if planned != steps:
            rate = f"the learning rate goes on along the cosine of all {steps}, from {trainer.learning_rate():.2g}"
            say(f"the run is of {steps} steps now, it was of {planned}; {rate}", json_to=json_to)


def run_training(trainer: Any, state: Path, save_every: int) -> None:
    """Train to the end with a progress bar; Ctrl-C saves the state and stops."""
    with progress_bar() as progress, stop_requested() as stop:
        task = progress.add_task("training", total=trainer.config.steps, completed=trainer.step)
        losses: list[float] = []
        for record in trainer.run():
            losses.append(record.loss)
            progress.update(task, completed=record.step, description=f"loss {record.loss:.4f}")
            if record.step % save_every == 0 or record.step == trainer.config.steps or stop:
                trainer.save(state)
                facts = asdict(record) | {"mean_loss": sum(losses) / len(losses)}
                append_text(state.with_name("train.jsonl"), json.dumps(facts) + "\n")
                losses.clear()
            if stop:
                break
    if stop:
        complain(f"interrupted at step {trainer.step}; {state} is saved, run the same command to go on")
        sys.exit(130)


def report_held_out(model: Any, images: Any, path: Path, json_to: str | None) -> list[dict[str, Any]]:
    """Show the error at every budget and write it into the run's folder; gives it as facts."""
    from elit_export.training.evaluate import held_out_errors

    with progress_bar() as progress:
        errors = list(progress.track(held_out_errors(model, images, seed=0), total=len(model.spec.budgets)))
    columns = ("budget", "velocity MSE", "± s.e.", "above full", "± s.e. (paired)")
    cells = [
        (
            str(error.budget),
            f"{error.mse:.5f}",
            f"{error.standard_error:.5f}",
            f"{error.above_full:+.5f}",
            f"{error.above_full_error:.5f}",
        )
        for error in errors
    ]
    show(table(f"held out: {len(images)} images", columns, cells), json_to=json_to)
    facts = [asdict(error) | {"budget": str(error.budget)} for error in errors]
    write_json(facts, str(path))
    return facts

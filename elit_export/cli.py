"""The command line: the only file that prints or exits."""

from __future__ import annotations

import json
import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from elit_export.errors import ElitExportError
from elit_export.spec import DataFacts, ModelSpec

console = Console()
FOLDER = click.Path(file_okay=False, path_type=Path)


class Commands(click.Group):
    """Turns the package's errors into exit status 2 and Ctrl-C into 130, each in one line."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ElitExportError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(2)
        except KeyboardInterrupt:
            click.echo("interrupted; nothing half-written was left behind", err=True)
            ctx.exit(130)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="elit-export")
def main() -> None:
    """Compile ELIT checkpoints into one engine per compute budget, and sample with them."""
    logging.basicConfig(
        level=logging.WARNING, format="%(message)s", handlers=[RichHandler(show_path=False, show_time=False)]
    )


def progress_bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))


@contextmanager
def stop_requested() -> Iterator[list[int]]:
    """Collect Ctrl-C instead of raising it, so that work stops between two steps; the second one raises."""
    seen: list[int] = []

    def note(number: int, _frame: object) -> None:
        seen.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, previous)


# ---------------------------------------------------------------- train


def parse_split(_ctx: click.Context, _param: click.Parameter, value: str) -> tuple[int, int, int]:
    parts = value.split("-")
    if len(parts) != 3 or not all(part.isdigit() for part in parts):
        raise click.BadParameter(f"{value!r} is not HEAD-CORE-TAIL, e.g. 1-8-1")
    head, core, tail = (int(part) for part in parts)
    return head, core, tail


@main.command()
@click.argument("data", type=FOLDER)
@click.option("--out", type=FOLDER, required=True, help="Folder for state.pt, model.safetensors and train.jsonl.")
@click.option("--size", default=32, show_default=True, help="Image side in pixels; data is padded or cropped to it.")
@click.option("--patch", default=4, show_default=True)
@click.option("--group", default=4, show_default=True, help="Group side in tokens; latents per group = its square.")
@click.option("--width", default=128, show_default=True)
@click.option("--heads", default=4, show_default=True)
@click.option("--split", default="1-8-1", show_default=True, callback=parse_split, help="Blocks HEAD-CORE-TAIL.")
@click.option("--steps", default=4500, show_default=True)
@click.option("--batch-size", default=128, show_default=True)
@click.option("--learning-rate", default=1e-3, show_default=True)
@click.option("--warmup-steps", default=200, show_default=True)
@click.option("--ema-decay", default=0.999, show_default=True)
@click.option("--label-dropout", default=0.1, show_default=True)
@click.option("--min-kept", default=1, show_default=True, help="Smallest number of latents drawn.")
@click.option("--full-share", default=0.25, show_default=True, help="Share of steps at the full budget.")
@click.option("--seed", default=0, show_default=True)
@click.option("--save-every", default=200, show_default=True, help="Steps between two saved states.")
@click.option("--class-names", default="", help="Comma-separated, for IDX data.")
@click.option("--half", is_flag=True, help="Store the final weights as float16.")
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
    save_every: int,
    class_names: str,
    half: bool,
    **choices: Any,
) -> None:
    """Train an ELIT-SiT on DATA: IDX files, or one folder of images per class. Run again to resume."""
    import torch

    from elit_export.checkpoint import save_checkpoint
    from elit_export.training.data import load_images
    from elit_export.training.trainer import TrainConfig, Trainer

    names = [name.strip() for name in class_names.split(",") if name.strip()]
    images = load_images(data, split="train", size=size, class_names=names)
    spec = ModelSpec(
        in_channels=images.images.shape[1],
        input_size=size,
        patch_size=patch,
        hidden_size=width,
        num_heads=heads,
        head_depth=split[0],
        core_depth=split[1],
        tail_depth=split[2],
        group_size=group,
        qk_norm=False,
        mlp_ratio=4.0,
        num_classes=images.num_classes,
    )
    facts = DataFacts(kind="pixels", class_names=images.class_names)
    trainer = Trainer(spec, facts, images, TrainConfig(**choices))
    state = out / "state.pt"
    if state.exists():
        trainer.resume(state)
        console.print(f"resumed at step {trainer.step}")
    run_training(trainer, state, save_every)
    save_checkpoint(out / "model.safetensors", trainer.ema, dtype=torch.float16 if half else torch.float32)
    console.print(f"wrote {out / 'model.safetensors'}")


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
                append_json(state.with_name("train.jsonl"), asdict(record) | {"mean_loss": sum(losses) / len(losses)})
                losses.clear()
            if stop:
                break
    if stop:
        click.echo(f"interrupted at step {trainer.step}; {state} is saved, run the same command to go on", err=True)
        sys.exit(130)


def append_json(path: Path, facts: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(facts) + "\n")


if __name__ == "__main__":
    main()

"""train-classifier: the evaluator that `evaluate` uses."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from elit_export.cli.common import FOLDER, JSON_OPTION, OUTPUT, Count, progress_bar, say, show, write_json
from elit_export.errors import InputError
from elit_export.spec import limits


@click.command("train-classifier")
@click.argument("data", type=FOLDER)
@click.option("--out", type=OUTPUT, required=True, help="The .safetensors file to write.")
@click.option(
    "--size",
    type=Count(limits.SIDE),
    default=32,
    show_default=True,
    help="Image side; data is padded or cropped to it.",
)
@click.option(
    "--width", type=Count(limits.FEATURES), default=32, show_default=True, help="Channels of the first layer."
)
@click.option(
    "--features",
    type=Count(limits.FEATURES),
    default=48,
    show_default=True,
    help="Numbers before the last layer, to 64.",
)
@click.option("--steps", type=Count(limits.TRAINING_STEPS), default=5600, show_default=True)
@click.option("--batch-size", type=Count(limits.BATCH), default=64, show_default=True)
@click.option("--learning-rate", default=2e-3, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--class-names", default="", help="Comma-separated, for IDX data.")
@JSON_OPTION
def train_classifier(
    *,
    data: Path,
    out: Path,
    size: int,
    width: int,
    features: int,
    class_names: str,
    json_to: str | None,
    **choices: Any,
) -> None:
    """Train the evaluator of `evaluate`, on DATA: IDX files, or one folder of images per class.

    Held-out images (IDX t10k, or a folder test/) give its accuracy, and how far real images are from each other.
    """
    from elit_export.cli.tables.bench import baselines_table
    from elit_export.evaluate.evaluator import save_evaluator
    from elit_export.evaluate.statistics import ClassifierSpec
    from elit_export.training import classifier
    from elit_export.training.data import has_split, load_images

    names = [name.strip() for name in class_names.split(",") if name.strip()]
    images = load_images(data, split="train", size=size, class_names=names)
    if not has_split(data, "test"):
        raise InputError(
            f"{data}: no held-out images to measure accuracy and the real-vs-real baseline",
            "add IDX t10k files or a folder test/",
        )
    held_out = load_images(data, split="test", size=size, class_names=images.class_names)
    spec = ClassifierSpec(
        channels=images.images.shape[1], size=size, num_classes=images.num_classes, width=width, features=features
    )
    config = classifier.ClassifierConfig(**choices)
    classifier.check_data(spec, images, held_out, config)
    with progress_bar() as progress:
        task = progress.add_task("training", total=config.steps)
        trained = classifier.train_classifier(
            spec,
            images,
            config,
            on_step=lambda step, loss: progress.update(task, completed=step, description=f"loss {loss:.3f}"),
        )
    facts = classifier.evaluator_facts(trained, images, held_out, command=command_line(click.get_current_context()))
    save_evaluator(out, trained, facts)
    show(baselines_table(facts), json_to=json_to)
    say(f"wrote {out}", json_to=json_to)
    write_json(
        {"test_accuracy": facts.test_accuracy, "floors": [asdict(baseline) for baseline in facts.floors]}, json_to
    )


def command_line(context: click.Context) -> str:
    """The command as it was typed, with every option that decides the result."""
    options = [param for param in context.command.params if isinstance(param, click.Option) and param.name != "json_to"]
    values = {option.opts[0]: context.params[str(option.name)] for option in options}
    words = [word for name, value in values.items() if value != "" for word in (name, str(value))]
    return shlex.join(["elit-export", "train-classifier", str(context.params["data"]), *words])

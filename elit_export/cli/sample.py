"""sample: images from a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np

from elit_export.arrays import Pixels
from elit_export.bundle.atomic import atomic_write
from elit_export.bundle.reading import Bundle
from elit_export.cli.common import FILE, FOLDER, progress_bar, say, say_accepted
from elit_export.cli.prompts import Told, told_options
from elit_export.errors import InputError
from elit_export.runtime.choices import DEFAULTS, checked_choices
from elit_export.runtime.images import DECODER_REMEDY, grid, zoom_of
from elit_export.runtime.opening import chosen_plan_set
from elit_export.runtime.pipeline import Pipeline, Subjects
from elit_export.runtime.prompts import Prompts
from elit_export.runtime.samplers import SAMPLERS
from elit_export.spec import DataFacts, ModelSpec


@click.command()
@click.argument("bundle", type=FOLDER)
@click.option("--out", type=FILE, default=Path("samples.png"), show_default=True, help="A .npz is written beside it.")
@click.option("--labels", default="", help="E.g. 3,3,7 or 0-9 or class names.  [default: the first ten classes]")
@told_options
@click.option(
    "--images", type=click.IntRange(min=1), default=1, show_default=True, help="Of each prompt or label, all different."
)
@click.option("--seed", default=DEFAULTS["seed"], show_default=True)
@click.option("--steps", default=DEFAULTS["steps"], show_default=True)
@click.option("--schedule", default="full", show_default=True, help="full, 4, 0-9:quarter,10-19:full, 0.0-0.5:full,…")
@click.option("--guidance", default="none", show_default=True, help="none, cfg:3, ccfg:4@sixteenth, autoguidance:2@2")
@click.option("--guidance-interval", type=(float, float), default=(0.0, 1.0), show_default=True, metavar="LOW HIGH")
@click.option("--sampler", default=DEFAULTS["sampler"], show_default=True, help=", ".join(SAMPLERS))
@click.option("--time-grid", default="linear", show_default=True, help="linear or shift:2.0")
@click.option("--cache", default="none", show_default=True, help="Reuse steps: teacache:0.1, static:every@2, …")
@click.option("--target", help="Needed if the bundle has several.")
@click.option("--precision", help="Needed if the target has several.")
def sample(
    bundle: Path,
    out: Path,
    labels: str,
    told: Told,
    images: int,
    target: str | None,
    precision: str | None,
    **choices: Any,
) -> None:
    """Sample images from BUNDLE into a PNG grid and a .npz."""
    if out.suffix not in ("", ".png", ".npz"):
        raise InputError(f"--out {out}: pictures are written as .png")
    arrays = out.with_suffix(".npz")
    told.refuse_to_overwrite(out, arrays)
    opened = Bundle.open(bundle)
    plan_set = chosen_plan_set(opened.manifest.plan_sets, target, precision)
    model = opened.manifest.model
    chosen = checked_choices(model.spec, **choices)
    unopened = Pipeline.unopened(opened, plan_set)

    def rehearse(subjects: Subjects) -> Subjects:
        """As many images as are wanted; raises what the sampling itself would before its first step."""
        every = repeated(subjects, images)
        unopened.steps(every, **choices)
        return every

    if model.spec.text_width:
        subjects = repeated(told.prompts(model.spec, labels, chosen, plan_set.longest_text, rehearse), images)
    else:
        told.refuse_for_classes()
        subjects = rehearse(parse_labels(labels, model.spec, model.data))
    with Pipeline.load(bundle, target=target, precision=precision) as pipeline:
        with progress_bar() as progress:
            task = progress.add_task("sampling", total=choices["steps"])
            made = pipeline.sample(
                subjects, on_step=lambda record: progress.update(task, completed=record.index + 1), **choices
            )
        with atomic_write(arrays) as temporary:  # before they are decoded, which may fail
            shown: dict[str, Any] = {} if isinstance(subjects, Prompts) else {"labels": made.labels}
            np.savez(temporary, latents=made.latents, **shown)
        pictures = pipeline.decode(made.latents) if pipeline.makes_pictures else None
    say_accepted(opened, plan_set)
    say(made.summary())
    if choices["cache"] != "none":
        say(f"cache {choices['cache']}: {made.cache_summary()}")
    if pictures is None:
        say(f"wrote {arrays}; these are latents of a VAE ({made.data.vae}): for a PNG, {DECODER_REMEDY}")
        return
    save_grid(pictures, out.with_suffix(".png"))
    say(f"wrote {out.with_suffix('.png')} and {arrays}")


def repeated(subjects: Subjects, times: int) -> Subjects:
    """Each so many times in a row."""
    if isinstance(subjects, Prompts):
        return subjects.repeated(times)
    return [label for label in subjects for _ in range(times)]


def save_grid(images: Pixels, path: Path) -> None:
    """Ten to a row; small ones twice as large."""
    zoom = zoom_of(images, 2)
    with atomic_write(path) as temporary:
        grid([images[i : i + 10] for i in range(0, len(images), 10)], zoom=zoom).save(temporary)


def parse_labels(text: str, spec: ModelSpec, data: DataFacts) -> list[int]:
    """`3,3,7`, `0-9`, class names, or nothing for the first ten classes; raises InputError."""
    if not text:
        return list(range(min(10, spec.num_classes)))
    names = {name.lower(): label for label, name in enumerate(data.class_names)}
    labels: list[int] = []
    for part in (part.strip() for part in text.split(",")):
        first, _, last = part.partition("-")
        if part.lower() in names:
            labels.append(names[part.lower()])
        elif part.isdecimal():
            labels.append(int(part))
        elif first.isdecimal() and last.isdecimal() and int(first) <= int(last):
            labels += range(int(first), int(last) + 1)
        else:
            known = f"; class names: {', '.join(data.class_names)}" if names else ""
            raise InputError(f"label {part!r} is neither a number, a range like 0-9 nor a class name{known}")
    return labels

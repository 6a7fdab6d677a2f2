"""sample: images from a bundle."""

from __future__ import annotations

from pathlib import Path

import click

from elit_export.cli.common import FILE, FOLDER, TRUST_OPTION, Count, progress_bar, say, say_accepted
from elit_export.cli.prompts import HOW, PromptOptions, prompt_options
from elit_export.cli.sampling_options import sampling_options
from elit_export.errors import InputError
from elit_export.runtime.conditioning import Labels, LabelsLike, as_conditioning, kind_of
from elit_export.runtime.labels import parse_labels
from elit_export.runtime.options import SamplingOptions, resolve
from elit_export.runtime.prompts import Prompts
from elit_export.runtime.request import check_calls, prepare
from elit_export.runtime.sample import DTYPES, save_arrays, save_grid
from elit_export.spec import ModelSpec
from elit_export.spec.limits import IMAGES

DEFAULT_CLASSES = 10  # without --labels


@click.command()
@click.argument("bundle", type=FOLDER)
@click.option("--out", type=FILE, default=Path("samples.png"), show_default=True, help="A .npz is written beside it.")
@click.option(
    "--labels",
    default="",
    help="E.g. 3,3,7 or 0-9 or class names.  [default: the first ten classes, or the next ten after --first-image]",
)
@prompt_options
@click.option(
    "--images", type=Count(IMAGES), default=1, show_default=True, help="Of each prompt or label, all different."
)
@sampling_options
@click.option(
    "--dtype", type=click.Choice(DTYPES), default=DTYPES[0], show_default=True, help="Of the numbers in the .npz."
)
@click.option("--target", help="Needed if the bundle has several.")
@click.option("--precision", help="Needed if the target has several.")
@TRUST_OPTION
def sample(
    bundle: Path,
    out: Path,
    labels: str,
    described: PromptOptions,
    images: int,
    options: SamplingOptions,
    dtype: str,
    target: str | None,
    precision: str | None,
    trust: bool,
) -> None:
    """Sample images from BUNDLE into a PNG grid and a .npz."""
    from elit_export.bundle.reading import Bundle
    from elit_export.runtime.images import DECODER_REMEDY
    from elit_export.runtime.opening import check_verified, chosen_plan_set, coverage_of
    from elit_export.runtime.pipeline import Pipeline

    if out.suffix not in ("", ".png", ".npz"):
        raise InputError(f"--out {out}: pictures are written as .png")
    arrays = out.with_suffix(".npz")
    described.refuse_to_overwrite(out, arrays)
    opened = Bundle.open(bundle, trust=trust)
    plan_set = chosen_plan_set(opened.manifest.plan_sets, target, precision)
    check_verified(plan_set, opened.folder)
    model, coverage = opened.manifest.model, coverage_of(opened, plan_set)
    resolved = resolve(model.spec, options)
    if kind_of(model.spec) is Prompts:
        refuse_labels(labels)
        shown: LabelsLike = described.prompts(model.spec, coverage, resolved, images)
    else:
        described.refuse_for_classes()
        first = options.first_image // images
        shown = parse_labels(labels, model.spec, model.data) if labels else classes_from(first, model.spec)
    once = as_conditioning(shown, model.spec, model.data)
    IMAGES.check(len(once) * images, "the number of images, --images of each label or prompt,")
    check_calls(coverage, resolved, len(once) * images, once.tokens, once.null_tokens)  # before it is repeated
    request = prepare(model.spec, coverage, once.repeated(images), resolved)
    with Pipeline.of(opened, plan_set) as pipeline:
        with progress_bar() as progress:
            task = progress.add_task("sampling", total=request.records)
            made = pipeline.run(request, lambda _: progress.update(task, advance=1))
        save_arrays(made, arrays, dtype)  # before they are decoded, which may fail
        pictures = pipeline.decode(made.latents) if pipeline.makes_pictures else None
    say_accepted(opened, plan_set)
    say(made.summary())
    if resolved.policy:
        say(f"cache {options.cache}: {made.cache_summary()}")
    if pictures is None:
        say(f"wrote {arrays}; these are latents of a VAE ({made.data.vae}): for a PNG, {DECODER_REMEDY}")
        return
    save_grid(pictures, out.with_suffix(".png"))
    say(f"wrote {out.with_suffix('.png')} and {arrays}")


def classes_from(first: int, spec: ModelSpec) -> Labels:
    """Ten classes in their order, from the one that has this number; after the last comes the first."""
    return Labels.numbered(spec, range(first, first + min(DEFAULT_CLASSES, spec.num_classes)), None)


def refuse_labels(labels: str) -> None:
    """Raise InputError for labels of a model with text."""
    if labels:
        raise InputError(f"--labels {labels}: this model takes text", HOW)

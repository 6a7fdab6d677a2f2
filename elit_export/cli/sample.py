"""sample: images from a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from elit_export.bundle.atomic import check_writable, is_stream
from elit_export.cli.common import FILE, FOLDER, TRUST_OPTION, Count, progress_bar, say, say_accepted
from elit_export.cli.opened import Opened
from elit_export.cli.prompts import HOW, PromptOptions, prompt_options
from elit_export.cli.sampling_options import sampling_options
from elit_export.errors import InputError
from elit_export.runtime.arguments import Given, SamplingArguments, naming_preset
from elit_export.runtime.conditioning import Labels, LabelsLike, as_conditioning, kind_of
from elit_export.runtime.labels import parse_labels
from elit_export.runtime.options import SamplingOptions, resolve
from elit_export.runtime.presets import Presets, chosen_plan_set, merged
from elit_export.runtime.prompts import Prompts
from elit_export.runtime.request import Request, check_calls, prepare
from elit_export.runtime.sample import DTYPES, save_arrays, save_grid
from elit_export.spec import ModelSpec
from elit_export.spec.limits import IMAGES

if TYPE_CHECKING:
    from elit_export.bundle.reading import Bundle
    from elit_export.runtime.sample import Sample

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
    given: Given[SamplingArguments],
    dtype: str,
    target: str | None,
    precision: str | None,
    trust: bool,
) -> None:
    """Sample images from BUNDLE into a PNG grid and a .npz."""
    from elit_export.bundle.reading import with_current
    from elit_export.runtime.opening import check_verified, coverage_of
    from elit_export.runtime.pipeline import Pipeline

    if out.suffix not in ("", ".png", ".npz"):
        raise InputError(f"--out {out}: pictures are written as .png")
    files = files_of(out)
    described.refuse_to_overwrite(out, files.arrays)

    def ready(opened: Bundle) -> tuple[Opened, Request, SamplingOptions]:
        plan_set = chosen_plan_set(opened, target, precision, given.values.get("preset"))
        options = merged(given, Presets(opened, plan_set))
        check_verified(plan_set, opened.folder)
        model, coverage = opened.manifest.model, coverage_of(opened, plan_set)
        with naming_preset(options):
            resolved = resolve(model.spec, options, coverage.solvers, coverage.no_solvers)
        if kind_of(model.spec) is Prompts:
            refuse_labels(labels)
            shown: LabelsLike = described.prompts(model.spec, coverage, resolved, images)
        else:
            described.refuse_for_classes()
            shown = parse_labels(labels, model.spec, model.data) if labels else first_classes(model.spec)
        once = as_conditioning(shown, model.spec, model.data)
        numbers = range(options.first_image, options.first_image + len(once) * images)
        IMAGES.check(len(numbers), "the number of images, --images of each label or prompt,")
        check_calls(coverage, resolved, len(numbers), once.tokens, once.null_tokens)  # before it is repeated
        goes_on = isinstance(once, Labels) and not labels
        repeated = classes_of(numbers, images, model.spec) if goes_on else once.repeated(images)
        request = prepare(model.spec, coverage, repeated, resolved)
        return Opened(opened, plan_set, Pipeline.of(opened, plan_set)), request, options

    opened, request, options = with_current(bundle, ready, trust=trust)
    with opened.pipeline as pipeline:
        with progress_bar() as progress:
            task = progress.add_task("sampling", total=request.records)
            made = pipeline.run(request, lambda _: progress.update(task, advance=1))
        if not (files.is_stream and pipeline.makes_pictures):
            save_arrays(made, files.arrays, dtype)  # before they are decoded, which may fail
        pictures = pipeline.decode(made.latents) if pipeline.makes_pictures else None
    if pictures is not None:
        save_grid(pictures, files.picture)
    report(made, opened, files, f"cache {options.cache}: {made.cache_summary()}" if request.policy else "")


def report(made: Sample, opened: Opened, files: SampleFiles, of_cache: str) -> None:
    """Say how it went and what was written, beside what goes into a stream."""
    from elit_export.runtime.images import DECODER_REMEDY

    json_to = "-" if files.is_stream else None
    say_accepted(opened.bundle, opened.plan_set, json_to=json_to)
    say(made.summary(), json_to=json_to)
    if of_cache:
        say(of_cache, json_to=json_to)
    if not opened.pipeline.makes_pictures:
        note = f"these are latents of a VAE ({made.data.vae}): for a PNG, {DECODER_REMEDY}"
        say(f"wrote {files.arrays}; {note}", json_to=json_to)
    elif files.is_stream:
        say(f"wrote {files.picture}", json_to=json_to)
    else:
        say(f"wrote {files.picture} and {files.arrays}")


@dataclass(frozen=True)
class SampleFiles:
    """Where a sampling goes. A stream takes the pictures alone, or the latents where no pictures can be made."""

    picture: Path
    arrays: Path

    @property
    def is_stream(self) -> bool:
        return self.picture == self.arrays


def files_of(out: Path) -> SampleFiles:
    """Raises OSError if one of them cannot be written."""
    if not out.suffix and is_stream(out):
        files = SampleFiles(out, out)
    else:
        files = SampleFiles(out.with_suffix(".png"), out.with_suffix(".npz"))
    for path in (files.arrays, files.picture):
        check_writable(path)
    return files


def first_classes(spec: ModelSpec) -> Labels:
    """The first ten classes, or all if there are fewer."""
    return Labels(tuple(range(min(DEFAULT_CLASSES, spec.num_classes))))


def classes_of(numbers: Sequence[int], images: int, spec: ModelSpec) -> Labels:
    """The class of each image by its number: `images` of each class in turn; after the last comes the first."""
    return Labels.numbered(spec, [number // images for number in numbers], None)


def refuse_labels(labels: str) -> None:
    """Raise InputError for labels of a model with text."""
    if labels:
        raise InputError(f"--labels {labels}: this model takes text", HOW)

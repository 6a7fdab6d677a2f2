"""bench samplers --whole-image: put presets and named samplings beside PyTorch eager."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from elit_export.cli.bench.options import advancing, opened_pipeline, torch_model
from elit_export.cli.common import FILE, NAME, Count, conclude, limits_in, progress_bar, refuse_alone, say_accepted
from elit_export.errors import InputError
from elit_export.spec import Precision, limits

if TYPE_CHECKING:
    from elit_export.bench.contenders import Choices, Contender, SamplingConfig
    from elit_export.bench.whole_image import Distances, WholeImageResult
    from elit_export.bundle.manifest import PlanSet
    from elit_export.bundle.reading import Bundle
    from elit_export.runtime.pipeline import Pipeline
    from elit_export.runtime.request import Samplable

FLAG = "--whole-image"
IMAGES, GUIDANCE = 64, "cfg:2"
# What only it takes. A default stands here, so that an option without the flag is refused and not ignored.
DEFAULTS = {"rows": 1, "rounds": 5, "seed": 2601}
OPTIONS = {
    "--checkpoint": click.option(
        "--checkpoint", type=NAME, metavar="RECIPE|CHECKPOINT", help=f"PyTorch's weights, which {FLAG} needs."
    ),
    "--interface": click.option("--interface", type=FILE, help="Read and Write for a CHECKPOINT that is a folder."),
    "--row": click.option(
        "--row",
        multiple=True,
        metavar="SAMPLER:STEPS[@SCHEDULE]",
        help=f"With {FLAG}: a sampling beside the presets, e.g. ab3:14, solver:8.",
    ),
    "--rows": click.option(
        "--rows", type=Count(limits.IMAGES), help=f"With {FLAG}: images at once.  [default: {DEFAULTS['rows']}]"
    ),
    "--rounds": click.option(
        "--rounds", type=Count(limits.ROUNDS), help=f"With {FLAG}: times of each.  [default: {DEFAULTS['rounds']}]"
    ),
    "--seed": click.option(
        "--seed",
        type=click.IntRange(min=0),
        help=f"With {FLAG}: of the noise; none that a solver was calibrated on.  [default: {DEFAULTS['seed']}]",
    ),
    "--classifier": click.option(
        "--classifier",
        type=NAME,
        metavar="FILE",
        help=f"With {FLAG}: what train-classifier made.  [default: the shipped one, where it fits]",
    ),
    "--no-quality": click.option("--no-quality", is_flag=True, help=f"With {FLAG}: times alone, for random weights."),
}
UNMEASURED = dict.fromkeys(("error", "gain", "distance", "change_over_error"), "leave --no-quality out")


def WHOLE_IMAGE_OPTIONS(command: Callable[..., Any]) -> Callable[..., Any]:  # noqa: N802 (used as the options beside it are)
    """Pack the options of `--whole-image` into the argument `whole`, which is None without the flag."""

    @wraps(command)
    def packed(*, whole_image: bool, **options: Any) -> Any:
        values = {flag: options.pop(flag.lstrip("-").replace("-", "_")) for flag in OPTIONS}
        given = {flag: value for flag, value in values.items() if is_given(value)}
        if given and not whole_image:
            raise InputError(f"{next(iter(given))} is of {FLAG}", "give that too, or leave it out")
        return command(whole=Asked.of(given) if whole_image else None, **options)

    decorated: Callable[..., Any] = packed
    for option in reversed(OPTIONS.values()):
        decorated = option(decorated)
    return click.option(FLAG, is_flag=True, help="Time, error and quality of whole images beside PyTorch.")(decorated)


def is_given(value: Any) -> bool:
    """Whether the value of an option was typed, which a 0 may be: 0 equals False."""
    return value is not None and value is not False and value != ()


@dataclass(frozen=True)
class Asked:
    """The options that only `--whole-image` takes."""

    checkpoint: str
    interface: Path | None
    named: tuple[str, ...]
    rows: int
    rounds: int
    seed: int
    classifier: str | None
    quality: bool

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Asked:
        """Take what was given, by flag; raises InputError if that is no checkpoint."""
        refuse_alone(given.get("--interface"), given.get("--checkpoint"))
        if "--checkpoint" not in given:
            raise InputError(f"{FLAG} compares with PyTorch", "give --checkpoint RECIPE or --checkpoint FILE too")
        if "--classifier" in given and "--no-quality" in given:
            raise InputError("--no-quality leaves out what a classifier sees", "leave --classifier or --no-quality out")
        return cls(
            checkpoint=given["--checkpoint"],
            interface=given.get("--interface"),
            named=given.get("--row", ()),
            classifier=given.get("--classifier"),
            quality="--no-quality" not in given,
            **{name: given.get(f"--{name}", default) for name, default in DEFAULTS.items()},
        )

    def choices(self, images: int | None, guidance: str | None) -> Choices:
        from elit_export.bench.contenders import Choices

        return Choices(
            rows=self.rows,
            rounds=self.rounds,
            images=(IMAGES if images is None else images) if self.quality else 0,
            guidance=GUIDANCE if guidance is None else guidance,
            seed=self.seed,
        )


# ---------------------------------------------------------------- comparing


def compare_with_pytorch(
    bundle: Bundle,
    asked: Asked,
    choices: Choices,
    plan_sets: tuple[str | None, str | None],
    check: Path | None,
    json_to: str | None,
    *,
    every: bool,
) -> None:
    """Do all of it: check, open, measure, show. `plan_sets` are the target and the precision that are asked for."""
    from elit_export.bench.whole_image import WholeImageResult
    from elit_export.cli.tables.whole_image import whole_image_tables

    held_to = limits_in(check, {"whole_image": WholeImageResult}, {} if asked.quality else UNMEASURED)
    found, skipped = checked_contenders(bundle, asked, choices, plan_sets, every=every)
    for plan_set in {contender.plan_set.name: contender.plan_set for contender in found}.values():
        say_accepted(bundle, plan_set, json_to=json_to)
    result = measured(bundle, asked, choices, found, skipped)
    conclude(list(whole_image_tables(result)), {"whole_image": asdict(result)}, held_to, json_to)


def checked_contenders(
    bundle: Bundle, asked: Asked, choices: Choices, plan_sets: tuple[str | None, str | None], *, every: bool
) -> tuple[list[Contender], dict[str, str]]:
    """Return what is compared and why other plan sets are not; raises what a sampling would, before one is opened."""
    from elit_export.bench.contenders import contenders
    from elit_export.bench.whole_image import check_config
    from elit_export.cli.plan_sets import runnable_plan_sets, selected_plan_sets
    from elit_export.runtime.opening import unopened

    runnable, skipped = runnable_plan_sets(bundle, *plan_sets)
    named_on = selected_plan_sets(bundle, *plan_sets, every=every)[0] if asked.named else ()
    found = contenders(bundle, runnable, named_on, named=asked.named, guidance=choices.guidance, seed=choices.seed)
    for contender in found:
        check_config(unopened(bundle, contender.plan_set), contender.options, choices)
    return found, skipped


def measured(
    bundle: Bundle, asked: Asked, choices: Choices, found: Sequence[Contender], skipped: Mapping[str, str]
) -> WholeImageResult:
    from elit_export.bench.whole_image import compare_whole_images
    from elit_export.runtime.opening import unopened

    classifier, no_distance = fitting_classifier(asked, choices, unopened(bundle, found[0].plan_set))
    model = torch_model(bundle, *checkpoint_of(asked))
    from elit_export.verify.reference import torch_pipeline

    with ExitStack() as stack, progress_bar() as progress:
        configs, reference = opened_configs(bundle, choices, found, torch_pipeline(model), stack)
        return compare_whole_images(
            configs,
            reference,
            choices,
            distances=distances_by(classifier, configs[0].pipeline, choices) if classifier else None,
            evaluator=classifier,
            no_distance=no_distance,
            skipped=skipped,
            on_stage=advancing(progress, progress.add_task("", total=None)),
        )


def checkpoint_of(asked: Asked) -> tuple[str, Path | None]:
    """Return checkpoint and interface, those of a recipe if one was named; raises RecipeError or InputError."""
    from elit_export.bundle.recipe import load_recipe
    from elit_export.cli.build import names_checkpoint

    if names_checkpoint(asked.checkpoint):
        return asked.checkpoint, asked.interface
    recipe = load_recipe(Path(asked.checkpoint))
    if recipe.checkpoint is None:
        raise InputError(f"the recipe {asked.checkpoint} names no checkpoint", "give --checkpoint FILE")
    return recipe.checkpoint, asked.interface or (Path(recipe.interface) if recipe.interface else None)


def fitting_classifier(asked: Asked, choices: Choices, on: Samplable) -> tuple[str | None, str]:
    """Return the classifier to judge images by, or None and the reason; raises InputError for one that was named."""
    from elit_export.evaluate.facts import SHIPPED, load_facts
    from elit_export.evaluate.protocol import check_evaluator

    if not asked.quality:
        return None, "--no-quality was given"
    name = asked.classifier or SHIPPED
    try:
        check_evaluator(on, load_facts(name), choices.images)
    except InputError as error:
        if asked.classifier:
            raise
        return None, f"the shipped classifier does not fit: {error.problem}"
    return name, ""


def opened_configs(
    bundle: Bundle, choices: Choices, found: Sequence[Contender], eager: Pipeline, stack: ExitStack
) -> tuple[list[SamplingConfig], tuple[str, Pipeline]]:
    """Open each plan set once; returns PyTorch's config and all others, and what makes the reference solution."""
    from elit_export.bench.backends import EAGER
    from elit_export.bench.contenders import SamplingConfig

    plan_sets = {contender.plan_set.name: contender.plan_set for contender in found}
    solving = fp32_plan_set(bundle, choices) if choices.images else None
    plan_sets |= {solving.name: solving} if solving else {}
    pipelines = {name: stack.enter_context(opened_pipeline(bundle, plan_set)) for name, plan_set in plan_sets.items()}
    decoders = {name: pipeline.decode if pipeline.makes_pictures else None for name, pipeline in pipelines.items()}
    first = next(iter(decoders.values()))  # PyTorch's samples are decoded by it too
    configs = [SamplingConfig(EAGER, EAGER, eager, choices.eager_options, first)]
    for contender in found:
        name = contender.plan_set.name
        configs.append(SamplingConfig(contender.name, name, pipelines[name], contender.options, decoders[name]))
    return configs, (solving.name, pipelines[solving.name]) if solving else (EAGER, eager)


def fp32_plan_set(bundle: Bundle, choices: Choices) -> PlanSet | None:
    """Return a plan set that can solve the ODE for the images: in fp32, at full budget. Without one PyTorch does."""
    from elit_export.bench.whole_image import can_solve
    from elit_export.bundle.manifest import budgets_of
    from elit_export.runtime.opening import incompatibility, unopened

    spec = bundle.manifest.model.spec
    for plan_set in bundle.manifest.plan_sets:
        is_exact = plan_set.precision is Precision.FP32 and spec.full in budgets_of(plan_set, spec)
        is_usable = all(parity.ran for parity in plan_set.parities) and not incompatibility(plan_set)
        if is_exact and is_usable and can_solve(unopened(bundle, plan_set), choices):
            return plan_set
    return None


def distances_by(classifier: str, on: Pipeline, choices: Choices) -> Distances:
    """Return a function that judges sets of pictures, each paired with the first."""
    import numpy as np

    from elit_export.bench.whole_image import Distance
    from elit_export.evaluate.evaluator import load_evaluator
    from elit_export.evaluate.paired import Judge
    from elit_export.runtime.conditioning import numbered

    labels = numbered(on.spec, range(choices.images), None).labels
    judge = Judge(load_evaluator(classifier), np.array(labels), choices.seed)

    def distances(sets: Sequence[Any]) -> list[Distance]:
        judged = [judge.judged(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))) for pictures in sets]
        pairs = [(each.frechet, each.frechet_change(judged[0])) for each in judged]
        return [Distance(own.value, own.error, change.value, change.error) for own, change in pairs]

    return distances

"""tune: search samplings within a time or of a quality, and write the best into the bundle as presets."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource
from rich.progress import Progress

from elit_export.bundle.atomic import NAME_PATTERN, check_writable
from elit_export.cli.common import (
    FILE,
    FOLDER,
    JSON_OPTION,
    NAME,
    OUTPUT,
    TRUST_OPTION,
    Count,
    progress_bar,
    say,
    say_accepted,
    say_lines,
    show,
    write_json,
)
from elit_export.cli.tools import naming_the_extra
from elit_export.errors import InputError
from elit_export.spec import limits

if TYPE_CHECKING:
    from elit_export.bundle.manifest import PlanSet
    from elit_export.bundle.reading import Bundle
    from elit_export.evaluate.protocol import ImageEvaluator
    from elit_export.tune.run import Tuned
    from elit_export.tune.search import Job
    from elit_export.tune.target import Target

ALL = "all"  # in place of a target's name
NO_CLASSIFIER = "none"  # in place of a file
MIN_IMAGES = 32
NOT_REPEATED = {"json_to", "plot", "study", "trust"}  # options that make no other presets
MAX_SEED = (1 << 64) - 2  # the next one is a seed too


@click.command()
@click.argument("bundle", type=FOLDER)
@click.option("--latency", metavar="TIME", help="At most so long for one sampling with its decoder, e.g. 40ms.")
@click.option("--speedup", type=float, help="At least so many times as fast as 50 Euler steps at the largest budget.")
@click.option("--min-sqnr", type=float, metavar="DB", help="At least so many dB to the reference solution.")
@click.option("--rows", type=Count(limits.ROWS), default=1, show_default=True, help="Images of one sampling.")
@click.option("--guidance", help="That of the reference.  [default: cfg:2, none for a model that takes text]")
@click.option(
    "--classifier", type=NAME, metavar="FILE", help="The evaluator, or none.  [default: the shipped if it fits]"
)
@click.option("--images", type=Count(limits.IMAGES), default=256, show_default=True, help="Of the final measurement.")
@click.option("--trials", type=Count(limits.TRAJECTORIES), default=96, show_default=True, help="Of the search.")
@click.option("--name", type=NAME, help="Make this preset alone.  [default: fast, balanced and best]")
@click.option("--study", type=FILE, help="The file from which a stopped search goes on.  [default: BUNDLE-HASH.tune]")
@click.option(
    "--seed",
    type=click.IntRange(min=0, max=MAX_SEED),
    default=1000,
    show_default=True,
    help="Of the search; the next is that of the finals. None that a solver was calibrated on.",
)
@click.option("--plot", type=OUTPUT, help="Draw quality against time into a PNG.")
@click.option("--target", "--targets", "target", help="Of the bundle, or all; needed if several can run here.")
@click.option("--precision", help="Of the target; needed if it has several that can run here.")
@TRUST_OPTION
@JSON_OPTION
def tune(bundle: Path, plot: Path | None, trust: bool, json_to: str | None, **asked: object) -> None:
    """Search samplings within a time or of a quality, and write the best into BUNDLE as presets.

    Solver or sampler, calls, budgets, guidance and step cache are searched together. Stopped at any moment, the search
    goes on where it was when the same command is typed again.
    """
    from elit_export.bundle.reading import Bundle
    from elit_export.bundle.recording import record_presets
    from elit_export.cli.bench.options import drawer
    from elit_export.cli.tables.tune import preset_lines, tune_tables

    options = Asked(**asked)  # type: ignore[arg-type]  # by the names of the options
    draw = drawer("plot_tune", plot)
    opened = Bundle.open(bundle, trust=trust)
    with naming_the_extra("tune"):
        tuned = tuned_by(opened, options, json_to)
    record_presets(opened, tuned.presets)
    draw(tuned.result)
    show(*tune_tables(tuned.result), json_to=json_to)
    write_json({"tune": asdict(tuned.result)}, json_to)
    for title, lines in preset_lines(tuned.result):
        say_lines(title, lines, json_to=json_to)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The options that say what is searched."""

    latency: str | None
    speedup: float | None
    min_sqnr: float | None
    rows: int
    guidance: str | None
    classifier: str | None
    images: int
    trials: int
    name: str | None
    study: Path | None
    seed: int
    target: str | None
    precision: str | None

    @property
    def aim(self) -> Target:
        from elit_export.tune.target import Target, milliseconds

        latency_ms = None if self.latency is None else milliseconds(self.latency)
        return Target(latency_ms, self.speedup, self.min_sqnr)

    @property
    def names(self) -> tuple[str, ...]:
        from elit_export.tune.target import PRESETS

        if self.name is not None and not re.fullmatch(NAME_PATTERN, self.name):
            raise InputError(f"--name {self.name!r} is not a name", "use letters, digits, '.', '_' and '-'")
        return PRESETS if self.name is None else (self.name,)

    def file(self, bundle: Path, of: Mapping[str, Any]) -> Path:
        """Return the study's file: by default one beside the bundle for each thing that is searched."""
        from elit_export.tune.ready import short_hash

        folder = bundle.resolve()
        return self.study or folder.with_name(f"{folder.name}-{short_hash(of)[:8]}.tune")


def tuned_by(bundle: Bundle, asked: Asked, json_to: str | None) -> Tuned:
    """Check everything, open engines, and search."""
    from elit_export.bundle.store import check_recordable
    from elit_export.runtime.pipeline import Pipeline
    from elit_export.tune.ready import belongings
    from elit_export.tune.run import Origin, tune
    from elit_export.tune.study import Study

    plan_sets, skipped = plan_sets_of(bundle, asked)
    for plan_set in plan_sets:
        say_accepted(bundle, plan_set, json_to=json_to)
    job = job_of(bundle, plan_sets, asked)
    check_recordable(bundle.folder)
    of = belongings(bundle, plan_sets, job)
    file = asked.file(bundle.folder, of)
    check_writable(file)
    study = Study(file, of, seed=job.seed)
    say(f"the search is kept in {file}; if it is stopped, type the same command to go on", json_to=json_to)
    origin = Origin(bundle, {each.name: each for each in plan_sets}, skipped, typed_command())
    searched = {job.reference, *origin.plan_sets}
    needed = {each.name: each for each in bundle.manifest.plan_sets if each.name in searched}
    with ExitStack() as stack, progress_bar() as progress:
        pipelines = {name: stack.enter_context(Pipeline.of(bundle, each)) for name, each in needed.items()}
        return tune(job, pipelines, study, origin, shown_in(progress))


def job_of(bundle: Bundle, plan_sets: Sequence[PlanSet], asked: Asked) -> Job:
    """What is to be searched; raises InputError where it cannot be."""
    from elit_export.tune.ready import checked_space, reference_plan_set
    from elit_export.tune.search import Job
    from elit_export.tune.space import usual_guidance

    target, names, images = asked.aim, asked.names, asked.images
    if images < MIN_IMAGES:
        raise InputError(f"{images} images are too few to compare samplings by", f"give --images {MIN_IMAGES} or more")
    guidance = usual_guidance(bundle.manifest.model.spec) if asked.guidance is None else asked.guidance
    space = checked_space(bundle, plan_sets, guidance, rows=asked.rows, images=images, seed=asked.seed)
    evaluator, problem = evaluator_of(bundle, plan_sets[0], asked)
    return Job(
        space=space,
        reference=reference_plan_set(bundle, plan_sets, space, images=images).name,
        evaluator=evaluator,
        no_evaluator=problem,
        target=target,
        names=names,
        rows=asked.rows,
        images=images,
        trials=asked.trials,
        seed=asked.seed,
    )


def plan_sets_of(bundle: Bundle, asked: Asked) -> tuple[Sequence[PlanSet], dict[str, str]]:
    """Return the plan set that is meant, or for `all` each that can run here, and why others cannot."""
    from elit_export.cli.plan_sets import selected_plan_sets

    every = asked.target == ALL
    return selected_plan_sets(bundle, None if every else asked.target, asked.precision, every=every)


def evaluator_of(bundle: Bundle, plan_set: PlanSet, asked: Asked) -> tuple[ImageEvaluator | None, str]:
    """Return the classifier of the options, or the shipped one if it fits the model; or None and why there is none.

    Raises InputError for a classifier that does not fit. With a target in dB none is needed.
    """
    from elit_export.evaluate.facts import SHIPPED, load_facts
    from elit_export.evaluate.protocol import check_evaluator
    from elit_export.runtime.opening import unopened

    if asked.classifier is None and asked.min_sqnr is not None:
        return None, ""
    file = SHIPPED if asked.classifier in (None, NO_CLASSIFIER) else asked.classifier
    try:
        check_evaluator(unopened(bundle, plan_set), load_facts(file), asked.images)
    except InputError as error:
        if asked.classifier not in (None, NO_CLASSIFIER):
            raise
        return None, str(error)
    if asked.classifier == NO_CLASSIFIER:
        return None, "for them leave --classifier none out, or give --classifier FILE"
    with naming_the_extra("an evaluator", otherwise="; or search without one: --classifier none"):
        from elit_export.evaluate.evaluator import load_evaluator
    return load_evaluator(file), ""


def shown_in(progress: Progress) -> Callable[[str, int, int], None]:
    """A bar for each stage; the earlier ones go."""
    task = progress.add_task("", total=None)
    return lambda what, done, total: progress.update(task, description=what, completed=done, total=total)


def typed_command() -> str:
    """Return the command that makes the presets again: what was typed, without where the bundle is and results go."""
    from elit_export.bundle.presets import MADE_BY

    return shlex.join([*MADE_BY, *_typed_words(click.get_current_context())])


def _typed_words(context: click.Context) -> Iterator[str]:
    for param in context.command.params:
        name, value = str(param.name), context.params.get(str(param.name))
        if context.get_parameter_source(name) is not ParameterSource.COMMANDLINE or name in NOT_REPEATED:
            continue
        if isinstance(param, click.Option):
            yield from (max(param.opts, key=len), str(value))

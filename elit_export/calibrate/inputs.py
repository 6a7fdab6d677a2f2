"""Collects calibration samples for quantization: real inputs of a bundle's engines along trajectories.

Every budget is sampled by itself with every guidance, each with its own noise and labels or prompts. From all recorded
rows the requested number is selected, balanced over budgets, and for each budget over t.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from elit_export.arrays import Arrays, Bools
from elit_export.backends.protocols import Array, Engine, to_host
from elit_export.bundle.calibration_inputs import MIN_SAMPLES, CalibrationFacts, CalibrationInputs
from elit_export.bundle.readers import read_toml
from elit_export.errors import CalibrationError, InputError, did_you_mean
from elit_export.runtime.bank import EngineBank, Slot
from elit_export.runtime.conditioning import Labels, LabelsLike
from elit_export.runtime.options import SamplingOptions
from elit_export.runtime.pipeline import Pipeline
from elit_export.runtime.prompts import Prompts, joined
from elit_export.runtime.request import Request
from elit_export.runtime.sampling import Call, sampling_steps
from elit_export.spec import LATENTS, Budget
from elit_export.spec.limits import ROWS, SAMPLES, STEPS, TRAJECTORIES

T_PARTS = 8  # of [0, 1], balanced in the selection
BLOCK = 5  # images that follow each other in the order to select from: a new number would select other samples
CONDITIONING_SEED, SELECTION_SEED = 1, 2  # added to the seed, for independent draws


class SampleRecipe(BaseModel):
    """The trajectories to sample, and the number of `samples` to select from them.

    There are `images` trajectories for each of the `budgets` with each `guidance`, at most `rows` at once. Without
    `budgets` these are the min, opt and max of every profile. The other defaults are those of calibration/fashion.toml.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    images: int = Field(default=10, ge=1)
    steps: int = Field(default=20, ge=1)
    sampler: str = "euler"
    guidance: tuple[str, ...] = Field(default=("none", "cfg:2"), min_length=1, strict=False)
    budgets: tuple[int | str, ...] = Field(default=(), strict=False)
    samples: int = Field(default=256, ge=MIN_SAMPLES)
    seed: int = Field(default=0, ge=0)
    rows: int = Field(default=5, ge=1)

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        for name, limit in {"images": TRAJECTORIES, "steps": STEPS, "samples": SAMPLES, "rows": ROWS}.items():
            limit.check(getattr(self, name), name)
        return self


DEFAULT_RECIPE = SampleRecipe()


def load_sample_recipe(path: Path) -> SampleRecipe:
    """Read and check a recipe; raises CalibrationError naming file and key."""
    try:
        return SampleRecipe.model_validate(read_toml(path, what="the recipe", error=CalibrationError))
    except FileNotFoundError as error:
        raise CalibrationError(f"no recipe at {path}", "leave --recipe out to use the default recipe") from error
    except ValidationError as error:
        raise CalibrationError(f"{path}: " + "; ".join(_problem_text(problem) for problem in error.errors())) from error


def _problem_text(problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] != "extra_forbidden":
        message = problem["msg"].removeprefix("Value error, ")
        return f"{key}: {message[0].lower()}{message[1:]}" if key else message
    near = did_you_mean(key, SampleRecipe.model_fields)
    return f"{key}: unknown key" + (f" ({near})" if near else "")


# ---------------------------------------------------------------- trajectories


@dataclass(frozen=True)
class RecordedRow:
    """The inputs of one row of an engine call.

    `guided` is whether its trajectory was guided, `null` whether it belongs to the unconditional or negative branch.
    `image` is the number of its image among those of all samplings, and `turn` its place among the rows of that image.
    """

    inputs: Arrays
    guided: bool
    null: bool
    image: int
    turn: int

    @property
    def kept(self) -> int:
        return len(self.inputs[LATENTS])

    @property
    def t(self) -> float:
        return float(self.inputs["t"][0])


class RecordingEngine(Engine):
    """An engine that records its inputs, which are never written again."""

    def __init__(self, engine: Engine, recorded: list[Arrays]) -> None:
        self._engine, self._recorded = engine, recorded

    def __call__(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        self._recorded.append({name: to_host(array) for name, array in inputs.items()})
        return self._engine(inputs)

    def close(self) -> None:
        """The engine belongs to the pipeline."""


def recorded_rows(
    pipeline: Pipeline, recipe: SampleRecipe, prompts: Prompts | None = None
) -> Iterator[list[RecordedRow]]:
    """Record the engines' inputs in each part of each sampling, `batch_count` times.

    Models with text are conditioned on `prompts`, others on all their classes. All samplings are checked before the
    first one runs; raises CalibrationError, InputError or EngineError.
    """
    requests = _requests(pipeline, recipe, prompts)
    _check_enough(pipeline, recipe)
    for request in requests:
        for part in request.parts():
            yield _record(pipeline.bank, pipeline.spec.budgets, part)


def batch_count(pipeline: Pipeline, recipe: SampleRecipe, prompts: Prompts | None = None) -> int:
    """Count the parts of all samplings; raises as `recorded_rows`."""
    return sum(len(request.part_sizes) for request in _requests(pipeline, recipe, prompts))


def _requests(pipeline: Pipeline, recipe: SampleRecipe, prompts: Prompts | None) -> list[Request]:
    """Make a sampling for each budget with each guidance; their images are numbered one after another."""
    conditioning_of = _conditioning(pipeline, recipe, prompts)
    requests = []
    for number, (budget, guidance) in enumerate(product(budgets_of(pipeline, recipe), recipe.guidance)):
        first = number * recipe.images
        options = SamplingOptions(
            steps=recipe.steps,
            sampler=recipe.sampler,
            schedule=[budget] * recipe.steps,
            guidance=guidance,
            seed=recipe.seed,
            first_image=first,
        )
        conditioning = conditioning_of(slice(first, first + recipe.images))
        requests.append(pipeline.prepared(conditioning, options, recipe.rows))
    return requests


def budgets_of(pipeline: Pipeline, recipe: SampleRecipe) -> tuple[Budget, ...]:
    """The budgets of the recipe, or the corners of every profile; largest first."""
    corners = {kept for slot in pipeline.bank.slots for kept in slot.profile.latents.corners()}
    budgets = {pipeline.spec.budget(budget) for budget in recipe.budgets or corners}
    return tuple(sorted(budgets, reverse=True))


def _check_enough(pipeline: Pipeline, recipe: SampleRecipe) -> None:
    budgets = len(budgets_of(pipeline, recipe))
    available = recipe.images * recipe.steps * budgets * len(recipe.guidance)
    if available < recipe.samples:
        raise CalibrationError(
            f"{recipe.images} images in {recipe.steps} steps at {budgets} budgets with {len(recipe.guidance)} kinds of "
            f"guidance give {available} rows, fewer than the {recipe.samples} samples of the recipe",
            "raise images or steps in the recipe",
        )


def _conditioning(pipeline: Pipeline, recipe: SampleRecipe, prompts: Prompts | None) -> Callable[[slice], LabelsLike]:
    """Give the conditioning of a slice of all images: all classes or prompts, shuffled and repeated."""
    pool = Labels(tuple(range(pipeline.spec.num_classes))) if prompts is None else prompts
    if not len(pool):
        raise InputError("this model takes prompts, not labels", "elit-export embed FOLDER writes them")
    order = np.random.default_rng((recipe.seed, CONDITIONING_SEED)).permutation(len(pool))
    images = recipe.images * len(budgets_of(pipeline, recipe)) * len(recipe.guidance)
    numbers = np.resize(order, images).astype(np.int64)
    return lambda images: pool.at(numbers[images])


def _record(bank: EngineBank, budgets: Sequence[Budget], request: Request) -> list[RecordedRow]:
    recorded: list[Arrays] = []
    slots = [Slot(slot.profile, RecordingEngine(slot.engine, recorded)) for slot in bank.slots]
    records = list(sampling_steps(EngineBank(slots, budgets, bank.precision), request))
    calls = [call for record in records for call in record.calls]
    turns: Counter[int] = Counter()
    rows = []
    for inputs, call in zip(recorded, calls, strict=True):
        for row, (null, image) in enumerate(_rows_of(call, request)):
            rows.append(RecordedRow(_row(inputs, row), request.guidance.guides, null, image, turns[image]))
            turns[image] += 1
    return rows


def _rows_of(call: Call, part: Request) -> Iterator[tuple[bool, int]]:
    """Give for each row of a call whether it is of the unconditional or negative branch, and its image."""
    images = range(part.first_image, part.first_image + len(part.start))
    for branch in call.branches:
        yield from ((branch.null_class, image) for image in images)


def _row(inputs: Arrays, row: int) -> Arrays:
    return {name: array if name == LATENTS else array[row : row + 1] for name, array in inputs.items()}


# ---------------------------------------------------------------- selection of rows


@dataclass(frozen=True)
class SelectedSamples:
    """The selected samples, and `guided` and `null` of each, as in `RecordedRow`."""

    samples: CalibrationInputs
    guided: Bools
    null: Bools


def select_samples(
    parts: Sequence[Sequence[RecordedRow]], pipeline: Pipeline, recipe: SampleRecipe, checkpoint_sha256: str
) -> SelectedSamples:
    """Select as many rows as the recipe asks for, the same ones however the samplings were split into parts."""
    names = [tensor.name for tensor in pipeline.spec.conditioning]
    candidates = _in_order([row for part in parts for row in part], recipe.images)
    kinds = [(row.guided, row.null) for row in candidates]
    indices = _balanced_indices(candidates, kinds, recipe)
    rows = [candidates[index].inputs for index in indices]
    facts = CalibrationFacts(
        package_version=version("elit-export"),
        checkpoint_sha256=checkpoint_sha256,
        seed=recipe.seed,
        images=recipe.images,
        steps=recipe.steps,
        sampler=recipe.sampler,
        schedules=tuple(str(budget) for budget in budgets_of(pipeline, recipe)),
        guidance=recipe.guidance,
        samples=len(rows),
    )
    samples = CalibrationInputs(
        facts,
        x=np.concatenate([row["x"] for row in rows]),
        t=np.concatenate([row["t"] for row in rows]),
        kept=np.array([len(row[LATENTS]) for row in rows], np.int64),
        conditioning=joined([{name: row[name] for name in names} for row in rows]),
    )
    guided, null = (np.array([kinds[index][column] for index in indices]) for column in (0, 1))
    return SelectedSamples(samples, guided, null)


def _in_order(rows: Sequence[RecordedRow], images: int) -> list[RecordedRow]:
    """Order the rows by block of images, turn and image. A sampling of `images` has even blocks of at most `BLOCK`."""
    blocks = np.array_split(np.arange(images), -(-images // BLOCK))
    block_of = [number for number, block in enumerate(blocks) for _ in block]

    def place(row: RecordedRow) -> tuple[int, int, int, int]:
        sampling, image = divmod(row.image, images)
        return sampling, block_of[image], row.turn, image

    return sorted(rows, key=place)


def _balanced_indices(
    candidates: Sequence[RecordedRow], kinds: Sequence[tuple[bool, bool]], recipe: SampleRecipe
) -> list[int]:
    """Draw rows balanced over budgets, within a budget over parts of t, and within these over guided and null."""
    order: list[int] = np.random.default_rng((recipe.seed, SELECTION_SEED)).permutation(len(candidates)).tolist()
    parts = [(row.kept, min(int(row.t * T_PARTS), T_PARTS - 1)) for row in candidates]
    for groups in ([*zip(parts, kinds, strict=True)], parts, [row.kept for row in candidates]):
        order = _interleave(order, groups)
    return sorted(order[: recipe.samples])


def _interleave(order: Sequence[int], groups: Sequence[Any]) -> list[int]:
    """Order the first of every group before the second of every group, and so on."""
    counts: Counter[Any] = Counter()
    turns = []
    for index in order:
        turns.append(counts[groups[index]])
        counts[groups[index]] += 1
    return [index for _, index in sorted(zip(turns, order, strict=True), key=lambda pair: pair[0])]

"""Samples for quantization: what the engines of a bundle are really given along trajectories.

Every budget is sampled by itself with every guidance, from noise and labels or prompts of its own. Of all the rows that
engines were given as many as wanted are taken, spread evenly over budgets, and for each budget over t.
"""

from __future__ import annotations

import difflib
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from elit_export.arrays import Arrays, Bools, Float64
from elit_export.backends.protocols import Array, Engine, to_host
from elit_export.bundle.calibration_inputs import FEWEST, CalibrationFacts, CalibrationInputs
from elit_export.errors import CalibrationError, InputError
from elit_export.runtime.bank import EngineBank, Slot
from elit_export.runtime.conditioning import Labels, LabelsLike
from elit_export.runtime.noise import SeededNoise
from elit_export.runtime.pipeline import Pipeline
from elit_export.runtime.prompts import Prompts, joined
from elit_export.runtime.request import Request
from elit_export.runtime.sampling import Call, sampling_steps
from elit_export.spec import LATENTS, Budget

T_PARTS = 8  # of [0, 1], each with as many samples as the others
CONDITIONING, CHOICE = 1, 2  # beside the seed, so that neither depends on the other


class SampleRecipe(BaseModel):
    """Which trajectories to sample, and how many `samples` to take of what they show.

    `images` trajectories for each of the `budgets` with each `guidance`, `rows` at once. Without `budgets`
    they are the least, the best and the most of every profile.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    images: int = Field(ge=1)
    steps: int = Field(ge=1)
    sampler: str
    guidance: tuple[str, ...] = Field(min_length=1, strict=False)
    budgets: tuple[int | str, ...] = Field(default=(), strict=False)
    samples: int = Field(ge=FEWEST)
    seed: int = Field(ge=0)
    rows: int = Field(ge=1)


# That of calibration/fashion.toml, for bundles without one of their own.
DEFAULT_RECIPE = SampleRecipe(
    images=10, steps=20, sampler="euler", guidance=("none", "cfg:2"), samples=256, seed=0, rows=5
)


def load_sample_recipe(path: Path) -> SampleRecipe:
    """Read and check a recipe; raises CalibrationError naming file and key."""
    try:
        return SampleRecipe.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise CalibrationError(f"no recipe at {path}", "leave --recipe out to take the usual samples") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path}: not TOML: {error}") from error
    except ValidationError as error:
        raise CalibrationError(f"{path}: " + "; ".join(_told(problem) for problem in error.errors())) from error


def _told(problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] != "extra_forbidden":
        return f"{key}: {problem['msg'][0].lower()}{problem['msg'][1:]}"
    near = difflib.get_close_matches(key, SampleRecipe.model_fields, n=1)
    return f"{key}: unknown key" + (f" (did you mean {near[0]!r}?)" if near else "")


# ---------------------------------------------------------------- trajectories


@dataclass(frozen=True)
class Seen:
    """One row that an engine was given, as inputs of one row.

    `guided` says whether its trajectory was, `null` whether it is what guidance leads away from: no class, or a
    negative prompt.
    """

    inputs: Arrays
    guided: bool
    null: bool

    @property
    def kept(self) -> int:
        return len(self.inputs[LATENTS])

    @property
    def t(self) -> float:
        return float(self.inputs["t"][0])


class Watched(Engine):
    """An engine that remembers what it is given, which nothing writes into later."""

    def __init__(self, engine: Engine, seen: list[Arrays]) -> None:
        self._engine, self._seen = engine, seen

    def __call__(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        self._seen.append({name: to_host(array) for name, array in inputs.items()})
        return self._engine(inputs)

    def close(self) -> None:
        """The engine belongs to the pipeline."""


def seen_rows(pipeline: Pipeline, recipe: SampleRecipe, prompts: Prompts | None = None) -> Iterator[list[Seen]]:
    """What the engines are given in one sampling of `recipe.rows` images after another; `batches` of them.

    A model with text is shown `prompts`, one of classes its labels. Everything is checked before the first; raises
    CalibrationError, InputError or EngineError.
    """
    noise, shown = _noise(pipeline, recipe), _shown(pipeline, recipe, prompts)
    requests = [
        _request(pipeline, recipe, budget, guidance, shown(images), noise[images])
        for images, budget, guidance in _kinds(pipeline, recipe)
    ]
    _check_enough(pipeline, recipe)
    for request in requests:
        yield _watched(pipeline.bank, pipeline.spec.budgets, request)


def batches(pipeline: Pipeline, recipe: SampleRecipe) -> int:
    return len(list(_kinds(pipeline, recipe)))


def _kinds(pipeline: Pipeline, recipe: SampleRecipe) -> Iterator[tuple[slice, Budget, str]]:
    """Every sampling: which images it has (of all), its budget and guidance."""
    for number, (budget, guidance) in enumerate(product(budgets_of(pipeline, recipe), recipe.guidance)):
        end = (number + 1) * recipe.images
        for start in range(number * recipe.images, end, recipe.rows):
            yield slice(start, min(start + recipe.rows, end)), budget, guidance


def budgets_of(pipeline: Pipeline, recipe: SampleRecipe) -> tuple[Budget, ...]:
    """Those of the recipe, or the corners of every profile; largest first."""
    corners = {kept for slot in pipeline.bank.slots for kept in slot.profile.latents.corners()}
    wanted = {pipeline.spec.budget(budget) for budget in recipe.budgets or corners}
    return tuple(sorted(wanted, reverse=True))


def _check_enough(pipeline: Pipeline, recipe: SampleRecipe) -> None:
    budgets = len(budgets_of(pipeline, recipe))
    least = recipe.images * recipe.steps * budgets * len(recipe.guidance)
    if least < recipe.samples:
        raise CalibrationError(
            f"{recipe.images} images in {recipe.steps} steps at {budgets} budgets with {len(recipe.guidance)} kinds of "
            f"guidance show {least} rows, and {recipe.samples} samples are wanted",
            "raise images or steps in the recipe",
        )


def _noise(pipeline: Pipeline, recipe: SampleRecipe) -> Float64:
    """The start of every image."""
    return SeededNoise(recipe.seed, _images(pipeline, recipe), pipeline.spec.sample_shape)()


def _shown(pipeline: Pipeline, recipe: SampleRecipe, prompts: Prompts | None) -> Callable[[slice], LabelsLike]:
    """What a slice of all images shows: all classes or prompts in an order of their own, over and over."""
    every = Labels(tuple(range(pipeline.spec.num_classes))) if prompts is None else prompts
    if not len(every):
        raise InputError("this model takes prompts, not labels", "elit-export embed FOLDER writes them")
    order = np.random.default_rng((recipe.seed, CONDITIONING)).permutation(len(every))
    numbers = np.resize(order, _images(pipeline, recipe)).astype(np.int64)
    return lambda images: every.at(numbers[images])


def _images(pipeline: Pipeline, recipe: SampleRecipe) -> int:
    return recipe.images * len(budgets_of(pipeline, recipe)) * len(recipe.guidance)


def _request(
    pipeline: Pipeline,
    recipe: SampleRecipe,
    budget: Budget,
    guidance: str,
    shown: LabelsLike,
    noise: Float64,
) -> Request:
    return pipeline.request(
        shown,
        steps=recipe.steps,
        sampler=recipe.sampler,
        schedule=[budget] * recipe.steps,
        guidance=guidance,
        seed=recipe.seed,
        noise=noise,
    )


def _watched(bank: EngineBank, budgets: Sequence[Budget], request: Request) -> list[Seen]:
    given: list[Arrays] = []
    slots = [Slot(slot.profile, Watched(slot.engine, given)) for slot in bank.slots]
    records = list(sampling_steps(EngineBank(slots, budgets, bank.precision), request))
    calls = [call for record in records for call in record.calls]
    return [
        Seen(_row(inputs, row), request.guidance.guides, null)
        for inputs, call in zip(given, calls, strict=True)
        for row, null in enumerate(_null_rows(call))
    ]


def _null_rows(call: Call) -> list[bool]:
    """For each row of a call whether it is of a branch without a class, or of the negative prompt."""
    return [branch.null_class for branch in call.branches for _ in range(call.rows // len(call.branches))]


def _row(inputs: Arrays, row: int) -> Arrays:
    return {name: array if name == LATENTS else array[row : row + 1] for name, array in inputs.items()}


# ---------------------------------------------------------------- which rows are taken


@dataclass(frozen=True)
class Taken:
    """Samples, and for each what `Seen` says of it."""

    samples: CalibrationInputs
    guided: Bools
    null: Bools


def taken(parts: Sequence[Sequence[Seen]], pipeline: Pipeline, recipe: SampleRecipe, checkpoint_sha256: str) -> Taken:
    """As many of all rows as the recipe wants, in the order in which they were seen."""
    names = [tensor.name for tensor in pipeline.spec.conditioning]
    every = [seen for part in parts for seen in part]
    kinds = [(seen.guided, seen.null) for seen in every]
    chosen = _spread(every, kinds, recipe)
    rows = [every[index].inputs for index in chosen]
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
    guided, null = (np.array([kinds[index][which] for index in chosen]) for which in (0, 1))
    return Taken(samples, guided, null)


def _spread(every: Sequence[Seen], kinds: Sequence[tuple[bool, bool]], recipe: SampleRecipe) -> list[int]:
    """Rows drawn such that budgets take turns, for each budget the parts of t, and for each of these the kinds."""
    order: list[int] = np.random.default_rng((recipe.seed, CHOICE)).permutation(len(every)).tolist()
    parts = [(seen.kept, min(int(seen.t * T_PARTS), T_PARTS - 1)) for seen in every]
    for groups in ([*zip(parts, kinds, strict=True)], parts, [seen.kept for seen in every]):
        order = _in_turns(order, groups)
    return sorted(order[: recipe.samples])


def _in_turns(order: Sequence[int], groups: Sequence[Any]) -> list[int]:
    """The first of every group, then the second of every group, …"""
    met: Counter[Any] = Counter()
    turns = []
    for index in order:
        turns.append(met[groups[index]])
        met[groups[index]] += 1
    return [index for _, index in sorted(zip(turns, order, strict=True), key=lambda pair: pair[0])]

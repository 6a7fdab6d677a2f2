"""A model's deployment choices, read from TOML.

Takes: a TOML file.  Gives: Recipe.  May touch: that file.  Knows nothing of: weights, plans.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from elit_export.backends import BACKENDS
from elit_export.errors import RecipeError
from elit_export.files import NAME_PATTERN
from elit_export.spec import (
    LONGEST_TEXT,
    QUANTIZED,
    Budget,
    ModelSpec,
    Precision,
    Profile,
    Range,
    default_profiles,
    listed,
)

SHIPPED_RECIPE = "fashion.toml"
MOST_THREADS = 1024


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class RangeTable(_Table):
    """`{ min = 1, opt = 8, max = 64 }`"""

    min: int
    opt: int
    max: int

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        self.value()
        return self

    def value(self) -> Range:
        return Range(self.min, self.opt, self.max)


class ProfileTable(_Table):
    """One `[[profiles]]` entry; `rows` defaults to the recipe's."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    latents: RangeTable
    rows: RangeTable | None = None


class Target(_Table):
    """One `[targets.NAME]`: where its plans run and in which arithmetic; what a backend adds is below.

    `fused` asks for one more plan: a whole cached step, for hosts without this runtime.
    `accept_below_tolerance` is the reason to keep plans that miss their tolerance, which every report then shows.
    """

    backend: str
    device: str
    precision: Annotated[Precision, Field(strict=False)]
    fused: bool = False
    accept_below_tolerance: Annotated[str, Field(pattern=r"\S")] | None = None

    @model_validator(mode="after")
    def _supported(self) -> Self:
        backend = BACKENDS[self.backend]
        for what, value, known in (
            ("device", self.device, backend.devices),
            ("precision", self.precision.value, backend.precisions),
        ):
            if value not in known:
                raise ValueError(f"{what} {value!r}: backend {backend.name} has {', '.join(known)}")
        if self.fused and not backend.fuses:
            raise ValueError(f"fused: backend {backend.name} cannot run a graph that chooses inside; leave it out")
        if self.fused and self.precision in QUANTIZED:
            raise ValueError(f"fused: only `step` is quantized to {self.precision.value}; leave it out")
        if self.fused and backend.rounds and self.precision is not Precision.FP32:
            raise ValueError(
                f"fused: backend {backend.name} would round what decides too, so that it decides otherwise; "
                f"use precision fp32 or leave it out"
            )
        return self

    def options(self) -> dict[str, Any]:
        """What the backend adds, as the manifest keeps it."""
        return self.model_dump(mode="json", exclude=set(Target.model_fields))


class OnnxRuntimeTarget(Target):
    """`threads = 0` uses all cores."""

    backend: Literal["onnxruntime"]
    threads: int = Field(default=0, ge=0, le=MOST_THREADS)


class OpenVinoTarget(Target):
    """`threads = 0` uses all cores; `hint` is what the library tunes for."""

    backend: Literal["openvino"]
    device: str = "cpu"
    threads: int = Field(default=0, ge=0, le=MOST_THREADS)
    hint: Literal["latency", "throughput"] = "latency"


def _capability(text: str) -> str:
    if not re.fullmatch(r"\d{1,2}\.\d", text):
        raise ValueError(f"{text!r} is no compute capability; they look like '8.9' and '12.0'")
    return text


class TensorRTTarget(Target):
    """TensorRT, and TensorRT for RTX, which builds without a GPU for the `compute_capabilities` named.

    `layout`: one plan per profile, or one plan whose weights all profiles share. `workspace_mb` and
    `optimization_level` limit the builder, both None for the library's own choice; `compatibility` lets
    a plan run on other GPUs at a cost in speed. `timing_cache` is shared by the plans of a target.
    `cuda_graphs` replays each call as one launch. `detailed_inspection` keeps layer names in the plan.
    """

    backend: Literal["tensorrt", "tensorrt-rtx"]
    device: str = "cuda"
    compute_capabilities: tuple[Annotated[str, AfterValidator(_capability)], ...] = Field(min_length=1, strict=False)
    layout: Literal["per-profile", "multi-profile"] = "per-profile"
    workspace_mb: int | None = Field(default=None, ge=1)
    optimization_level: int | None = Field(default=None, ge=0, le=5)
    compatibility: Literal["none", "version", "hardware", "both"] = "none"
    timing_cache: bool = False
    cuda_graphs: bool = True
    detailed_inspection: bool = False

    @model_validator(mode="after")
    def _distinct_capabilities(self) -> Self:
        if len(set(self.compute_capabilities)) < len(self.compute_capabilities):
            raise ValueError(f"compute_capabilities {list(self.compute_capabilities)} names one twice")
        return self


class TorchTensorRTTarget(Target):
    """Torch-TensorRT on the GPU of the machine that builds."""

    backend: Literal["torch-tensorrt"]
    device: str = "cuda"


AnyTarget = Annotated[
    OnnxRuntimeTarget | OpenVinoTarget | TensorRTTarget | TorchTensorRTTarget, Field(discriminator="backend")
]


def target_of(backend: str, device: str, precision: str, options: dict[str, Any]) -> AnyTarget:
    """The target of a plan set, from what the manifest keeps of it."""
    values = {"backend": backend, "device": device, "precision": precision, **options}
    target: AnyTarget = TypeAdapter(AnyTarget).validate_python(values)
    return target


class Architecture(_Table):
    """Numbers that shapes do not tell; needed only for released-format files whose args do not say them."""

    num_heads: int | None = None
    head_depth: int | None = None
    tail_depth: int | None = None


class DecoderTable(_Table):
    """`[decoder]`: what makes pictures of a model of VAE latents. `folder`, relative to the recipe, is of diffusers.

    An engine decodes squares of at most `tile` latents a side, `rows` of them in a call; larger samples are cut into
    tiles that overlap by a quarter.
    """

    folder: str = Field(min_length=1)
    tile: int = Field(default=64, ge=4, multiple_of=4)
    rows: RangeTable = RangeTable(min=1, opt=1, max=4)


class Recipe(_Table):
    """Choices for one model. `checkpoint` is a path relative to the recipe, or `shipped:NAME`.

    For a folder of diffusers `interface` is the file with Read and Write, relative to the recipe too.
    """

    name: str = Field(pattern=NAME_PATTERN)
    checkpoint: str | None = None
    interface: Annotated[str, Field(min_length=1)] | None = None
    architecture: Architecture = Architecture()
    decoder: DecoderTable | None = None
    rows: RangeTable
    text: RangeTable | None = None
    profiles: tuple[ProfileTable, ...] = Field(default=(), strict=False)
    targets: dict[Annotated[str, Field(pattern=NAME_PATTERN)], AnyTarget] = Field(min_length=1)

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        names = [table.name for table in self.profiles]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"profiles: {twice[0]!r} is the name of two profiles")
        return self

    def target(self, name: str) -> AnyTarget:
        if name not in self.targets:
            raise RecipeError(f"recipe {self.name} has no target {name!r}; it has {', '.join(self.targets)}")
        return self.targets[name]

    def only_target(self) -> str:
        """The name of the one target there is; raises RecipeError if there are several."""
        if len(self.targets) > 1:
            raise RecipeError(
                f"recipe {self.name} has several targets, choose one: --target {' | '.join(self.targets)}"
            )
        return next(iter(self.targets))

    def profiles_for(self, spec: ModelSpec) -> tuple[Profile, ...]:
        """The recipe's profiles, or the default ones; raises RecipeError if one does not fit the model."""
        rows, text = self.rows.value(), self._text_for(spec)
        if not self.profiles:
            return default_profiles(spec.latents, rows, step=spec.budget_step, text=text)
        for number, table in enumerate(self.profiles):
            if table.latents.max > spec.latents:
                raise RecipeError(
                    f"recipe {self.name}: profiles.{number}.latents.max is {table.latents.max}, "
                    f"but the model has {spec.latents} latents per group"
                )
            for name, kept in table.latents:
                if Budget(kept, spec.latents) not in spec.budgets:
                    raise RecipeError(
                        f"recipe {self.name}: profiles.{number}.latents.{name} is {kept}, "
                        f"but the model runs {listed(spec.budgets)} only"
                    )
        return tuple(
            Profile(table.name, table.latents.value(), table.rows.value() if table.rows else rows, text)
            for table in self.profiles
        )

    def _text_for(self, spec: ModelSpec) -> Range | None:
        """How many tokens of text engines take; raises RecipeError if the model takes none, or other ones."""
        if not spec.text_width:
            if self.text:
                raise RecipeError(f"recipe {self.name}: this model takes classes: leave `text` out")
            return None
        if self.text is None:
            raise RecipeError(
                f"recipe {self.name}: this model takes text; say how many tokens, e.g. "
                f"text = {{ min = 1, opt = 128, max = {LONGEST_TEXT} }}"
            )
        if self.text.max > LONGEST_TEXT:
            raise RecipeError(
                f"recipe {self.name}: text.max is {self.text.max}, but the model has positions for {LONGEST_TEXT}"
            )
        return self.text.value()


# ---------------------------------------------------------------- reading


def load_recipe(path: Path) -> Recipe:
    """Read and check a recipe; raises RecipeError naming file and key. Paths in it become absolute."""
    if not path.is_file():
        raise RecipeError(f"no recipe at {path}")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not TOML: {error}") from error
    return _with_absolute_paths(recipe_from_values(values, str(path)), path.parent.absolute())


def _with_absolute_paths(recipe: Recipe, folder: Path) -> Recipe:
    found: dict[str, Any] = {}
    if recipe.checkpoint and not recipe.checkpoint.startswith("shipped:"):
        found["checkpoint"] = str(folder / recipe.checkpoint)
    if recipe.interface:
        found["interface"] = str(folder / recipe.interface)
    if recipe.decoder:
        found["decoder"] = recipe.decoder.model_copy(update={"folder": str(folder / recipe.decoder.folder)})
    return recipe.model_copy(update=found)


def recipe_from_values(values: dict[str, Any], source: str) -> Recipe:
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{source}: " + "; ".join(_told(problem) for problem in error.errors())) from error


def _told(problem: Any) -> str:
    where = [str(part) for part in problem["loc"]]
    if where[:1] == ["targets"] and len(where) > 2:
        del where[2]  # the backend, by which pydantic chose the table
    key = ".".join(where)
    if problem["type"] == "union_tag_invalid":
        return f"{key}.backend: unknown backend {problem['ctx']['tag']!r}; known: {', '.join(BACKENDS)}"
    if problem["type"] == "union_tag_not_found":
        return f"{key}.backend: field required"
    if problem["type"] == "extra_forbidden":
        tables = (
            Recipe,
            OnnxRuntimeTarget,
            OpenVinoTarget,
            TensorRTTarget,
            TorchTensorRTTarget,
            ProfileTable,
            RangeTable,
            Architecture,
            DecoderTable,
        )
        known = [name for table in tables for name in table.model_fields]
        near = difflib.get_close_matches(where[-1], known, n=1) if where[-1] not in known else []
        return f"{key}: unknown key" + (f" (did you mean {near[0]!r}?)" if near else "")
    message = problem["msg"].removeprefix("Value error, ")
    return f"{key}: {message[0].lower()}{message[1:]}" if key else message


def shipped_recipe() -> Path:
    """The recipe of the shipped model: inside the package when installed, in `engines/` in a checkout."""
    package = Path(str(files("elit_export")))
    installed = package / "engines" / SHIPPED_RECIPE
    return installed if installed.is_file() else package.parent / "engines" / SHIPPED_RECIPE

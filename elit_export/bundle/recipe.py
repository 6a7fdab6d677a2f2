"""A model's deployment choices, read from TOML."""

from __future__ import annotations

import json
import reprlib
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self, Union

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from elit_export.backends import BACKENDS
from elit_export.backends.target import Target
from elit_export.bundle.atomic import NAME_PATTERN
from elit_export.bundle.readers import read_toml
from elit_export.errors import BundleError, RecipeError, did_you_mean
from elit_export.spec import MAX_TEXT_TOKENS, Budget, ModelSpec, Profile, Range, default_profiles, listed
from elit_export.spec.limits import ROWS, TEXT, TILE

SHIPPED_RECIPE = "fashion.toml"
UNKNOWN_KEY = ("extra_forbidden", "unexpected_keyword_argument")
OUT_OF_RANGE = ("less_than_equal", "greater_than_equal")  # problems of numbers, as pydantic calls them


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ProfileTable(_Table):
    """One `[[profiles]]` entry; `rows` defaults to the recipe's."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    latents: Range
    rows: Range | None = None


if TYPE_CHECKING:
    AnyTarget = Target
else:
    AnyTarget = Annotated[
        Union[tuple({backend.options: None for backend in BACKENDS.values()})],  # noqa: UP007
        Field(discriminator="backend"),
    ]


def target_of(backend: str, device: str, precision: str, options: dict[str, Any]) -> Target:
    """The target of a plan set, from what the manifest keeps of it; raises BundleError for what no build writes."""
    values = {"backend": backend, "device": device, "precision": precision, **options}
    try:
        target: Target = TypeAdapter(AnyTarget).validate_python(values)
    except ValidationError as error:
        below = [problem | {"loc": problem["loc"][1:]} for problem in error.errors()]  # the first is the backend's name
        problems = "; ".join(_problem_text(problem) for problem in below)
        raise BundleError(
            f"its options cannot be: {problems}",
            "change them in the recipe and build it again: elit-export build RECIPE --out BUNDLE",
        ) from error
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
    tile: int = Field(default=64, ge=4, le=int(TILE.maximum), multiple_of=4)
    rows: Range = Range(min=1, opt=1, max=4)


class Recipe(_Table):
    """Choices for one model. `checkpoint` is a path relative to the recipe, or `shipped:NAME`.

    For a folder of diffusers `interface` is the file with Read and Write, relative to the recipe too.
    """

    name: str = Field(pattern=NAME_PATTERN)
    checkpoint: str | None = None
    interface: Annotated[str, Field(min_length=1)] | None = None
    architecture: Architecture = Architecture()
    decoder: DecoderTable | None = None
    rows: Range
    text: Range | None = None
    profiles: tuple[ProfileTable, ...] = ()
    targets: dict[Annotated[str, Field(pattern=NAME_PATTERN)], AnyTarget] = Field(min_length=1)

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        names = [table.name for table in self.profiles]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"profiles: {twice[0]!r} is the name of two profiles")
        return self

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        tables = [("rows", self.rows), *((f"profiles.{at}.rows", each.rows) for at, each in enumerate(self.profiles))]
        tables.append(("decoder.rows", self.decoder.rows if self.decoder else None))
        for name, table in tables:
            if table:
                ROWS.check(table.max, f"{name}.max")
        if self.text:
            TEXT.check(self.text.max, "text.max")
        return self

    def target(self, name: str) -> Target:
        if name not in self.targets:
            raise RecipeError(
                f"recipe {self.name} has no target {name!r}; it has {', '.join(self.targets)}",
                did_you_mean(name, self.targets),
            )
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
        rows, text = self.rows, self._text_for(spec)
        if not self.profiles:
            return default_profiles(spec.latents, rows, step=spec.budget_step, text=text)
        for number, table in enumerate(self.profiles):
            if table.latents.max > spec.latents:
                raise RecipeError(
                    f"recipe {self.name}: profiles.{number}.latents.max is {table.latents.max}, "
                    f"but the model has {spec.latents} latents per group"
                )
            for name, kept in vars(table.latents).items():
                if Budget(kept, spec.latents) not in spec.budgets:
                    raise RecipeError(
                        f"recipe {self.name}: profiles.{number}.latents.{name} is {kept}, "
                        f"but the model runs {listed(spec.budgets)} only"
                    )
        return tuple(Profile(table.name, table.latents, table.rows or rows, text) for table in self.profiles)

    def _text_for(self, spec: ModelSpec) -> Range | None:
        """Return how many tokens of text engines take; raises RecipeError if the model takes none, or other ones."""
        if not spec.takes_text:
            if self.text:
                raise RecipeError(f"recipe {self.name}: this model takes classes", "leave `text` out")
            return None
        if self.text is None:
            raise RecipeError(
                f"recipe {self.name}: this model takes text",
                f"say how many tokens, e.g. text = {{ min = 1, opt = 128, max = {MAX_TEXT_TOKENS} }}",
            )
        return self.text


# ---------------------------------------------------------------- reading


def load_recipe(path: Path) -> Recipe:
    """Read and check a recipe; raises RecipeError naming file and key. Paths in it become absolute."""
    try:
        values = read_toml(path, what="the recipe", error=RecipeError)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise RecipeError(f"no recipe at {path}") from error
    return _with_absolute_paths(recipe_from_values(values, str(path)), path.parent.absolute())


def _with_absolute_paths(recipe: Recipe, folder: Path) -> Recipe:
    absolute: dict[str, Any] = {}
    if recipe.checkpoint and not recipe.checkpoint.startswith("shipped:"):
        absolute["checkpoint"] = str(folder / recipe.checkpoint)
    if recipe.interface:
        absolute["interface"] = str(folder / recipe.interface)
    if recipe.decoder:
        absolute["decoder"] = recipe.decoder.model_copy(update={"folder": str(folder / recipe.decoder.folder)})
    return recipe.model_copy(update=absolute)


def recipe_from_values(values: dict[str, Any], source: str) -> Recipe:
    try:
        return Recipe.model_validate_json(json.dumps(values, default=_refused))
    except ValidationError as error:
        raise RecipeError(f"{source}: " + "; ".join(_problem_text(problem) for problem in error.errors())) from error


def _refused(value: object) -> object:
    """Raise RecipeError for a type of TOML that JSON does not have."""
    raise RecipeError(f"{value} is a date or a time, which no key of a recipe takes", "write it as text, in quotes")


def _problem_text(problem: Any) -> str:
    where = [str(part) for part in problem["loc"]]
    if where[:1] == ["targets"] and len(where) > 2:
        del where[2]  # the backend, by which pydantic chose the table
    key = ".".join(where)
    if problem["type"] == "union_tag_invalid":
        return f"{key}.backend: unknown backend {problem['ctx']['tag']!r}; known: {', '.join(BACKENDS)}"
    if problem["type"] == "union_tag_not_found":
        return f"{key}.backend: field required"
    if problem["type"] in UNKNOWN_KEY:
        options = [backend.options for backend in BACKENDS.values()]
        tables: list[type[BaseModel]] = [Recipe, *options, ProfileTable, Architecture, DecoderTable]
        known = [name for table in tables for name in table.model_fields] + [field.name for field in fields(Range)]
        near = did_you_mean(where[-1], known) if where[-1] not in known else ""
        return f"{key}: unknown key" + (f" ({near})" if near else "")
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] in OUT_OF_RANGE:
        message += f", is {reprlib.repr(problem['input'])}"
    return f"{key}: {message[0].lower()}{message[1:]}" if key else message


def shipped_recipe() -> Path:
    """The recipe of the shipped model: inside the package when installed, in `engines/` in a checkout."""
    package = Path(str(files("elit_export")))
    installed = package / "engines" / SHIPPED_RECIPE
    return installed if installed.is_file() else package.parent / "engines" / SHIPPED_RECIPE

"""The arguments of a sampling: a preset, options, and which of them were given; as keyword arguments of methods."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import wraps
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from elit_export.errors import InputError, did_you_mean
from elit_export.runtime.options import About, Accepts, SamplingOptions, about

OPTIONAL_TEXT: Accepts = "text", (str, type(None))
BELONGS_TO = {"guidance_interval": "guidance"}  # whoever gives the second gives both


@dataclass(frozen=True, kw_only=True)
class SamplingArguments(SamplingOptions):
    """The options of a sampling, and the preset that those are of which were not given."""

    preset: str | None = field(
        default=None,
        metadata=about(
            "the bundle's preset whose options hold where none are given here",
            "fast; balanced; best; `elit-export inspect BUNDLE` lists them",
            OPTIONAL_TEXT,
        ),
    )


@contextmanager
def naming_preset(options: SamplingOptions) -> Iterator[None]:
    """Put the preset before what is wrong with options, some of which it may have set."""
    try:
        yield
    except InputError as error:
        if not isinstance(options, SamplingArguments) or options.preset is None:
            raise
        remedy = "; ".join(filter(None, (error.remedy, "options that are given beside a preset replace its own")))
        raise InputError(f"with preset {options.preset!r}: {error.problem}", remedy) from error


Arguments = ParamSpec("Arguments")
Owner = TypeVar("Owner")
First = TypeVar("First")
Chosen = TypeVar("Chosen", bound=SamplingArguments)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Given(Generic[Chosen]):
    """The arguments that a caller gave, by name: what a preset sets holds for the others alone.

    Raises InputError for a value of another type.
    """

    kind: Callable[..., Chosen]
    values: Mapping[str, Any]

    def __post_init__(self) -> None:
        self.over({})

    def over(self, preset: Mapping[str, Any]) -> Chosen:
        """Return all options: those that were given, else those of a preset, else the defaults; raises InputError."""
        used = {name: value for name, value in preset.items() if BELONGS_TO.get(name) not in self.values}
        return self.kind(**used | dict(self.values))


# ---------------------------------------------------------------- as keyword arguments


def takes_each(
    arguments: Callable[..., Chosen], _typed_as: Callable[Arguments, object]
) -> Callable[[Callable[[Owner, First, Given[Chosen]], Result]], Callable[Concatenate[Owner, Arguments], Result]]:
    """Let a method that takes what was given of the dataclass `arguments` take its fields as keyword arguments.

    Its signature and its docstring list every option with its type, its default and examples. To a type checker it
    takes what `_typed_as` takes: a dataclass with the fields of `arguments` and the method's first argument.
    """

    def decorated(
        method: Callable[[Owner, First, Given[Chosen]], Result],
    ) -> Callable[Concatenate[Owner, Arguments], Result]:
        @wraps(method)
        def with_keywords(self: Owner, labels: First, **keywords: Any) -> Result:
            return method(self, labels, Given(arguments, _known(keywords, arguments)))

        signature = inspect.signature(method)
        first = list(signature.parameters.values())[:2]
        documented: Any = with_keywords
        documented.__signature__ = signature.replace(parameters=[*first, *_keywords(arguments)])
        documented.__doc__ = f"{inspect.getdoc(method)}\n\n{listed_options(arguments)}"
        return with_keywords  # type: ignore[return-value]

    return decorated


def _keywords(arguments: Any) -> Iterator[inspect.Parameter]:
    for each in fields(arguments):
        yield inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=each.type)


def _known(keywords: dict[str, Any], arguments: Any) -> dict[str, Any]:
    """Return the keyword arguments; raises InputError for one that is not an option."""
    names = [each.name for each in fields(arguments)]
    for name in keywords:
        if name not in names:
            hint = did_you_mean(name, names)
            raise InputError(f"unknown option {name!r}", f"{hint} options: {', '.join(names)}".lstrip())
    return keywords


def listed_options(arguments: Any) -> str:
    """Return a line for each option: name, default, meaning, examples."""
    lines = []
    for each in fields(arguments):
        option: About = each.metadata["about"]
        default = f" (default {each.default!r})" if option.is_typed else ""
        lines.append(f"{each.name}{default}: {option.text}; {option.values}")
    return "\n".join(lines)

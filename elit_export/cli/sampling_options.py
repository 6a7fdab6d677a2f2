"""The options of a sampling on the command line, made from the fields of SamplingArguments."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import click
from click.core import ParameterSource

from elit_export.runtime.arguments import Given, SamplingArguments
from elit_export.runtime.options import PAIR, About, abouts


def sampling_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add every option that can be typed; the command gets those that were typed as `given`."""
    typed = {name: about for name, about in abouts(SamplingArguments).items() if about.is_typed}

    @wraps(command)
    def with_options(**values: Any) -> Any:
        source = click.get_current_context().get_parameter_source
        every = {name: values.pop(name) for name in typed}
        typed_values = {name: value for name, value in every.items() if source(name) is not ParameterSource.DEFAULT}
        return command(given=Given(SamplingArguments, typed_values), **values)

    for name, about in reversed(typed.items()):
        with_options = click.option(
            f"--{name.replace('_', '-')}",
            default=getattr(SamplingArguments, name),
            show_default=True,
            help=f"{about.text[0].upper()}{about.text[1:]}: {about.values}",
            **_typed(about),
        )(with_options)
    return with_options


def _typed(about: About) -> dict[str, Any]:
    """How click reads an option; what may be text is read as text."""
    if about.accepts is PAIR:
        return {"type": (float, float), "metavar": "LOW HIGH"}
    return {"type": next(kind for kind in (str, float, int) if kind in about.accepts[1])}

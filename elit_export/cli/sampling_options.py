"""The options of a sampling on the command line, made from the fields of SamplingOptions."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import click

from elit_export.runtime.options import PAIR, About, SamplingOptions, abouts


def sampling_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add every option that can be typed; the command gets them as `options`."""
    typed = {name: about for name, about in abouts(SamplingOptions).items() if about.is_typed}

    @wraps(command)
    def with_options(**values: Any) -> Any:
        options = SamplingOptions(**{name: values.pop(name) for name in typed})
        return command(options=options, **values)

    for name, about in reversed(typed.items()):
        with_options = click.option(
            f"--{name.replace('_', '-')}",
            default=getattr(SamplingOptions, name),
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

"""Errors in the words of the command line: options as they are typed, where the package names keyword arguments."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping

import click

from elit_export.errors import ElitExportError, InputError

ARGUMENT = re.compile(r"\b([a-z_]+)=('[^']*'|\"[^\"]*\"|True\b|-?\d[\d.e+-]*\d|\d)")
NAME = re.compile(r"(?<![\w/.`'\"-])[a-z]+(?:_[a-z]+)+(?![\w/.(=-])")


def typed_text(error: ElitExportError, command: click.Command) -> str:
    """The text of an error with `target='cpu'` as `--target cpu`, and where an argument is wrong, `batch_size` as
    `--batch-size`.

    Only names of the command's own options are translated: fields of files and what only Python has stay as they are.
    """
    options = options_of(command)
    text = ARGUMENT.sub(lambda match: _typed(match, options), str(error))
    return NAME.sub(lambda match: options.get(match[0], match[0]), text) if isinstance(error, InputError) else text


def _typed(match: re.Match[str], options: Mapping[str, str]) -> str:
    if match[1] not in options:
        return match[0]
    value = match[2].strip("'\"")
    return options[match[1]] if value == "True" else f"{options[match[1]]} {shlex.quote(value)}"


def options_of(command: click.Command) -> dict[str, str]:
    """Name in Python → as typed, of a command or of all commands of a group."""
    return {
        str(option.name): max(option.opts, key=len)
        for each in leaves(command)
        for option in each.params
        if isinstance(option, click.Option)
    }


def leaves(command: click.Command) -> Iterator[click.Command]:
    """The command itself, or what a group holds."""
    if isinstance(command, click.Group):
        for each in command.commands.values():
            yield from leaves(each)
    else:
        yield command

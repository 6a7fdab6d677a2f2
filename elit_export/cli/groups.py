"""Commands that are imported when they are called, and errors as exit status.

Help of all commands needs none of them, so that it comes at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import click

from elit_export.cli.printable import printable_line
from elit_export.cli.streams import READER_LEFT, readers_may_leave
from elit_export.cli.tools import naming_the_extra
from elit_export.cli.wording import typed_text
from elit_export.errors import ElitExportError


class Deferred(click.Command):
    """Name and short help of a command; its own file, `elit_export/cli/NAME.py`, is imported on its first use."""

    def __init__(self, name: str, short_help: str) -> None:
        super().__init__(name, short_help=short_help)
        self.attribute = name.replace("-", "_")

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """A context of the command itself, which click then asks for everything else."""
        return self.imported().make_context(info_name, args, parent, **extra)

    def imported(self) -> click.Command:
        command: click.Command = getattr(import_module(f"elit_export.cli.{self.attribute}"), self.attribute)
        return command


class Commands(click.Group):
    """Turns the package's errors into exit status 2 and Ctrl-C into 130, each in one line.

    Where nobody reads the output any more, the status is READER_LEFT, whatever the command.
    """

    def main(self, *args: Any, **extra: Any) -> Any:
        try:
            with readers_may_leave():
                return super().main(*args, **extra)
        except OSError as error:  # of help, and of what is still in buffers at the end, too
            click.echo(printable_line(f"error: {error.filename or 'a file'}: {error.strerror or error}"), err=True)
            raise SystemExit(2) from error

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with naming_the_extra("this command"):
                return super().invoke(ctx)
        except ElitExportError as error:
            click.echo(printable_line(f"error: {typed_text(error, self.invoked(ctx))}"), err=True)
            ctx.exit(2)
        except BrokenPipeError as error:  # of a pipe that the command was to write into
            click.echo(printable_line(f"error: {error.filename or 'a pipe'}: {error.strerror}"), err=True)
            ctx.exit(READER_LEFT)
        except MemoryError:
            click.echo("error: not enough memory; ask for less at once, or take a larger machine", err=True)
            ctx.exit(2)
        except KeyboardInterrupt:
            click.echo("interrupted; nothing half-written was left behind", err=True)
            ctx.exit(130)

    def invoked(self, ctx: click.Context) -> click.Command:
        """The command that was called, which is imported by then."""
        command = self.commands[str(ctx.invoked_subcommand)]
        return command.imported() if isinstance(command, Deferred) else command

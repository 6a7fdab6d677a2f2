"""What the commands share: console, progress bars, errors, JSON, options."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.text import Text

from elit_export.bundle.atomic import check_writable, write_text
from elit_export.cli.printable import printable, printable_line
from elit_export.cli.tables.layout import Table, laid_out, table
from elit_export.errors import InputError
from elit_export.spec.limits import Bound

if TYPE_CHECKING:
    from elit_export.bench.limits import Limit
    from elit_export.bundle.manifest import PlanSet
    from elit_export.bundle.reading import Bundle


class NamedPath(click.Path):
    """A path that is not empty: the empty one would be the working folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(_named(self, value, param, ctx), param, ctx)


class NamedText(click.types.StringParamType):
    """Text that names something, and is not empty."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return _named(self, value, param, ctx)


def _named(kind: Any, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
    if not str(value) or "\0" in str(value):
        kind.fail("it is empty or no name; give one, or leave the option out", param, ctx)
    return value


class Count(click.IntRange):
    """A whole number of one and more, up to a Bound, whose reason is told where it is passed."""

    def __init__(self, limit: Bound) -> None:
        super().__init__(min=1, max=int(limit.maximum))
        self.limit = limit

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = click.INT.convert(value, param, ctx)
        if problem := self.limit.problem(number, "it"):
            self.fail(problem, param, ctx)
        return super().convert(value, param, ctx)


FOLDER = NamedPath(file_okay=False, path_type=Path)
FILE = NamedPath(dir_okay=False, path_type=Path)
NAME = NamedText()
log = logging.getLogger(__name__)


class OutputFile(NamedPath):
    """A file that is written at the end: its place is tried before anything is done."""

    def __init__(self) -> None:
        super().__init__(dir_okay=False, readable=False, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(str(super().convert(value, param, ctx)))
        check_writable(path)
        return path


OUTPUT = OutputFile()


def _tried(_ctx: click.Context, _param: click.Parameter, value: str | None) -> str | None:
    if value not in (None, "-"):
        check_writable(Path(str(value)))
    return value


PIPED_WIDTH = 140  # of tables that go into a file, unless COLUMNS says another; a terminal has its own


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar on standard error, none with --quiet; an error takes it away, so that nothing stale stands above it."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=PrintableConsole(stderr=True), disable=is_quiet())
    progress.start()
    try:
        yield progress
    except BaseException:
        for task in progress.task_ids:
            progress.update(task, visible=False)  # one that is removed, a thread of `track` may still look for
        progress.live.transient = True
        progress.live.stop()  # the progress's own stop would add an empty line where no terminal is
        raise
    progress.stop()


def is_quiet() -> bool:
    """Was --quiet given before the command?"""
    context = click.get_current_context(silent=True)
    return bool(context and context.find_root().params.get("quiet"))


class PrintableConsole(Console):
    """Shows the text of cells and titles as it is, without markup in it, and never obeys it."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options | {"markup": False, "emoji": False})

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Whatever text is made of; what moves the cursor for progress bars is no text."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


@contextmanager
def stop_requested() -> Iterator[list[int]]:
    """Collect Ctrl-C instead of raising it, so that work stops between two steps; the second one raises."""
    seen: list[int] = []

    def note(number: int, _frame: object) -> None:
        seen.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, previous)


def build_progress(progress: Progress) -> Callable[[str, float], None]:
    """Show a build's stages in a bar of hundredths."""
    task = progress.add_task("", total=100)

    def show(stage: str, share: float) -> None:
        log.info("%s", stage)
        progress.update(task, description=stage, completed=round(100 * share))

    return show


def show(*tables: Table, json_to: str | None = None) -> None:
    """Print for people: on standard error where the JSON goes to standard output."""
    console = PrintableConsole(stderr=json_to == "-")
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPED_WIDTH
    for each in tables:
        console.print(laid_out(_on_lines(each), console.width))


def _on_lines(shown: Table) -> Table:
    """No text of a table ends a line by itself."""
    title, *columns = map(printable_line, (shown.title, *shown.columns))
    rows = [list(map(printable_line, row)) for row in shown.rows]
    return table(title, columns, rows, list(map(printable_line, shown.notes)))


def say(text: str, *, json_to: str | None = None) -> None:
    """One plain line for people: no markup, no wrapping."""
    click.echo(printable_line(text), err=json_to == "-")


def complain(text: str) -> None:
    """One plain line on standard error."""
    click.echo(printable_line(text), err=True)


def say_lines(title: str, lines: Sequence[str], *, json_to: str | None = None) -> None:
    """Lines to be copied, each whole; nothing where there are none."""
    if lines:
        for line in (f"{title}:", *lines):
            say(line, json_to=json_to)


def say_accepted(bundle: Bundle, plan_set: PlanSet, *, json_to: str | None = None) -> None:
    """Warn of plans that are below their tolerance, by the recipe's own leave."""
    from elit_export.verify.parity import accepted_miss

    if reason := accepted_miss(plan_set, bundle.manifest.graphs):
        say(f"{plan_set.target} {plan_set.precision.value} is below its tolerance, accepted: {reason}", json_to=json_to)


def write_json(facts: Any, where: str | None) -> None:
    """Write strict JSON to a file, to standard output for `-`, or nowhere; numbers that are not finite become null."""
    if where is None:
        return
    text = json.dumps(_finite(facts), indent=1, allow_nan=False)
    if where == "-":
        click.echo(text)
    else:
        write_text(Path(where), text + "\n")


def _finite(facts: Any) -> Any:
    if isinstance(facts, dict):
        return {name: _finite(value) for name, value in facts.items()}
    if isinstance(facts, list | tuple):
        return [_finite(value) for value in facts]
    return None if isinstance(facts, float) and not math.isfinite(facts) else facts


def architecture_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Numbers that a checkpoint of an unknown size does not tell."""
    for name in ("--tail-depth", "--head-depth", "--num-heads"):
        command = click.option(name, type=int, help="Only if the checkpoint does not say it.")(command)
    return command


def refuse_alone(interface: Path | None, checkpoint: str | None) -> None:
    """Raise InputError for Read and Write without the checkpoint they belong to."""
    if interface is not None and checkpoint is None:
        raise InputError(f"--interface {interface} is of a --checkpoint FOLDER", "give that too, or leave both out")


def refuse_one_file(option: str, path: object, *, every: bool) -> None:
    """Raise InputError for a file that each plan set would overwrite."""
    if every and path is not None:
        raise InputError(f"{option} {path} is of one plan set", "choose it with --target in place of --all")


INTERFACE_OPTION = click.option("--interface", type=FILE, help="Read and Write for a CHECKPOINT that is a folder.")
JSON_OPTION = click.option(
    "--json", "json_to", type=NAME, metavar="FILE|-", callback=_tried, help="Write the facts as JSON too."
)
ALL_OPTION = click.option("--all", "every", is_flag=True, help="Each plan set that can run here, one after the other.")
CHECK_OPTION = click.option("--check", type=FILE, help="JSON file of limits; status 1 if one does not hold.")

TRUST_OPTION = click.option(
    "--trust", is_flag=True, help="Open saved programs, which can run any code, though they were not built here."
)


def TARGET_OPTIONS(command: Callable[..., Any]) -> Callable[..., Any]:  # noqa: N802 (used as the options beside it are)
    """Which plan set of a bundle."""
    command = click.option("--precision", help="Of the target; needed if it has several that can run here.")(command)
    return click.option("--target", help="Of the bundle; needed if it has several that can run here.")(command)


def conclude(tables: Sequence[Table], facts: Any, limits: Sequence[Limit], json_to: str | None) -> None:
    """Show, write, and end with status 1 where a limit does not hold."""
    from elit_export.bench.limits import misses

    show(*tables, json_to=json_to)
    finish(facts, misses(limits, facts), json_to)


def limits_in(check: Path | None, facts: Any, unmeasured: Mapping[str, str] = MappingProxyType({})) -> list[Limit]:
    """The limits of --check, all of metrics that will be measured: `facts` and `unmeasured` as for `check_metrics`."""
    from elit_export.bench.limits import check_metrics, load_limits

    limits = load_limits(check) if check else []
    check_metrics(limits, facts, unmeasured)
    return limits


def finish(facts: Any, missed: Sequence[str], json_to: str | None) -> None:
    """Write the facts, say which limits do not hold, and end with status 1 if there are such."""
    write_json(facts, json_to)
    for line in missed:
        complain(line)
    if missed:
        raise SystemExit(1)

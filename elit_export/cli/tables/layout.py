"""A table for people as a value, and how it is laid out at any width.

At every width all of it is there. Where a table is too wide, its headers and long texts break between words; where it
still is, the columns that do not fit follow in a block of their own below, beside the columns that name a row again. A
number is never broken and never shortened.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, JustifyMethod, RenderableType, RenderResult
from rich.table import Table as Drawn
from rich.text import Text

UNITS = ("B", "kB", "MB", "GB")
WHOLE = 28  # characters: a cell that is no longer stays on one line
INDENT = 2  # characters before a note
BORDER, FRAME = 1, 3  # characters of the right border, and around each column


@dataclass(frozen=True)
class Table:
    """The leading columns say what a row is about. `notes` stand below, each on a line of its own."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    @cached_property
    def keys(self) -> int:
        """The number of leading columns that tell each row from the others; 1 where no such number does."""
        for count in range(1, len(self.columns)):
            if len({row[:count] for row in self.rows}) == len(self.rows):
                return count
        return 1


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> Table:
    return Table(title, tuple(columns), tuple(tuple(row) for row in rows), tuple(notes))


def size(size_bytes: float) -> str:
    for unit in UNITS[:-1]:
        if size_bytes < 1000:
            return f"{size_bytes:.3g} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.3g} {UNITS[-1]}"


def digits(value: float, count: int = 3) -> str:
    """Write so many significant digits and no exponent; digits before the point are never rounded away."""
    if not math.isfinite(value) or value == 0:
        return f"{value:.0f}"
    return f"{value:.{max(0, count - 1 - math.floor(math.log10(abs(value))))}f}"


# ---------------------------------------------------------------- layout


def laid_out(shown: Table, width: int) -> RenderableType:
    """Title, blocks of columns and notes, none wider than so many characters."""
    blocks = [_drawn(shown, block, _widths(shown, block, width)) for block in blocks_of(shown, width)]
    title = Text(shown.title, style="italic", overflow="fold")
    return Group(title, *blocks, *(_Note(note) for note in shown.notes))


@dataclass(frozen=True)
class _Note:
    """An indented line that breaks between words and, other than rich's own padding, ends where its text does."""

    text: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in Text(self.text).wrap(console, options.max_width - INDENT, overflow="fold"):
            line.rstrip()
            yield Text(" " * INDENT).append_text(line)


def blocks_of(shown: Table, width: int) -> Iterator[tuple[int, ...]]:
    """The columns of each block; those that name a row are in all of them."""
    keys = _repeated(shown, width)
    block = [*keys]
    for column in range(len(keys), len(shown.columns)):
        if len(block) > len(keys) and _taken([_min_width(shown, each) for each in (*block, column)]) > width:
            yield tuple(block)
            block = [*keys]
        block.append(column)
    yield tuple(block)


def _repeated(shown: Table, width: int) -> range:
    """Return as many of the columns that name a row as leave room for each other column, at least the first."""
    min_widths = [_min_width(shown, column) for column in range(len(shown.columns))]
    for count in range(shown.keys, 1, -1):
        if _taken([*min_widths[:count], max(min_widths[count:])]) <= width:
            return range(count)
    return range(1)


def _widths(shown: Table, block: Sequence[int], width: int) -> list[int]:
    """The minimum that each column needs; what is left goes to cells that are broken, and then to headers that are."""
    widths = [_min_width(shown, column) for column in block]
    widths[-1] = max(1, widths[-1] - max(0, _taken(widths) - width))  # a single word that is wider than all there is
    for text_width in (_max_cell, _max_text):
        targets = [max(text_width(shown, column), each) for column, each in zip(block, widths, strict=True)]
        while _taken(widths) < width and widths != targets:
            neediest = max(range(len(block)), key=lambda place: targets[place] / widths[place])
            widths[neediest] += 1
    return widths


def _taken(widths: Sequence[int]) -> int:
    return BORDER + sum(each + FRAME for each in widths)


def _min_width(shown: Table, column: int) -> int:
    """The longest of what must not be broken: words of the header, of what names a row and of long cells."""
    cells = [row[column] for row in shown.rows]
    names = column < shown.keys
    words = [word for cell in cells if names or cell_len(cell) > WHOLE for word in cell.split()]
    short = [cell for cell in cells if not names and cell_len(cell) <= WHOLE]
    return max(map(cell_len, (*shown.columns[column].split(), *words, *short)), default=1)


def _max_cell(shown: Table, column: int) -> int:
    return max((cell_len(row[column]) for row in shown.rows), default=1)


def _max_text(shown: Table, column: int) -> int:
    return max(cell_len(shown.columns[column]), _max_cell(shown, column))


def _drawn(shown: Table, block: Sequence[int], widths: Sequence[int]) -> Drawn:
    """First column to the left, the others to the right."""
    drawn = Drawn()
    for column, width in zip(block, widths, strict=True):
        justify: JustifyMethod = "left" if column == 0 else "right"
        drawn.add_column(Text(shown.columns[column]), justify=justify, width=width, overflow="fold")
    for row in shown.rows:
        drawn.add_row(*(Text(row[column], overflow="fold") for column in block))
    return drawn

"""Text of files and names → text that a terminal only shows.

Names in manifests, recipes and checkpoints are whatever their author wrote: control characters move the cursor, clear
lines and change titles, marks of direction show names backwards, and half a surrogate pair cannot be written at all.
"""

from __future__ import annotations

import logging
import re

# Controls but for the tab and the end of a line; marks of direction; separators of lines; halves of surrogate pairs.
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """The text with what a terminal would obey written as `\\x1b`, `\\u202e`."""
    return UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text)


def printable_line(text: str) -> str:
    """Return the same for one line: a name that has the end of a line in it cannot say what we did not."""
    return printable(text).replace("\n", r"\n")


class PrintableFormatter(logging.Formatter):
    """Formats messages of the log, which name files and quote them; Python's own lines about errors stay lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (of logging)
        return printable_line(super().formatMessage(record))

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))

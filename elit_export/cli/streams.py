"""Output whose reader leaves, as `head` does: a command goes on in silence, saves its work, and tells by its status.

An output that is closed from the start (`>&-`) is silent too.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TextIO, cast

READER_LEFT = 141  # as of a program that SIGPIPE ends
OUTPUTS = {"stdout": "standard output", "stderr": "standard error"}  # in `sys` → in messages


class _Descriptor(io.FileIO):
    """A descriptor that becomes silent when nobody reads it any more, or after its first error, which names `title`."""

    reader_left = False

    def __init__(self, number: int, title: str) -> None:
        super().__init__(number, "wb", closefd=False)
        self.title = title

    def write(self, content: bytes | bytearray | memoryview) -> int | None:  # type: ignore[override]
        try:
            return super().write(content) if content else 0  # click tries an empty one, and hides its error
        except BrokenPipeError:
            self.reader_left = True
            self._silence()
            return len(content)
        except OSError as error:
            error.filename = self.title
            self._silence()  # what is left in buffers would raise the same once more
            raise

    def _silence(self) -> None:
        """Send the descriptor nowhere, for libraries and children that write by themselves too."""
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, self.fileno())
        os.close(silence)


@contextmanager
def readers_may_leave() -> Iterator[None]:
    """Let both outputs lose their readers; what would have ended with status 0 then ends with READER_LEFT."""
    with ExitStack() as stack:
        outputs = [stack.enter_context(_replaced(name)) for name in OUTPUTS]
        try:
            yield
        except SystemExit as end:
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:  # it is where it was closed before
                    stream.flush()
            if end.code in (None, 0) and any(output is not None and output.reader_left for output in outputs):
                raise SystemExit(READER_LEFT) from end
            raise


@contextmanager
def _replaced(name: str) -> Iterator[_Descriptor | None]:
    """Replace an output by one of the same descriptor; yields None where it has none, as in tests."""
    stream: TextIO = getattr(sys, name)
    try:
        number = stream.fileno()
    except (AttributeError, OSError, ValueError):
        yield None
        return
    stream.flush()
    raw = _Descriptor(number, OUTPUTS[name])
    through = getattr(stream, "write_through", False)  # of python -u
    text = io.TextIOWrapper(
        raw if through else io.BufferedWriter(cast("io.RawIOBase", raw)),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=getattr(stream, "line_buffering", False),
        write_through=through,
    )
    setattr(sys, name, text)
    try:
        yield raw
    finally:
        text.flush()
        setattr(sys, name, stream)

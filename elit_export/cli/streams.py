"""Output whose reader leaves, as `head` does: a command goes on in silence, saves its work, and tells by its status."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TextIO, cast

READER_LEFT = 141  # as of a program that SIGPIPE ends


class _Descriptor(io.FileIO):
    """A descriptor that becomes silent when nobody reads it any more."""

    reader_left = False

    def write(self, content: bytes | bytearray | memoryview) -> int | None:  # type: ignore[override]
        try:
            return super().write(content)
        except BrokenPipeError:
            self.reader_left = True
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, self.fileno())  # for libraries and children that write by themselves too
            os.close(silence)
            return len(content)


@contextmanager
def readers_may_leave() -> Iterator[None]:
    """Let both outputs lose their readers; what would have ended with status 0 then ends with READER_LEFT."""
    with ExitStack() as stack:
        outputs = [stack.enter_context(_replaced(name)) for name in ("stdout", "stderr")]
        try:
            yield
        except SystemExit as end:
            for name in ("stdout", "stderr"):
                getattr(sys, name).flush()
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
    raw = _Descriptor(number, "wb", closefd=False)
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

"""The callback of callers who want to hear nothing."""

from __future__ import annotations


def noop(*_args: object) -> None:
    """Take any arguments and do nothing."""

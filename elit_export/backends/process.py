"""What belongs to the process that made it, and what a fork leaves of it.

A library's threads do not survive a fork, and its memory is there twice. So a child never calls what its parent
opened, and never lets a destructor of it run: some crash, some wait for ever for threads that are gone.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from typing import NoReturn
from weakref import WeakSet

from elit_export.errors import EngineError

_BOUND: WeakSet[ProcessBound] = WeakSet()


class ProcessBound:
    """Belongs to the process that made it. In a child made by fork it is foreign: kept for ever, closed by nobody.

    It is not pickled either: another process opens its own.
    """

    def __init__(self) -> None:
        self.is_foreign = False
        _watch_forks()
        _BOUND.add(self)

    def check_process(self) -> None:
        """Raise EngineError in a child of the process that this belongs to."""
        if self.is_foreign:
            raise EngineError("opened in another process", "load the pipeline after the fork")

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "engines belong to the process that opened them and are not pickled; "
            "send the bundle's folder and load it there: Pipeline.load(BUNDLE)"
        )


@cache
def _watch_forks() -> None:
    if hasattr(os, "register_at_fork"):  # Windows has no fork
        os.register_at_fork(after_in_child=_abandon)


def _abandon() -> None:
    """One reference more than anyone will ever give back, so that the end of the interpreter frees nothing either."""
    for bound in list(_BOUND):
        bound.is_foreign = True
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(bound))

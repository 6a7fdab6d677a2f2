"""Runs work in a process of its own, which ends with the one that asked for it, however that ends."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import wait
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def in_own_process(function: Callable[P, R], *arguments: P.args, **named: P.kwargs) -> R:
    """Run a function in a new process; raises BrokenProcessPool if that dies.

    The process is spawned, so a script that calls this needs `if __name__ == "__main__":`.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context, initializer=end_with_parent) as processes:
        return processes.submit(function, *arguments, **named).result()


def end_with_parent() -> None:
    """Watch this process's parent from a thread, and end at once when it is gone.

    A parent that is killed closes no queue, and its children would wait for work for ever.
    """
    parent = multiprocessing.parent_process()
    assert parent, "this process has no parent of multiprocessing"

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="watch parent", daemon=True).start()

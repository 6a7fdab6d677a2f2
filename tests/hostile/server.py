"""Runs the command line in a process of its own for every request, under limits of memory and time.

Requests are lines of JSON on standard input: {"args": […], "folder": …}. The package is imported once, and each request
runs in a fork, so that many cases cost little. Nothing here has threads before it forks.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

import elit_export.bundle.recipe
import elit_export.calibrate.inputs
import elit_export.cli.bench
import elit_export.cli.calibrate
import elit_export.cli.sample
import elit_export.report.inspection
import elit_export.runtime.pipeline
import elit_export.training.data  # noqa: F401
from elit_export.cli import main

MEMORY_BYTES = 6 << 30
SECONDS = 10


def run(args: list[str], folder: str) -> None:
    """In the fork: never returns."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    os.chdir(folder)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    status = 1
    try:
        main(args)
    except SystemExit as ended:
        status = int(ended.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    os._exit(status)


def waited(child: int) -> int | None:
    """The exit status; None for one that took too long and was killed."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def serve() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if not child:
            run(request["args"], request["folder"])
        sys.stdout.write(json.dumps(waited(child)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()

"""A process that works for another ends with it, also where that is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from elit_export.bench.processes import in_own_process

WAITING = """
import sys, time
from pathlib import Path
from elit_export.bench.processes import in_own_process
from tests.bench.test_processes import told

if __name__ == "__main__":
    in_own_process(told, Path(sys.argv[1]))
"""


def told(file: Path) -> None:
    """Say which process this is, and work for a minute."""
    file.with_suffix(".part").write_text(str(os.getpid()))
    file.with_suffix(".part").rename(file)
    time.sleep(60)


def is_alive(process: int) -> bool:
    """Not even as a zombie, whom nobody may have waited for."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def within(seconds: float, happens: Callable[[], bool]) -> bool:
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        if happens():
            return True
        time.sleep(0.05)
    return False


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells of processes in files")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_children_of_a_bench_end_with_it(number: signal.Signals, tmp_path: Path) -> None:
    file = tmp_path / "process"
    script = tmp_path / "waiting.py"
    script.write_text(WAITING)
    root = str(Path(__file__).parents[2])
    with subprocess.Popen([sys.executable, script, file], env=os.environ | {"PYTHONPATH": root}) as parent:
        assert within(30, file.exists)
        child = int(file.read_text())
        assert is_alive(child)
        parent.send_signal(number)
        assert parent.wait(10) == -number
    assert within(10, lambda: not is_alive(child))


def test_a_result_comes_back_from_another_process() -> None:
    assert in_own_process(os.getpid) != os.getpid()

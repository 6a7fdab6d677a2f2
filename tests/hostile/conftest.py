"""The command line as an attacker meets it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from elit_export.bundle.reading import OWN_HASH, Bundle, manifest_text
from tests.hostile.server import SECONDS


@dataclass(frozen=True)
class Ended:
    """How a command ended: `status` is None where it had to be killed."""

    status: int | None
    out: str
    err: str


CommandLine = Callable[..., Ended]


@pytest.fixture(scope="session")
def server() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-m", "tests.hostile.server"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        assert process.stdin
        process.stdin.close()


@pytest.fixture
def command_line(server: subprocess.Popen[str], tmp_path: Path) -> CommandLine:
    """Run `elit-export` with these arguments in `tmp_path`, under limits of memory and time."""
    assert server.stdin
    assert server.stdout

    def run(*args: object) -> Ended:
        server.stdin.write(json.dumps({"args": [str(arg) for arg in args], "folder": str(tmp_path)}) + "\n")
        server.stdin.flush()
        status = json.loads(server.stdout.readline())
        texts = [(tmp_path / name).read_text(encoding="utf-8") for name in ("stdout", "stderr")]
        return Ended(status, *texts)

    return run


@pytest.fixture
def refused(command_line: CommandLine) -> Callable[..., str]:
    """Run a command that has to be refused in one line; gives that line."""

    def run(*args: object) -> str:
        ended = command_line(*args)
        assert ended.status is not None, f"no answer in {SECONDS} s"
        assert ended.status == 2, f"{ended.status}: {ended.err[-2000:]}"
        assert "Traceback" not in ended.err
        return ended.err.strip()

    return run


@pytest.fixture
def bundle(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    """A copy of the tiny bundle."""
    return Path(shutil.copytree(tiny_bundle.folder, tmp_path / "bundle"))


def forge(bundle: Path, change: Callable[[Any], None]) -> None:
    """Change a manifest and recompute its hash, as anyone can."""
    path = bundle / "manifest.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    del values[OWN_HASH]
    change(values)
    path.write_text(manifest_text(values), encoding="utf-8")

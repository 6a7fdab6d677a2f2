"""The example application does what its docstring says."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TextIO

import pytest
from PIL import Image

from elit_export.bundle import Bundle

APP = Path(__file__).parent.parent / "examples" / "app.py"


def start(*arguments: str | Path, stderr: int | TextIO = subprocess.PIPE) -> subprocess.Popen[str]:
    command = [sys.executable, str(APP), *(str(argument) for argument in arguments)]
    return subprocess.Popen(command, stderr=stderr, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    """Exit status and the lines of standard error."""
    _, said = process.communicate(timeout=60)
    return process.returncode, said.splitlines()


def wait_for(path: Path, process: subprocess.Popen[str], log: Path, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.02)


def test_it_draws_a_picture_and_tells_every_step(tiny_bundle: Bundle, tmp_path: Path) -> None:
    status, said = finish(start(tiny_bundle.folder, tmp_path / "a.png", "--steps", "7"))
    assert status == 0, said
    assert [line.split(" at ")[0] for line in said] == [f"step {step} of 7" for step in range(1, 8)]
    assert said[0].endswith("1of4")
    assert said[-1].endswith("4of4")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width > picture.height > 8


def test_ctrl_c_stops_it_and_keeps_the_last_preview(tiny_bundle: Bundle, tmp_path: Path) -> None:
    log = tmp_path / "said"
    with log.open("w") as stderr:  # a pipe would fill up
        process = start(tiny_bundle.folder, tmp_path / "a.png", "--steps", "200000", stderr=stderr)
    wait_for(tmp_path / "a.preview.png", process, log)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    *steps, last = log.read_text().splitlines()
    assert last == "stopped"
    assert all(line.startswith("step ") for line in steps)
    assert {path.name for path in tmp_path.iterdir()} == {"a.preview.png", "said"}
    with Image.open(tmp_path / "a.preview.png") as picture:
        picture.load()


@pytest.mark.parametrize(
    ("bundle", "options", "told"),
    [("nowhere", (), "nowhere"), ("", ("--steps", "0"), "at least 1 steps")],
)
def test_an_error_is_one_line_and_status_2(
    bundle: str, options: tuple[str, ...], told: str, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    folder = tmp_path / bundle if bundle else tiny_bundle.folder
    status, said = finish(start(folder, tmp_path / "a.png", *options))
    assert status == 2
    assert len(said) == 1
    assert said[0].startswith("error: ")
    assert told in said[0]
    assert list(tmp_path.iterdir()) == []


def test_a_picture_that_cannot_be_written_is_one_line_too(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """No error of the package: the file is the application's own."""
    status, said = finish(start(tiny_bundle.folder, tmp_path / "nowhere" / "a.png"))
    assert status == 2
    assert said[-1].startswith("error: ")
    assert "nowhere" in said[-1]
    assert list(tmp_path.iterdir()) == []


def test_it_is_short() -> None:
    assert len(APP.read_text(encoding="utf-8").splitlines()) < 60

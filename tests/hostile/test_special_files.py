"""FIFOs, devices, sockets and files of gigabytes in place of files that are read: refused at once."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from elit_export.checkpoints.native import load_checkpoint
from elit_export.checkpoints.vae import read_decoder
from elit_export.errors import CheckpointError
from elit_export.evaluate.evaluator import load_evaluator
from elit_export.text.folder import read_encoder
from tests.hostile.conftest import forge

GB = 1 << 30
Special = Callable[[Path], None]


@pytest.fixture
def special(request: pytest.FixtureRequest) -> Iterator[Special]:
    """Make a special file of the kind that a test asks for."""
    sockets = []

    def make(path: Path) -> None:
        path.unlink(missing_ok=True)
        if request.param == "fifo":
            os.mkfifo(path)
        elif request.param == "device":
            path.symlink_to("/dev/zero")
        elif request.param == "sparse":
            with path.open("wb") as file:
                file.truncate(8 * GB)
        else:
            sockets.append(socket.socket(socket.AF_UNIX))
            with contextlib.chdir(path.parent):  # an address holds about 100 characters, a path any number
                sockets[0].bind(path.name)

    yield make
    for each in sockets:
        each.close()


# How a command comes to read a file: the name of the file in the working folder, and the arguments.
READERS = {
    "manifest": ("bundle/manifest.json", ["inspect", "bundle"]),
    "recipe": ("r.toml", ["build", "r.toml"]),
    "calibration recipe": ("r.toml", ["calibrate", "samples", "bundle", "--recipe", "r.toml", "--out", "s.npz"]),
    "samples": ("s.npz", ["calibrate", "sensitivity", "bundle", "--samples", "s.npz", "--precision", "int8"]),
    "prompts": ("p.npz", ["sample", "bundle", "--prompts", "p.npz"]),
    "mask": ("m", ["sample", "bundle", "--cache", "static:m"]),
    "limits": ("l.json", ["bench", "memory", "bundle", "--check", "l.json"]),
    "IDX": ("data/train-images-idx3-ubyte", ["train", "data", "--out", "run"]),
    "image": ("data/cat/1.png", ["train", "data", "--out", "run"]),
}
PROMPTED = {"prompts"}


def takes_text(bundle: Path) -> None:
    """Let a bundle say that its model takes text, which nothing finds out before prompts are read."""

    def change(values: dict) -> None:  # type: ignore[type-arg]
        values["model"]["spec"] |= {"num_classes": 0, "text_width": 8}
        for plan_set in values["plan_sets"]:
            for profile in plan_set["profiles"]:
                profile["text"] = {"min": 1, "opt": 4, "max": 8}

    forge(bundle, change)


def prepared(name: str, bundle: Path, tmp_path: Path) -> Path:
    file = tmp_path / READERS[name][0]
    file.parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "data" / "train-labels-idx1-ubyte").write_bytes(b"") if name == "IDX" else None
    if name in PROMPTED:
        takes_text(bundle)
    return file


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("special", ["fifo", "device", "socket"], indirect=True)
def test_special_files_are_refused_with_the_remedy(
    name: str, special: Special, refused: Callable[..., str], bundle: Path, tmp_path: Path
) -> None:
    special(prepared(name, bundle, tmp_path))
    message = refused(*READERS[name][1])
    assert "not a regular file; write " in message, message


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("special", ["sparse"], indirect=True)
def test_files_of_gigabytes_are_refused_before_they_are_read(
    name: str, special: Special, refused: Callable[..., str], bundle: Path, tmp_path: Path
) -> None:
    special(prepared(name, bundle, tmp_path))
    told = {"samples": "not a file of calibration samples", "prompts": "not a .npz", "IDX": "not an IDX file"}
    assert told.get(name, "has 8,589,934,592 bytes") in refused(*READERS[name][1])


@pytest.mark.parametrize("special", ["fifo", "device"], indirect=True)
def test_special_files_in_folders_of_other_libraries_are_refused(special: Special, tmp_path: Path) -> None:
    """Also a file that only the library itself would open."""
    (tmp_path / "config.json").write_text("{}")
    special(tmp_path / "merges.txt")
    for read in (read_decoder, read_encoder):
        with pytest.raises(CheckpointError, match="not a regular file; write the folder's content into a file"):
            read(tmp_path)
    (tmp_path / "merges.txt").unlink()
    special(tmp_path / "config.json")
    for read in (read_decoder, read_encoder):
        with pytest.raises(CheckpointError, match="not a regular file"):
            read(tmp_path)


@pytest.mark.parametrize("special", ["fifo", "device"], indirect=True)
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_special_files_are_no_checkpoints(special: Special, suffix: str, tmp_path: Path) -> None:
    special(tmp_path / f"c.{suffix}")
    for load in (load_checkpoint, load_evaluator):
        with pytest.raises(CheckpointError, match="not a regular file; write the checkpoint into a file"):
            load(tmp_path / f"c.{suffix}")

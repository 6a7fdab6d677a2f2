"""Writing files whole or not at all, reading what others wrote.

Takes: paths.  Gives: files that appear complete under their name, the content of plain ones.  May touch: the disk.
Knows nothing of: what the files hold.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import sys
import tempfile
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from elit_export.errors import CheckpointError, first_line

try:
    from lzma import LZMAError
except ImportError:  # a Python without it, which reads no such files either
    LZMAError = zlib.error  # type: ignore[assignment, misc]

if sys.platform != "win32":
    import fcntl

CHUNK_BYTES = 1 << 20
NAME_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9._-]*$"  # names that become folders: not hidden, no way out
MARK = "elit-"  # in temporary names, so that no file of a user is taken for one


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a temporary path in the same folder; on success it takes the name `path`, on failure it goes.

    The content reaches the disk before the name does, so a crash leaves the old file or the new one.
    The temporary file that a killed process left behind goes with the next writing of the same `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _drop_abandoned(path)
    with _temporary_beside(path) as temporary:
        yield temporary
        temporary.chmod(0o644)  # a temporary file is its owner's alone
        flush_to_disk(temporary)
        temporary.replace(path)


@contextmanager
def _temporary_beside(path: Path) -> Iterator[Path]:
    temporary, held = _created_beside(path)
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
        if held is not None:
            os.close(held)


def _created_beside(path: Path) -> tuple[Path, int | None]:
    """A new file and the descriptor that holds it, None where files cannot be held."""
    while True:
        # The suffix stays, for libraries that choose a format by it.
        descriptor, name = tempfile.mkstemp(prefix=f".{path.stem}.{MARK}", suffix=path.suffix, dir=path.parent)
        is_held = _hold(descriptor)
        if is_held and os.fstat(descriptor).st_nlink:
            return Path(name), descriptor
        os.close(descriptor)
        if is_held is None:
            return Path(name), None
        # Before it was held, another writer took it for abandoned: once more.


def _drop_abandoned(path: Path) -> None:
    """Remove temporaries of `path` whose writers are dead."""
    temporary = re.compile(re.escape(f".{path.stem}.{MARK}") + "[a-z0-9_]{8}" + re.escape(path.suffix))
    with suppress(OSError):  # what cannot be listed, opened or removed stays and harms nobody
        for found in path.parent.iterdir():
            if temporary.fullmatch(found.name):
                _drop_unless_held(found)


def _drop_unless_held(temporary: Path) -> None:
    descriptor = os.open(temporary, os.O_RDWR)
    try:
        if _hold(descriptor):
            temporary.unlink()
    finally:
        os.close(descriptor)


def _hold(descriptor: int) -> bool | None:
    """Lock a file for as long as it is open and its process lives; False if another does, None without locks."""
    if sys.platform == "win32":
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def write_text(path: Path, text: str) -> None:
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_bytes(path: Path, content: bytes) -> None:
    with written_whole(path) as temporary:
        temporary.write_bytes(content)


def flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def json_table(path: Path) -> dict[str, Any]:
    """The names and values of a JSON file that another program wrote; raises CheckpointError."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {first_line(error)}; copy the folder again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: no table of names and values; copy the folder again")
    return values


def shards_of(index: Path) -> list[Path]:
    """The safetensors files that an index beside them names, in order; raises CheckpointError."""
    names = json_table(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{index}: has no weight_map from tensors to files; copy the folder again")
    found = sorted(set(names.values()))
    for name in found:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index}: names {name!r}, no safetensors file of its own folder")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index.parent}: lacks {name}, which its index names; copy the folder again")
    return [index.parent / name for name in found]


class PlainArraysError(ValueError):
    """A file is no `.npz` of plain arrays, or damaged."""


# What NumPy and the libraries below it raise of files that are damaged, encrypted, pickled or of another kind.
DAMAGED = (
    *(ValueError, TypeError, EOFError, KeyError, IndexError, AttributeError, SyntaxError, OverflowError),
    *(RuntimeError, MemoryError, struct.error, tokenize.TokenError),
    *(zipfile.BadZipFile, zlib.error, LZMAError),
)


def plain_arrays(path: Path) -> dict[str, Any]:
    """The arrays of a `.npz` file by name, without unpickling anything.

    Raises PlainArraysError, or OSError if the file is missing or cannot be read.
    """
    with path.open("rb") as opened:
        try:
            with np.load(opened, allow_pickle=False) as file:
                return dict(file)
        except DAMAGED as error:
            raise PlainArraysError(f"{path}: no .npz of plain arrays, or damaged") from error

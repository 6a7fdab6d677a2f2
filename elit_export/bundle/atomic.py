"""Writing files whole or not at all."""

from __future__ import annotations

import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform != "win32":
    import fcntl

CHUNK_BYTES = 1 << 20
NAME_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9._-]*$"  # names that become folders: not hidden, no way out
MARK = "elit-"  # in temporary names, so that no file of a user is taken for one


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a temporary path in the same folder; on success it takes the name `path`, on failure it goes.

    The content reaches the disk before the name does, so a crash leaves the old file or the new one.
    The temporary file that a killed process left behind goes with the next writing of the same `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _drop_abandoned(path)
    with _temporary_beside(path) as temporary:
        yield temporary
        temporary.chmod(0o644)  # a temporary file is its owner's alone
        fsync(temporary)
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
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_bytes(path: Path, content: bytes) -> None:
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def fsync(path: Path) -> None:
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

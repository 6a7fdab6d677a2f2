"""Writing files whole or not at all: the one way by which the package writes a file that a user names.

What a name may be, and what happens:

- nothing yet, or a regular file: the content is written beside it and takes its name at the end;
- a link: the same happens where it leads, and the link stays;
- a device, a pipe, or what a descriptor is open on (`/dev/stdout`, `/dev/fd/3`, `>(…)` of a shell): the finished
  content is copied into it, and it stays what it is.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform != "win32":
    import fcntl

CHUNK_BYTES = 1 << 20
NAME_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9._-]*$"  # names that become folders: not hidden, no way out
MARK = "elit-"  # in temporary names, so that no file of a user is taken for one
# Together with the rest of a temporary name below the 143 bytes that the strictest file systems take.
STEM_BYTES, SUFFIX_BYTES = 100, 20
# How mounts refuse a mode, a flush or an owner that they do not have; the content is there all the same.
REFUSED = {errno.EPERM, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
DESCRIPTORS = re.compile(r"/proc/(?P<process>\d+)(/task/\d+)?/fd|/dev/fd")  # folders whose entries are descriptors
MAX_LINKS = 40
NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
BINARY = getattr(os, "O_BINARY", 0)


@contextmanager
def atomic_write(path: Path, *, through_link: bool = True) -> Iterator[Path]:
    """Give a temporary path; on success its content takes the name `path`, on failure it goes.

    The content reaches the disk before the name does, so a crash leaves the old file or the new one. A new file has the
    mode that the umask leaves, one that is replaced keeps its own. The temporary file that a killed process left behind
    goes with the next writing of the same `path`. Without `through_link` a link is itself replaced by a file.
    An OSError names `path`.
    """
    with naming_file(path):
        writing = (
            _into_stream(path)
            if through_link and is_stream(path)
            else _replacing(_target(path, through_link=through_link))
        )
        with writing as temporary:
            yield temporary


def write_text(path: Path, text: str, *, through_link: bool = True) -> None:
    with atomic_write(path, through_link=through_link) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_bytes(path: Path, content: bytes) -> None:
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def append_text(path: Path, text: str, *, through_link: bool = True) -> None:
    """Add to the end of a log; without `through_link` a log that is a link is an OSError."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | BINARY | (0 if through_link else NO_FOLLOW)
    with naming_file(path), os.fdopen(os.open(path, flags, 0o666), "a", encoding="utf-8") as file:
        file.write(text)


def check_writable(path: Path) -> None:
    """Raise the OSError that writing `path` would, before the work whose result it is to hold.

    Nothing is left behind, a folder that is to be made included.
    """
    with naming_file(path):
        if is_stream(path):
            _check_stream(path)
            return
        target = _target(path, through_link=True)
        _refuse_folder(target)
        folder = next(folder for folder in target.absolute().parents if os.path.lexists(folder))
        if folder != target.absolute().parent:  # it is made on writing
            tempfile.TemporaryDirectory(dir=folder, prefix=f".{MARK}").cleanup()
            return
        with _temporary_beside(target, 0o666):
            pass


@contextmanager
def private_folder(parent: Path, name: str) -> Iterator[Path]:
    """Give a new folder in `parent`, from which finished files are moved beside it; it goes afterwards.

    One that a killed process left behind goes with the next of this name.
    """
    parent.mkdir(parents=True, exist_ok=True)
    _drop_abandoned(parent / name)

    def make() -> tuple[Path, int | None]:
        folder = parent / _temporary_name(parent / name)
        folder.mkdir()
        return folder, None if sys.platform == "win32" else os.open(folder, os.O_RDONLY)

    folder, held = _held(make)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if held is not None:
            os.close(held)


@contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Let an OSError that names no file, as one of a full disk, or a temporary one name `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is None or f".{MARK}" in str(error.filename):
            error.filename = str(path)
        raise


# ---------------------------------------------------------------- what a name is


def is_stream(path: Path) -> bool:
    """Is it written into as it is: a device, a pipe, a socket, or what a descriptor is open on?"""
    if _descriptors_of(path) is not None:
        return True
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _descriptors_of(path: Path) -> tuple[re.Match[str], str] | None:
    """Return the folder of descriptors that links lead into, and the name in it."""
    for _ in range(MAX_LINKS):
        folder = os.path.realpath(path.parent)
        if (match := DESCRIPTORS.fullmatch(folder)) and path.name.isdecimal():
            return match, path.name
        if not path.is_symlink():
            return None
        path = Path(folder) / path.readlink()
    return None


def _own_descriptor(path: Path) -> int | None:
    """Return the number if the path is a descriptor of this process."""
    found = _descriptors_of(path)
    if found is None or found[0]["process"] not in (None, str(os.getpid())):
        return None
    return int(found[1])


def _target(path: Path, *, through_link: bool) -> Path:
    return Path(os.path.realpath(path)) if through_link and path.is_symlink() else path


def _refuse_folder(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))


# ---------------------------------------------------------------- into a stream


def _check_stream(path: Path) -> None:
    """Raise OSError if it cannot be written; it is not opened, as a pipe without a reader would wait."""
    own = _own_descriptor(path)
    if own is not None:
        os.fstat(own)  # raises if it is not open
        if sys.platform != "win32" and fcntl.fcntl(own, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise PermissionError(errno.EACCES, "open for reading only")
    elif not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


@contextmanager
def _into_stream(path: Path) -> Iterator[Path]:
    """Writers seek and choose a format by a suffix, so the content is made elsewhere, whole."""
    with tempfile.TemporaryDirectory() as private:
        temporary = Path(private) / f"content{_short(path.suffix, SUFFIX_BYTES)}"
        yield temporary
        own = _own_descriptor(path)
        # A copy of an own descriptor shares its position: what a shell collects in one file stays in order.
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND) if own is None else os.dup(own)
        with temporary.open("rb") as content, open(descriptor, "wb") as stream:  # noqa: PTH123 - a descriptor
            shutil.copyfileobj(content, stream, CHUNK_BYTES)


# ---------------------------------------------------------------- in the place of a file


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    _refuse_folder(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _drop_abandoned(path)
    old = path.lstat() if path.is_file() and not path.is_symlink() else None
    mode = stat.S_IMODE(old.st_mode) & 0o666 | 0o600 if old else 0o666  # never wider than the old one meanwhile
    with _temporary_beside(path, mode) as temporary:
        yield temporary
        fsync(temporary)
        if old:
            _make_alike(temporary, old)
        temporary.replace(path)


def _make_alike(path: Path, old: os.stat_result) -> None:
    """Give a file the owner and the mode of the one that it replaces, as far as the mount lets."""
    mine = path.stat()
    if (mine.st_uid, mine.st_gid) != (old.st_uid, old.st_gid) and sys.platform != "win32":
        with _unless_refused():
            os.chown(path, old.st_uid, old.st_gid)
    if stat.S_IMODE(path.stat().st_mode) != stat.S_IMODE(old.st_mode):
        with _unless_refused():
            path.chmod(stat.S_IMODE(old.st_mode))


@contextmanager
def _unless_refused() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in REFUSED:
            raise


@contextmanager
def _temporary_beside(path: Path, mode: int) -> Iterator[Path]:
    def make() -> tuple[Path, int]:
        temporary = path.with_name(_temporary_name(path))
        return temporary, os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | NO_FOLLOW | BINARY, mode)

    temporary, held = _held(make)
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
        if held is not None:
            os.close(held)


# ---------------------------------------------------------------- temporary names


def _temporary_name(path: Path) -> str:
    return f"{_prefix(path)}{os.urandom(4).hex()}{_short(path.suffix, SUFFIX_BYTES)}"


def _prefix(path: Path) -> str:
    return f".{_short(path.stem, STEM_BYTES)}.{MARK}"


def _short(text: str, size_bytes: int) -> str:
    """The beginning of a name, cut between two characters. A suffix stays, for libraries choose a format by it."""
    return text.encode("utf-8", "surrogateescape")[:size_bytes].decode("utf-8", "ignore")


def _held(make: Callable[[], tuple[Path, int | None]]) -> tuple[Path, int | None]:
    """Return what was made under a temporary name, and the descriptor that holds it, None where nothing can be held."""
    while True:
        temporary, descriptor = make()
        is_held = None if descriptor is None else _hold(descriptor)
        if descriptor is not None and is_held and _is_at(temporary, descriptor):
            return temporary, descriptor
        if descriptor is not None:
            os.close(descriptor)
        if is_held is None:
            return temporary, None
        # Before it was held, another writer took it for abandoned: once more.


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _drop_abandoned(path: Path) -> None:
    """Remove temporaries of `path` whose writers are dead, whatever they lead to left alone."""
    temporary = re.compile(re.escape(_prefix(path)) + "[a-z0-9_]{8}" + re.escape(_short(path.suffix, SUFFIX_BYTES)))
    with suppress(OSError):  # what cannot be listed stays and harms nobody
        for found in path.parent.iterdir():
            if temporary.fullmatch(found.name):
                _drop_unless_held(found)


def _drop_unless_held(temporary: Path) -> None:
    with suppress(OSError):  # nor what cannot be opened or removed
        mode = temporary.lstat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            return
        descriptor = os.open(temporary, (os.O_RDONLY if stat.S_ISDIR(mode) else os.O_RDWR) | NO_FOLLOW)
        try:
            if _hold(descriptor):
                shutil.rmtree(temporary) if stat.S_ISDIR(mode) else temporary.unlink()
        finally:
            os.close(descriptor)


def _hold(descriptor: int) -> bool | None:
    """Lock what is open for as long as it is and its process lives; False if another does, None without locks."""
    if sys.platform == "win32":
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


# ---------------------------------------------------------------- the disk


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with _unless_refused():
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()

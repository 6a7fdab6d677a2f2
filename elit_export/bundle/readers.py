"""The one place that opens files of users for reading: regular ones alone, of a bounded size, without trusting them.

A FIFO, a socket or a device is refused before it is opened, so that nothing waits for one. What a file says of its own
size (the header of an array, the directory of a zip archive) is compared with what may be read before memory is taken
for it. Problems are raised as the error class that the caller names; a file that is missing or that the system does
not let be read stays the OSError it is.
"""

from __future__ import annotations

import errno
import gzip
import io
import json
import math
import os
import re
import stat
import struct
import tokenize
import tomllib
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from elit_export.errors import CheckpointError, ElitExportError, summary

if TYPE_CHECKING:
    from elit_export.arrays import Arrays

ErrorClass = type[ElitExportError]
T = TypeVar("T")

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
TEXT_BYTES = MIB  # of recipes, masks and limits, which people write by hand
CONFIG_BYTES = 64 * MIB  # of configurations, indexes and manifests, which programs write
CHUNK_BYTES = MIB
MAX_NESTING = 64  # tables and lists inside one another
MAX_INT_BITS = 128  # of whole numbers; a seed has 64
MAX_KEY_PARTS = 64  # of a dotted key of TOML: the time to read it grows with the square of their number
HEADER_BYTES = 64 * KIB  # of an array in a `.npz`; NumPy reads 10,000 characters
SPECIAL = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


# ---------------------------------------------------------------- opening


def check_regular(path: Path, *, what: str, error: ErrorClass) -> None:
    """Refuse what is not a regular file, for libraries that open by name; raises OSError if there is none."""
    _check_kind(path, path.stat(), what, error)


def check_folder(folder: Path, *, what: str, error: ErrorClass) -> None:
    """The same of every file of a folder, for libraries that choose which of them they open."""
    for path in sorted(folder.iterdir()):
        if path.exists() and not path.is_dir():
            check_regular(path, what=what, error=error)


@contextmanager
def open_regular(path: Path, *, what: str, error: ErrorClass, limit_bytes: int | None = None) -> Iterator[IO[bytes]]:
    """Open a regular file of at most `limit_bytes` (None: of any size); never waits for another process.

    `what` says in messages what the file is to be. Raises `error`, or OSError.
    """
    check_regular(path, what=what, error=error)  # before it is opened, which a device may notice
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    with os.fdopen(os.open(path, flags), "rb") as file:
        status = os.fstat(file.fileno())
        _check_kind(path, status, what, error)  # once more: the name may have come to mean another file
        if limit_bytes is not None and status.st_size > limit_bytes:
            raise _too_large(path, status.st_size, what, error, limit_bytes)
        yield file


def _check_kind(path: Path, status: os.stat_result, what: str, error: ErrorClass) -> None:
    kind = stat.S_IFMT(status.st_mode)
    if kind == stat.S_IFDIR:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if kind != stat.S_IFREG:
        raise error(
            f"{path}: {SPECIAL.get(kind, 'a special file')}, not a regular file",
            f"write {what} into a file and give its name",
        )


def _too_large(path: Path, size: int, what: str, error: ErrorClass, limit_bytes: int) -> ElitExportError:
    return error(
        f"{path}: has {size:,} bytes, {what} may have {limit_bytes:,}", f"check that it is the file of {what} you mean"
    )


def read_bytes(path: Path, *, what: str, error: ErrorClass, limit_bytes: int) -> bytes:
    """The content of a regular file; raises `error` if it has more bytes, or OSError."""
    with open_regular(path, what=what, error=error, limit_bytes=limit_bytes) as file:
        content = _read_up_to(file, limit_bytes + 1)
    if len(content) > limit_bytes:  # it grew, or is one of those whose size the system does not tell
        raise _too_large(path, len(content), what, error, limit_bytes)
    return content


def _read_up_to(file: IO[bytes], limit_bytes: int) -> bytes:
    """Read by parts: one large read takes memory for all that it might find."""
    parts, missing = list[bytes](), limit_bytes
    while missing and (part := file.read(min(CHUNK_BYTES, missing))):
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


# ---------------------------------------------------------------- text


def read_text(path: Path, *, what: str, error: ErrorClass, limit_bytes: int = TEXT_BYTES) -> str:
    """Text in UTF-8, with or without a byte order mark; raises `error`, or OSError."""
    return decoded(read_bytes(path, what=what, error=error, limit_bytes=limit_bytes), path, what=what, error=error)


def decoded(content: bytes, path: Path, *, what: str, error: ErrorClass) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise error(f"{path}: not text in UTF-8: {problem}", f"save {what} as UTF-8") from problem


def read_toml(path: Path, *, what: str, error: ErrorClass, limit_bytes: int = TEXT_BYTES) -> dict[str, Any]:
    """The tables of a TOML file; raises `error`, or OSError."""
    text = read_text(path, what=what, error=error, limit_bytes=limit_bytes)
    try:
        _check_dotted_keys(text)
        return _bounded(tomllib.loads(text))
    except (ValueError, RecursionError) as problem:
        raise error(f"{path}: not TOML: {_parse_problem(problem)}", f"mend {what} there") from problem


# Every alternative matches whatever it began with, whole or not, so that a text is gone through once.
KEY_PART = r"""(?:[\w-]++|"(?:[^"\\\n]|\\.)*+"?|'[^'\n]*+'?)"""
TOML_TOKEN = re.compile(
    r'''#[^\n]*+|"""(?:[^"\\]|\\.|"(?!""))*+(?:""")?|'''
    r"""'{3}(?:[^']|'(?!''))*+(?:'{3})?|"""
    rf"(?P<key>{KEY_PART}(?:[ \t]*+\.[ \t]*+{KEY_PART})*+)",
    re.DOTALL,
)


def _check_dotted_keys(text: str) -> None:
    """Raise ValueError for a long key. Dots in comments and strings do not count; a number is a key of two parts."""
    for token in TOML_TOKEN.finditer(text):
        if (key := token["key"]) and key.count(".") >= MAX_KEY_PARTS and len(re.findall(KEY_PART, key)) > MAX_KEY_PARTS:
            raise ValueError(f"a dotted key of more than {MAX_KEY_PARTS} parts")


def read_json(path: Path, *, what: str, error: ErrorClass, limit_bytes: int = CONFIG_BYTES) -> Any:
    """What a JSON file holds; raises `error`, or OSError."""
    text = read_text(path, what=what, error=error, limit_bytes=limit_bytes)
    try:
        return parsed_json(text)
    except ValueError as problem:
        raise error(f"{path}: not JSON: {problem}", f"copy or write {what} again") from problem


def parsed_json(text: str) -> Any:
    """What JSON text holds; raises ValueError, also for text that is nested too deep."""
    try:
        return _bounded(json.loads(text))
    except (ValueError, RecursionError) as problem:
        raise ValueError(_parse_problem(problem)) from problem


def read_json_object(path: Path) -> dict[str, Any]:
    """The names and values of a JSON file that another program wrote; raises CheckpointError."""
    try:
        content = read_bytes(path, what="the configuration", error=CheckpointError, limit_bytes=CONFIG_BYTES)
        values = parsed_json(content.decode("utf-8-sig"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not JSON: {summary(error)}", "copy the folder again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: no table of names and values", "copy the folder again")
    return values


def _parse_problem(problem: Exception) -> str:
    """Python's own words tell programmers how to lift its limits."""
    if isinstance(problem, RecursionError):
        return f"nested more than {MAX_NESTING} deep"
    if "integer string conversion" in str(problem):
        return "a whole number of thousands of digits"
    return summary(problem)


def _bounded(values: T) -> T:
    """The values; raises ValueError for what is nested so deep, or so large, that later code would fail over it."""
    level, depth = list[Any]([values]), 0
    while level:
        if depth > MAX_NESTING:
            raise ValueError(f"nested more than {MAX_NESTING} deep")
        if any(isinstance(value, int) and value.bit_length() > MAX_INT_BITS for value in level):
            raise ValueError(f"a whole number of more than {MAX_INT_BITS} bits")
        tables = [list(value.values()) if isinstance(value, dict) else value for value in level]
        level = [value for table in tables if isinstance(table, list) for value in table]
        depth += 1
    return values


# ---------------------------------------------------------------- gzip


def read_gzipped(path: Path, *, what: str, error: ErrorClass, needed: Callable[[bytes], int], head_bytes: int) -> bytes:
    """The content of a file, gzipped or not, of which `needed(head)` says from its first bytes how long it has to be.

    Not more than one byte beyond that is inflated. Raises `error`, or OSError; `needed` raises what it wants to.
    """
    with open_regular(path, what=what, error=error) as file:
        is_gzipped = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        source: IO[bytes] = gzip.GzipFile(fileobj=file) if is_gzipped else file  # type: ignore[assignment]
        try:
            head = _read_up_to(source, head_bytes)
            rest = needed(head) - len(head)
            return head + _read_up_to(source, max(0, rest) + 1)
        except (EOFError, zlib.error, gzip.BadGzipFile) as problem:
            raise error(f"{path}: unreadable: {problem}", "download it again") from problem


# ---------------------------------------------------------------- zip archives of arrays and tensors


class PlainArraysError(ValueError):
    """A file is no `.npz` of plain arrays, or damaged."""


# What NumPy and the libraries below it raise of files that are damaged, encrypted, pickled or of another kind.
DAMAGED = (
    *(ValueError, TypeError, EOFError, KeyError, IndexError, AttributeError, SyntaxError, OverflowError),
    *(RuntimeError, NotImplementedError, struct.error, tokenize.TokenError),
    *(zipfile.BadZipFile, zlib.error),
)
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # NumPy writes no other


def plain_arrays(
    path: Path, wanted: Collection[str] | Callable[[str], bool], *, what: str, error: ErrorClass, limit_bytes: int
) -> Arrays:
    """The arrays of a `.npz` file that are asked for and are in it, by name, without unpickling anything.

    The others are not read. Together they may have `limit_bytes`, by what the archive and each array's header say.
    Raises PlainArraysError, `error` for a special file or too many bytes, or OSError.
    """
    asks = wanted if callable(wanted) else wanted.__contains__
    with _archive(path, what, error) as archive:
        members = {name: info for name, info in _members(archive).items() if asks(name)}
        if (size := sum(info.file_size for info in members.values())) > limit_bytes:
            raise _inflated(path, size, what, error, limit_bytes)
        return {name: _array(archive, info) for name, info in members.items()}


def array_names(path: Path, *, what: str, error: ErrorClass) -> list[str]:
    """The names of all arrays of a `.npz` file, of which none is read; raises as plain_arrays."""
    with _archive(path, what, error) as archive:
        return list(_members(archive))


def array_headers(path: Path, *, what: str, error: ErrorClass) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The type and shape that each array of a `.npz` file says it has; none is read. Raises as plain_arrays."""
    with _archive(path, what, error) as archive:
        headers = {}
        for name, info in _members(archive).items():
            with _opened(archive, info) as member:
                shape, dtype, _ = _header(member)
            headers[name] = (str(dtype), shape)
        return headers


@contextmanager
def _archive(path: Path, what: str, error: ErrorClass) -> Iterator[zipfile.ZipFile]:
    with open_regular(path, what=what, error=error) as opened:
        try:
            with zipfile.ZipFile(opened) as archive:
                yield archive
        except ElitExportError:
            raise
        except DAMAGED as problem:
            raise PlainArraysError(f"{path}: no .npz of plain arrays, or damaged") from problem


def _members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    return {info.filename.removesuffix(".npy"): info for info in archive.infolist()}


def _inflated(path: Path, size: int, what: str, error: ErrorClass, limit_bytes: int) -> ElitExportError:
    return error(
        f"{path}: its arrays say that they have {size:,} bytes, {what} may have {limit_bytes:,}",
        f"check that it is the file of {what} you mean",
    )


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Any:
    """One member, whose header has to agree with the archive on its size; raises one of DAMAGED."""
    from numpy.lib import format as npy

    with _opened(archive, info) as member:
        shape, dtype, start = _header(member)
        if dtype.hasobject or math.prod(shape) * dtype.itemsize != info.file_size - start:
            raise ValueError(f"an array of {dtype} {shape} in {info.file_size} bytes")
    with _opened(archive, info) as member:
        return npy.read_array(member, allow_pickle=False)


def _opened(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> IO[bytes]:
    if info.compress_type not in METHODS:
        raise ValueError("compressed by a method that NumPy does not write")
    return archive.open(info)


def _header(member: IO[bytes]) -> tuple[tuple[int, ...], Any, int]:
    """Shape and type of the array that follows, and where it begins. No more is read than a header may have."""
    from numpy.lib import format as npy

    start = io.BytesIO(member.read(HEADER_BYTES))
    header = npy.read_array_header_1_0 if npy.read_magic(start) == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = header(start)
    return shape, dtype, start.tell()


def check_saved_by_torch(path: Path, *, error: ErrorClass) -> None:
    """Refuse a zip archive that inflates when it is read: torch.save compresses nothing; raises `error`, or OSError.

    What is no zip archive is left to torch, which says so.
    """
    with open_regular(path, what="the weights", error=error) as opened:
        try:
            with zipfile.ZipFile(opened) as archive:
                compressed = [info for info in archive.infolist() if info.file_size > info.compress_size]
        except DAMAGED:
            return
    if compressed:
        raise error(
            f"{path}: {compressed[0].filename} has {compressed[0].file_size:,} bytes in {compressed[0].compress_size:,}"
            f": torch.save compresses nothing",
            "save it again with torch.save",
        )

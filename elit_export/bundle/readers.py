"""Reading files that other programs wrote, without trusting them."""

from __future__ import annotations

import json
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from elit_export.errors import CheckpointError, summary

try:
    from lzma import LZMAError
except ImportError:  # a Python without it, which reads no such files either
    LZMAError = zlib.error  # type: ignore[assignment, misc]


def read_json_object(path: Path) -> dict[str, Any]:
    """The names and values of a JSON file that another program wrote; raises CheckpointError."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {summary(error)}", "copy the folder again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: no table of names and values", "copy the folder again")
    return values


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

"""Where checkpoints lie, and what safetensors files say of themselves: read without torch, which takes seconds."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import safetensors

from elit_export.arrays import Arrays
from elit_export.bundle.readers import check_regular
from elit_export.errors import CheckpointError, summary

SHIPPED_PREFIX = "shipped:"
SUFFIXES = (".pt", ".pth", ".safetensors")  # of checkpoints


def checkpoint_path(path: str | Path) -> Path:
    """Return the file of a path or of `shipped:NAME`; raises CheckpointError if it does not exist or is a folder."""
    name = str(path)
    if name.startswith(SHIPPED_PREFIX):
        file = Path(str(files("elit_export"))) / "assets" / f"{name.removeprefix(SHIPPED_PREFIX)}.safetensors"
    else:
        file = Path(path)
    try:
        check_regular(file, what="the checkpoint", error=CheckpointError)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise CheckpointError(f"no checkpoint at {name}") from error
    return file


@contextmanager
def reading_safetensors(path: Path) -> Iterator[None]:
    """Check that it is a file, and name it in what safetensors raises of it."""
    try:
        check_regular(path, what="the weights", error=CheckpointError)
        yield
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file: {summary(error)}") from error


def stored_metadata(path: Path, expected_format: str) -> dict[str, str]:
    """What the header says beside the tensors; raises CheckpointError if the file is damaged or has another format."""
    with reading_safetensors(path), safetensors.safe_open(path, framework="np") as file:
        metadata: dict[str, str] = file.metadata() or {}
    if metadata.get("format") != expected_format:
        raise CheckpointError(
            f"{path}: its format is {metadata.get('format')!r}, this version reads {expected_format!r}"
        )
    return metadata


def stored_arrays(path: Path, names: Collection[str]) -> Arrays:
    """Tensors as arrays, of types that NumPy has; raises CheckpointError, or KeyError for one that is not there."""
    with reading_safetensors(path), safetensors.safe_open(path, framework="np") as file:
        stored: dict[str, Any] = {name: file.get_tensor(name) for name in names if name in file.keys()}  # noqa: SIM118
    return {name: stored[name] for name in names}

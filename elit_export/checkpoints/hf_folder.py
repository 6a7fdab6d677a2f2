"""Folders in the layout of Hugging Face: a part alone or inside a pipeline, and an index of weight files.

Only `is_of_memory` needs torch.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elit_export.bundle.readers import check_folder, read_json_object
from elit_export.errors import CheckpointError
from elit_export.spec.limits import BLOCKS, Bound

CONFIG = "config.json"


def part_folder(folder: Path, part: str, what: str, remedy: str) -> Path:
    """Return `folder` or its `part`, whichever has a configuration; raises CheckpointError with the remedy."""
    if not folder.is_dir():
        raise CheckpointError(f"no {what} at {folder}", remedy)
    for path in (folder, folder / part):
        if (path / CONFIG).exists():
            check_folder(path, what="the folder's content", error=CheckpointError)
            return path
    raise CheckpointError(f"no {what} at {folder}: no {CONFIG} in it or in its `{part}`", remedy)


def shards_of(index: Path) -> list[Path]:
    """List the safetensors files that an index beside them names, in order; raises CheckpointError."""
    names = read_json_object(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{index}: has no weight_map from tensors to files", "copy the folder again")
    files = sorted(set(names.values()))
    for name in files:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index}: names {name!r}, which is not a safetensors file of its own folder")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index.parent}: lacks {name}, which its index names", "copy the folder again")
    return [index.parent / name for name in files]


def check_numbers(
    file: Path, config: Mapping[str, Any], limits: Mapping[str, Bound], usual: Bound | None = None
) -> None:
    """Raise CheckpointError for whole numbers of a configuration, at any depth, that no model of its kind has.

    Libraries make layers and tables of them before they look at weights. `limits` are by name, `usual` is that of the
    other names, None for any. Lists of a name with a limit may have as many entries as a model has blocks.
    """
    for name, value in config.items():
        limit = limits.get(name, usual)
        parts = value if isinstance(value, list) else [value]
        for part in parts:
            if isinstance(part, dict):
                check_numbers(file, part, limits, usual)
            elif limit and isinstance(part, int) and (problem := limit.problem(part, name)):
                raise CheckpointError(f"{file}: {problem}", "copy the folder again")
        if limit and (problem := BLOCKS.problem(len(parts), f"the length of {name}")) and _are_whole(parts):
            raise CheckpointError(f"{file}: {problem}", "copy the folder again")


def _are_whole(values: list[Any]) -> bool:
    return all(isinstance(value, int) for value in values)


def is_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out: in Python, in the system, or in torch, whose CPU allocator raises RuntimeError."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM or f"(os error {errno.ENOMEM})" in str(
            error
        )  # the form in which safetensors reports it
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)

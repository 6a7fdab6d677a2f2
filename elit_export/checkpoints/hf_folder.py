"""Folders in the layout of Hugging Face's libraries: a part by itself or of a pipeline, an index beside its files.

Needs no torch.
"""

from __future__ import annotations

from pathlib import Path

from elit_export.bundle.readers import read_json_object
from elit_export.errors import CheckpointError

CONFIG = "config.json"


def part_folder(folder: Path, part: str, what: str, remedy: str) -> Path:
    """`folder` itself or its `part`, whichever has a configuration; raises CheckpointError with the remedy."""
    if not folder.is_dir():
        raise CheckpointError(f"no {what} at {folder}", remedy)
    for path in (folder, folder / part):
        if (path / CONFIG).is_file():
            return path
    raise CheckpointError(f"no {what} at {folder}: no {CONFIG} in it or in its `{part}`", remedy)


def shards_of(index: Path) -> list[Path]:
    """The safetensors files that an index beside them names, in order; raises CheckpointError."""
    names = read_json_object(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{index}: has no weight_map from tensors to files", "copy the folder again")
    found = sorted(set(names.values()))
    for name in found:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index}: names {name!r}, no safetensors file of its own folder")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index.parent}: lacks {name}, which its index names", "copy the folder again")
    return [index.parent / name for name in found]

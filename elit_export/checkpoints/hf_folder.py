"""Folders in the layout of Hugging Face's libraries: a JSON index beside safetensors files. Needs no torch."""

from __future__ import annotations

from pathlib import Path

from elit_export.bundle.readers import read_json_object
from elit_export.errors import CheckpointError


def shards_of(index: Path) -> list[Path]:
    """The safetensors files that an index beside them names, in order; raises CheckpointError."""
    names = read_json_object(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{index}: has no weight_map from tensors to files; copy the folder again")
    found = sorted(set(names.values()))
    for name in found:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index}: names {name!r}, no safetensors file of its own folder")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index.parent}: lacks {name}, which its index names; copy the folder again")
    return [index.parent / name for name in found]

"""Checkpoints ↔ models: files in our own format, and the one entry point that reads a model from any format.

No file is ever unpickled freely.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path

import torch

from elit_export.bundle.atomic import sha256_of
from elit_export.checkpoints.diffusers import diffusers_files, interface_file, load_diffusers, transformer_folder
from elit_export.checkpoints.released import load_released
from elit_export.checkpoints.stored import checkpoint_path
from elit_export.checkpoints.weights import (
    check_overrides,
    check_tensors,
    meta_model,
    read_safetensors,
    spec_from_metadata,
    spec_to_metadata,
    write_safetensors,
)
from elit_export.errors import CheckpointError
from elit_export.models.elit import Elit

log = logging.getLogger(__name__)

FORMAT = "elit_export/1"


# ---------------------------------------------------------------- reading


def load_checkpoint(
    path: str | Path,
    *,
    interface: str | Path | None = None,
    num_heads: int | None = None,
    head_depth: int | None = None,
    tail_depth: int | None = None,
) -> Elit:
    """Read a model in float32 from a released `.pt` file, our own `.safetensors` file, `shipped:NAME` or a folder.

    A folder is a transformer of diffusers, or a pipeline with one. It holds neither Read nor Write: `interface`
    is the file with those, as `checkpoints.diffusers.save_interface` writes it; None for files.
    `num_heads`, `head_depth` and `tail_depth` do not follow from shapes; None reads them from the file. Weights in
    float32 stay mapped onto it (copy on write): do not write into it while the model lives. Raises CheckpointError.
    """
    return stored_checkpoint(
        path, interface=interface, num_heads=num_heads, head_depth=head_depth, tail_depth=tail_depth
    ).float()


def stored_checkpoint(
    path: str | Path,
    *,
    interface: str | Path | None = None,
    num_heads: int | None = None,
    head_depth: int | None = None,
    tail_depth: int | None = None,
) -> Elit:
    """Read a model as load_checkpoint does, with every weight in its stored type, mapped onto its file.

    Such a model takes no memory until weights are read. It is meant for export and inspection, not for running.
    """
    overrides = {"num_heads": num_heads, "head_depth": head_depth, "tail_depth": tail_depth}
    if Path(path).is_dir():
        return load_diffusers(transformer_folder(Path(path)), interface_file(interface, path), overrides)
    file = checkpoint_path(path)
    if interface is not None:
        raise CheckpointError(f"{path}: a file holds its Read and Write", f"leave `interface` {interface} out")
    return _load_own(file, overrides) if file.suffix == ".safetensors" else load_released(file, overrides)


def checkpoint_files(path: str | Path, interface: str | Path | None = None) -> tuple[Path, ...]:
    """List the files that a model is read from, `interface` last; raises CheckpointError if one is missing."""
    if Path(path).is_dir():
        return (*diffusers_files(transformer_folder(Path(path))), interface_file(interface, path))
    return (checkpoint_path(path),)


def checkpoint_sha256(path: str | Path, interface: str | Path | None = None) -> str:
    """Hash a file, or the names and hashes of a folder's files together with the hash of `interface`."""
    *folder, last = checkpoint_files(path, interface)
    if not folder:
        return sha256_of(last)
    hashes = [*((file.name, sha256_of(file)) for file in folder), sha256_of(last)]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


# ---------------------------------------------------------------- our own format


def save_checkpoint(path: Path, model: Elit, *, dtype: torch.dtype = torch.float32) -> None:
    """Write weights, spec and data facts as one safetensors file, whole or not at all."""
    weights = {name: tensor.detach().to(dtype).contiguous() for name, tensor in model.state_dict().items()}
    write_safetensors(path, weights, {"format": FORMAT, **spec_to_metadata(model)})


def _load_own(path: Path, overrides: Mapping[str, int | None]) -> Elit:
    weights, metadata = read_safetensors(path, FORMAT)
    spec, data = spec_from_metadata(path, metadata)
    check_overrides(path, overrides, spec)
    model = meta_model(spec, data)
    check_tensors(path, weights, {name: tuple(value.shape) for name, value in model.state_dict().items()})
    model.load_state_dict(weights, assign=True)
    return model.eval()

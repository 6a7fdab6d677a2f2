"""A transformer folder of diffusers and a file with Read and Write → model.

Only this file knows the tensor names of diffusers. The folder is read as published, and nothing is written into it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from elit_export.bundle.readers import check_regular, read_json_object
from elit_export.checkpoints.hf_folder import CONFIG, part_folder, shards_of
from elit_export.checkpoints.weights import (
    Weights,
    check_overrides,
    check_tensors,
    meta_model,
    read_safetensors,
    spec_from_metadata,
    spec_to_metadata,
    write_safetensors,
)
from elit_export.errors import CheckpointError, summary
from elit_export.models.elit import Elit
from elit_export.spec import ModelSpec

INTERFACE_FORMAT = "elit_export interface/1"
INTERFACE = ("read.", "write.")
CLASS_NAME = "QwenImageTransformer2DModel"
BACKBONE = "ELIT-MM-DiT"
PIPELINE_PART = "transformer"
INDEX = "diffusion_pytorch_model.safetensors.index.json"


# ---------------------------------------------------------------- Read and Write


def save_interface(path: Path, model: Elit, *, dtype: torch.dtype = torch.float32) -> None:
    """Write Read and Write, the spec of the whole model and its data facts as one file, whole or not at all."""
    weights = {
        name: tensor.detach().to(dtype).contiguous()
        for name, tensor in model.state_dict().items()
        if name.startswith(INTERFACE)
    }
    write_safetensors(path, weights, {"format": INTERFACE_FORMAT, **spec_to_metadata(model)})


# ---------------------------------------------------------------- reading


def load_diffusers(folder: Path, interface: Path, overrides: Mapping[str, int | None]) -> Elit:
    """Read a model from a transformer folder. Weights keep their stored types and are mapped onto the files.

    Raises CheckpointError.
    """
    added, metadata = read_safetensors(interface, INTERFACE_FORMAT)
    spec, data = spec_from_metadata(interface, metadata)
    check_overrides(interface, overrides, spec)
    if spec.backbone != BACKBONE:
        raise CheckpointError(
            f"{interface}: holds Read and Write of {spec.backbone}; a {CLASS_NAME} takes those of {BACKBONE}"
        )
    _check_config(folder, interface, spec)
    model = meta_model(spec, data)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_tensors(interface, added, {name: shape for name, shape in shapes.items() if name.startswith(INTERFACE)})
    published_names = {name: diffusers_name(name, spec) for name in shapes if not name.startswith(INTERFACE)}
    base = mapped_tensors(folder)
    check_tensors(folder, base, {published: shapes[name] for name, published in published_names.items()})
    weights = {name: own_tensor(published, base.pop(published)) for name, published in published_names.items()}
    model.load_state_dict(weights | added, assign=True)
    return model.eval()


def interface_file(interface: str | Path | None, folder: str | Path) -> Path:
    """Return the file with Read and Write for a folder; raises CheckpointError if there is none."""
    if interface is None:
        raise CheckpointError(
            f"{folder}: a folder of diffusers holds no Read and Write",
            "give the file that does, as "
            'checkpoints.diffusers.save_interface writes it: `interface = "FILE"` in the recipe, or --interface FILE',
        )
    if not Path(interface).is_file():
        raise CheckpointError(f"no file with Read and Write at {interface}")
    return Path(interface)


def transformer_folder(folder: Path) -> Path:
    """Return the folder itself or, of a pipeline, the folder of its transformer; raises CheckpointError."""
    remedy = f"give the folder of a {CLASS_NAME}, or of a pipeline with one, as save_pretrained of diffusers writes it"
    return part_folder(folder, PIPELINE_PART, "checkpoint", remedy)


def diffusers_files(folder: Path) -> tuple[Path, ...]:
    """List the files that a transformer folder is read from."""
    return (folder / CONFIG, *_files(folder))


def mapped_tensors(folder: Path) -> Weights:
    """Return all tensors of a transformer folder by published name, in their stored types, mapped onto their files."""
    weights: Weights = {}
    for file in _files(folder):
        for name, tensor in _tensors(file):
            if name in weights:
                raise CheckpointError(f"{folder}: {name} is in {file.name} and in another file", "keep one variant")
            weights[name] = tensor
    return weights


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        check_regular(path, what="the weights", error=CheckpointError)
        with safetensors.safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118, because it is not a mapping
                yield name, file.get_tensor(name)
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file: {summary(error)}") from error


def _files(folder: Path) -> list[Path]:
    """List the files that the index names or, without one, all safetensors files."""
    if (folder / INDEX).is_file():
        return shards_of(folder / INDEX)
    files = sorted(file for file in folder.glob("*.safetensors") if file.is_file())
    if not files:
        others = ", ".join(sorted(file.name for file in folder.glob("*.bin"))) or "none"
        raise CheckpointError(
            f"{folder}: has no weights in safetensors files (in other formats: {others})",
            "download those, or write them with save_pretrained(safe_serialization=True)",
        )
    return files


# ---------------------------------------------------------------- config


def _check_config(folder: Path, interface: Path, spec: ModelSpec) -> None:
    config = DEFAULTS | read_json_object(folder / CONFIG)
    if config.get("_class_name") != CLASS_NAME:
        raise CheckpointError(
            f"{folder}: is a {config.get('_class_name')}, not a {CLASS_NAME}, the only class that {BACKBONE} is made of"
        )
    options = [name for name in OPTIONS if config.get(name)]
    if options:
        raise CheckpointError(f"{folder}: its {CONFIG} sets {', '.join(options)}, which {BACKBONE} does not have")
    mismatches = [
        f"{name} is {config[name]!r}, they need {value!r}"
        for name, value in config_of(spec).items()
        if config[name] != value
    ]
    if mismatches:
        raise CheckpointError(
            f"{folder}: does not fit the Read and Write in {interface}, of width {spec.hidden_size}: "
            f"{'; '.join(mismatches)}",
            "give the file that was trained with these weights",
        )


# Options that are not supported, among them weights packed into fewer bits.
OPTIONS = ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope", "quantization_config")
# The defaults of diffusers for values that a config leaves out.
DEFAULTS = {
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 60,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 3584,
    "axes_dims_rope": [16, 56, 56],
}


def config_of(spec: ModelSpec) -> dict[str, Any]:
    """Return the values that the folder's config must have."""
    head = spec.hidden_size // spec.num_heads
    return {
        "num_attention_heads": spec.num_heads,
        "attention_head_dim": head,
        "num_layers": spec.depth,
        "joint_attention_dim": spec.text_width,
        "patch_size": spec.patch_size,
        "in_channels": spec.patch_size**2 * spec.in_channels,
        "out_channels": spec.in_channels,
        "axes_dims_rope": [head // 8, head * 7 // 16, head * 7 // 16],
    }


# ---------------------------------------------------------------- published names

# Own prefix → published prefix.
AROUND_BLOCKS = {
    "img_in.": "img_in.",
    "txt_norm.": "txt_norm.",
    "txt_in.": "txt_in.",
    "t_embedder.mlp.0.": "time_text_embed.timestep_embedder.linear_1.",
    "t_embedder.mlp.2.": "time_text_embed.timestep_embedder.linear_2.",
    "final.modulation.linear.": "norm_out.linear.",
    "final.linear.": "proj_out.",
}
IN_BLOCKS = {
    "image.modulation.linear.": "img_mod.1.",
    "image.attn.q.": "attn.to_q.",
    "image.attn.k.": "attn.to_k.",
    "image.attn.v.": "attn.to_v.",
    "image.attn.q_norm.": "attn.norm_q.",
    "image.attn.k_norm.": "attn.norm_k.",
    "image.attn.proj.": "attn.to_out.0.",
    "image.mlp.fc1.": "img_mlp.net.0.proj.",
    "image.mlp.fc2.": "img_mlp.net.2.",
    "text.modulation.linear.": "txt_mod.1.",
    "text.attn.q.": "attn.add_q_proj.",
    "text.attn.k.": "attn.add_k_proj.",
    "text.attn.v.": "attn.add_v_proj.",
    "text.attn.q_norm.": "attn.norm_added_q.",
    "text.attn.k_norm.": "attn.norm_added_k.",
    "text.attn.proj.": "attn.to_add_out.",
    "text.mlp.fc1.": "txt_mlp.net.0.proj.",
    "text.mlp.fc2.": "txt_mlp.net.2.",
}
SCALE_FIRST = "norm_out.linear."


def diffusers_name(name: str, spec: ModelSpec) -> str:
    """Return the name that a tensor of ours, other than Read and Write, has in the folder."""
    first_block = {"head": 0, "core": spec.head_depth, "tail": spec.head_depth + spec.core_depth}
    block, names = "", AROUND_BLOCKS
    if match := re.match(r"(head|core|tail)\.(\d+)\.", name):
        block, names = f"transformer_blocks.{first_block[match[1]] + int(match[2])}.", IN_BLOCKS
        name = name[match.end() :]
    own_prefix = next(prefix for prefix in names if name.startswith(prefix))
    return f"{block}{names[own_prefix]}{name.removeprefix(own_prefix)}"


def own_tensor(published: str, tensor: Tensor) -> Tensor:
    """Return the tensor as stored, but swap scale and shift of the final norm, which stand in the other order here."""
    return torch.cat(tensor.chunk(2)[::-1]) if published.startswith(SCALE_FIRST) else tensor

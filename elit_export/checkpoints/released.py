"""Released `.pt` files → model. Only this file knows their key names.

They are read with `weights_only=True` and a few allowed classes, none of which does anything when it is made.
"""

from __future__ import annotations

import argparse
import logging
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isqrt
from pathlib import Path, PosixPath
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import Tensor

from elit_export.bundle.readers import check_saved_by_torch
from elit_export.checkpoints.weights import Shape, Weights, check_dense, check_tensors, meta_model
from elit_export.errors import CheckpointError, InputError, summary
from elit_export.models.elit import Elit
from elit_export.models.registry import FAMILIES, RELEASED_HEAD_DEPTH, RELEASED_NAMES, named_spec
from elit_export.spec import PIXELS, RELEASED_BACKBONE, SD_VAE, DataFacts, ModelSpec

log = logging.getLogger(__name__)

# A released file does not say what its numbers mean; the number of channels mostly tells.
DATA_BY_CHANNELS = {1: PIXELS, 3: PIXELS, 4: SD_VAE}
UNKNOWN_VAE = DataFacts(kind="vae", vae="unknown")
NUMPY_SCALAR: Any = np.float64(0).__reduce__()[0]  # a number from its type and its bytes
WRAPPERS = ("module.", "_orig_mod.")  # what data-parallel and compiled models put before the names of their tensors
NUMBER_KINDS, NUMBER_BYTES = "biufcSU", 4096  # of NumPy, with short text; a file may ask for one value many times


def _numpy_number(dtype: Any = None, content: object = None) -> Any:
    """Make a number of NumPy from its bytes, all of which the file has to hold; raises UnpicklingError.

    Without them NumPy makes zeros of any type, in as many bytes as the type says.
    """
    is_number = isinstance(dtype, np.dtype) and dtype.kind in NUMBER_KINDS
    if is_number and isinstance(content, bytes) and len(content) == dtype.itemsize <= NUMBER_BYTES:
        return NUMPY_SCALAR(dtype, content)
    raise UnpicklingError("a value of NumPy that is not a number or a short text")


# In `args`: what argparse makes of a command line, paths, and numbers of NumPy, also as its older versions name them.
SAFE: list[Any] = [
    *(argparse.Namespace, np.dtype),
    *((PosixPath, f"{module}.PosixPath") for module in ("pathlib", "pathlib._local")),  # the latter in Python 3.13
    *((_numpy_number, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *sorted({type(np.dtype(code)) for code in "?bBhHiIlLqQefdgFDSU"}, key=str),
]
REMEDY = (
    "save it again where it was made, torch.save({'ema': …}, FILE), and give what args would tell: --num-heads N, "
    "--head-depth N, --tail-depth N"
)
NOT_ELIT_SIT = "its shapes and args do not describe an ELIT-SiT model"

READ = "input_token_editor.adapters.0."
WRITE = "output_token_editor.adapters.0."
LATENT_POSITIONS = f"{READ}latent_pos_embed"
LEARNED_QUERIES = f"{READ}learned_query_embed"
QK_NORM = "blocks.0.attn.q_norm.weight"
# Tensors whose shapes determine the spec, and how many axes each has.
TELLING_AXES = {
    "pos_embed": 3,
    "x_embedder.proj.weight": 4,
    "y_embedder.embedding_table.weight": 2,
    "blocks.0.mlp.fc1.weight": 2,
    LEARNED_QUERIES: 2,
}
# Own prefix → released prefix; the first that fits counts.
RELEASED_PREFIXES = {
    "patch_embed.": "x_embedder.",
    "y_embedder.": "y_embedder.embedding_table.",
    "read.query": LEARNED_QUERIES,
    "read.pos_embed": f"{READ}pos_embed",
    "read.latent_pos_embed": LATENT_POSITIONS,
    "read.attn.": f"{READ}fit_layer.latents_attend_to_patches.0.",
    "read.mlp.": f"{READ}fit_layer.read_ff.0.",
    "read.modulation.": f"{READ}fit_layer.modulation.",
    "write.pos_embed": f"{WRITE}pos_embed",
    "write.attn.": f"{WRITE}patches_attend_to_latents.0.",
    "write.mlp.": f"{WRITE}write_ff.0.",
    "final.": "final_layer.",
}


def load_released(path: Path, overrides: Mapping[str, int | None]) -> Elit:
    """Read a model from a released `.pt` file; `overrides` are numbers not in its shapes. Raises CheckpointError."""
    content = _read_pt(path)
    weights = content.get("ema")
    if not isinstance(weights, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in weights.items()
    ):
        raise CheckpointError(f"{path}: no `ema` weights in it; a released checkpoint has model, ema, opt, args")
    check_dense(path, weights)
    weights = _unwrapped(path, weights)
    _drop_projectors(weights)
    spec = _released_spec(path, weights, _args_of(content), overrides)
    _add_missing_latent_positions(weights, spec)
    model = meta_model(spec, DATA_BY_CHANNELS.get(spec.in_channels, UNKNOWN_VAE))
    renamed = _renamed(path, weights, model)
    model.load_state_dict(renamed, assign=True)
    return model.eval()


def _read_pt(path: Path) -> Mapping[str, Any]:
    check_saved_by_torch(path, error=CheckpointError)
    try:
        with torch.serialization.safe_globals(SAFE):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused, because {_forbidden(error)}; only tensors, plain values and argparse.Namespace, with "
            f"paths and NumPy numbers, are read",
            REMEDY,
        ) from error
    except Exception as error:  # a damaged file can make the reader fail in any way
        raise CheckpointError(
            f"{path}: not a whole torch.save zip file (truncated, damaged, or saved in the old format): "
            f"{summary(error)}",
            "download or save it again",
        ) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a table of model, ema, opt and args")
    return content


def _forbidden(error: UnpicklingError) -> str:
    """Say what the file would run; torch's own message advises to read it unsafely."""
    if match := re.search(r"GLOBAL (\S+)", str(error)):
        return f"reading it would build or run {match[1]}"
    return "it holds something else"


def _args_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return args by name, from argparse or a table; numbers of NumPy become those of Python."""
    args = content.get("args")
    values = vars(args) if isinstance(args, argparse.Namespace) else args
    if not isinstance(values, Mapping):
        return {}
    return {str(name): value.item() if isinstance(value, np.generic) else value for name, value in values.items()}


def _unwrapped(path: Path, weights: Mapping[str, Tensor]) -> Weights:
    """Remove what wrappers of a model put before every name; raises CheckpointError if names become one."""
    names = {name: _without_wrappers(name) for name in weights}
    if prefixes := sorted({prefix for name in names for prefix in WRAPPERS if name.startswith(prefix)}):
        log.warning("left out %s before the names of tensors (a wrapped model was saved)", " and ".join(prefixes))
    if len(set(names.values())) < len(names):
        raise CheckpointError(
            f"{path}: holds tensors twice, with and without {' or '.join(WRAPPERS)}", "save one of the two models"
        )
    return {names[name]: tensor for name, tensor in weights.items()}


def _without_wrappers(name: str) -> str:
    while prefix := next((prefix for prefix in WRAPPERS if name.startswith(prefix)), ""):
        name = name.removeprefix(prefix)
    return name


def _drop_projectors(weights: Weights) -> None:
    projectors = [name for name in weights if name.startswith("projectors.")]
    if projectors:
        log.warning("ignored %d tensors named projectors.* (used in training only)", len(projectors))
    for name in projectors:
        del weights[name]


def _add_missing_latent_positions(weights: Weights, spec: ModelSpec) -> None:
    if LATENT_POSITIONS not in weights:
        log.warning("no %s in the checkpoint (older than 2026-03-24): taken as zeros", LATENT_POSITIONS)
        weights[LATENT_POSITIONS] = torch.zeros(spec.tokens, spec.hidden_size)


# ---------------------------------------------------------------- the spec of a released file


@dataclass(frozen=True)
class _Hidden:
    """The numbers of a spec that do not follow from shapes."""

    num_heads: int
    head_depth: int
    tail_depth: int


def _released_spec(
    path: Path, weights: Mapping[str, Tensor], args: Mapping[str, Any], overrides: Mapping[str, int | None]
) -> ModelSpec:
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    _check_telling_shapes(path, shapes)
    hidden = _hidden_numbers(path, shapes, args, overrides)
    try:
        from_shapes = _spec_from_shapes(shapes, hidden)
        if args.get("model") not in RELEASED_NAMES:
            return from_shapes
        named = named_spec(
            args["model"], resolution=args.get("resolution", from_shapes.input_size * 8), head_depth=hidden.head_depth
        )
        return replace(
            named,
            qk_norm=args.get("qk_norm", from_shapes.qk_norm),
            num_classes=args.get("num_classes", from_shapes.num_classes),
            group_size=args.get("elit_group_size", from_shapes.group_size),
        )
    except InputError as error:
        raise CheckpointError(f"{path}: {NOT_ELIT_SIT}: {error.problem}", error.remedy) from error
    except TypeError as error:
        raise CheckpointError(f"{path}: {NOT_ELIT_SIT}: {error}") from error


def _check_telling_shapes(path: Path, shapes: Mapping[str, Shape]) -> None:
    """Raise CheckpointError unless the tensors that determine the spec exist, have the right axes and are not empty."""
    for name, axes in TELLING_AXES.items():
        if name not in shapes:
            raise CheckpointError(f"{path}: missing {name}")
        if len(shapes[name]) != axes or 0 in shapes[name]:
            raise CheckpointError(f"{path}: {name} has shape {shapes[name]}, it should have {axes} axes, none empty")
    norm = shapes.get(QK_NORM, (1,))
    if len(norm) != 1 or 0 in norm:
        raise CheckpointError(f"{path}: {QK_NORM} has shape {norm}, it should have one axis")


def _hidden_numbers(
    path: Path, shapes: Mapping[str, Shape], args: Mapping[str, Any], overrides: Mapping[str, int | None]
) -> _Hidden:
    in_file = _numbers_of_file(shapes, args)
    for name, value in overrides.items():
        if value is not None and in_file.get(name, value) != value:
            raise CheckpointError(
                f"{path}: {name}={value} was asked for, but the file says {in_file[name]}", "leave it out"
            )
    numbers = in_file | {name: value for name, value in overrides.items() if value is not None}
    missing = [name for name in overrides if name not in numbers]
    if missing:
        needed = {name: numbers.get(name, "N") for name in overrides if name not in in_file}
        options = " ".join(f"--{name.replace('_', '-')} {number}" for name, number in needed.items())
        lines = ", ".join(f"{name} = {number}" for name, number in needed.items())
        raise CheckpointError(
            f"{path}: its args name no known size (model={args.get('model')!r}) and shapes cannot tell "
            f"{', '.join(missing)}",
            f"say it in the recipe's table [architecture], {lines}, to load_checkpoint, or to export and inspect; this "
            f"writes a recipe: elit-export init {shlex.quote(str(path))} {options}",
        )
    return _Hidden(**numbers)


def _numbers_of_file(shapes: Mapping[str, Shape], args: Mapping[str, Any]) -> dict[str, int]:
    numbers: dict[str, int] = {}
    if isinstance(args.get("encoder_depth"), int):
        numbers["head_depth"] = args["encoder_depth"]
    if args.get("model") in RELEASED_NAMES:
        size = args["model"].removeprefix(f"{RELEASED_BACKBONE}-").split("/")[0]
        _, _, numbers["num_heads"], numbers["tail_depth"] = FAMILIES[RELEASED_BACKBONE].sizes[size]
        numbers.setdefault("head_depth", RELEASED_HEAD_DEPTH)
    elif QK_NORM in shapes:
        numbers["num_heads"] = shapes["pos_embed"][2] // shapes[QK_NORM][0]
    return numbers


def _spec_from_shapes(shapes: Mapping[str, Shape], hidden: _Hidden) -> ModelSpec:
    _, tokens, width = shapes["pos_embed"]
    _, channels, patch, _ = shapes["x_embedder.proj.weight"]
    depth = len({match[1] for name in shapes if (match := re.match(r"blocks\.(\d+)\.", name))})
    return ModelSpec(
        in_channels=channels,
        input_size=isqrt(tokens) * patch,
        patch_size=patch,
        hidden_size=width,
        num_heads=hidden.num_heads,
        head_depth=hidden.head_depth,
        core_depth=depth - hidden.head_depth - hidden.tail_depth,
        tail_depth=hidden.tail_depth,
        group_size=isqrt(shapes[LEARNED_QUERIES][0]),
        qk_norm=QK_NORM in shapes,
        mlp_ratio=shapes["blocks.0.mlp.fc1.weight"][0] / width,
        num_classes=shapes["y_embedder.embedding_table.weight"][0] - 1,
    )


# ---------------------------------------------------------------- released names


def released_name(name: str, spec: ModelSpec) -> str:
    """Return the name that a tensor of ours has in a released checkpoint."""
    first_block = {"head": 0, "core": spec.head_depth, "tail": spec.head_depth + spec.core_depth}
    if match := re.match(r"(head|core|tail)\.(\d+)\.", name):
        name = f"blocks.{first_block[match[1]] + int(match[2])}.{name[match.end() :]}"
    for own, released in RELEASED_PREFIXES.items():
        if name.startswith(own):
            name = released + name.removeprefix(own)
            break
    return name.replace("modulation.linear.", "adaLN_modulation.1.")


def _renamed(path: Path, weights: Weights, model: Elit) -> Weights:
    """Return released weights under our names; raises CheckpointError for anything missing, extra or mis-shaped."""
    own = model.state_dict()
    own_names = {released_name(name, model.spec): name for name in own}
    table = weights[LATENT_POSITIONS]
    if table.dim() == 2 and table.shape[0] >= model.spec.tokens:
        weights[LATENT_POSITIONS] = table[: model.spec.tokens]  # the released table has 4096 rows
    expected = {released: tuple(own[name].shape) for released, name in own_names.items()}
    check_tensors(path, weights, expected)
    return {name: weights[released] for released, name in own_names.items()}

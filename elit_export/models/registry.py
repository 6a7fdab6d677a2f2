"""The table of backbones, one row each with the module that builds it, and the table of named sizes.

A backbone is a row here and a file beside this one. That file has one class, a `models.elit.Elit`. How the blocks are
arranged, what they cost and which specs are valid stands here, because it is needed without torch. The conditioning and
the budgets of a model follow from its spec, because the runtime reads them and does not import this file. The names of
tensors in published checkpoints are in `checkpoints/`. Only the code of ELIT-SiT is published: the files of the other
backbones say in their docstrings what is our own reading of the paper (arXiv 2603.12245).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from itertools import product
from typing import TYPE_CHECKING, Any

from elit_export.errors import InputError
from elit_export.spec import PIXELS, RELEASED_BACKBONE, DataFacts, ModelSpec

if TYPE_CHECKING:
    from elit_export.models.elit import Elit

RELEASED_HEAD_DEPTH = 8  # `args.encoder_depth` of the released checkpoints, whatever the size
VAE_DOWNSAMPLING = 8
PATCHES = (2, 4, 8)
HEAD_PARTS = 32  # RoPE splits a head into 1/8, 7/16 and 7/16, each an even number of channels


# ---------------------------------------------------------------- the arrangement of blocks


@dataclass(frozen=True)
class Stage:
    """Consecutive blocks on the same tokens, in the `part` head, core or tail.

    Each token stands for `merged` of the tokens around the stage, and is `width_factor` times as wide. `joins` linear
    layers fuse a long skip with the tokens. Each of the `streams` has weights of its own, and all attend jointly; the
    second stream is text.
    """

    part: str
    depth: int
    merged: int = 1
    width_factor: int = 1
    joins: int = 0
    streams: int = 1


def plain_stages(spec: ModelSpec) -> tuple[Stage, ...]:
    return Stage("head", spec.head_depth), Stage("core", spec.core_depth), Stage("tail", spec.tail_depth)


def skipping_stages(spec: ModelSpec) -> tuple[Stage, ...]:
    """Return stages in which a long skip leads from block i to block depth − 1 − i, unless the two are neighbours."""
    core = Stage("core", spec.core_depth, joins=max(0, (spec.core_depth - 1) // 2))
    return Stage("head", spec.head_depth), core, Stage("tail", spec.tail_depth, joins=spec.tail_depth)


def merging_stages(spec: ModelSpec) -> tuple[Stage, ...]:
    """Return stages whose coarse blocks lie in the middle of the core."""
    fine = Stage("core", (spec.core_depth - spec.coarse_depth) // 2)
    coarse = Stage("core", spec.coarse_depth, merged=spec.merge, width_factor=2)
    return Stage("head", spec.head_depth), fine, coarse, fine, Stage("tail", spec.tail_depth)


def joint_stages(spec: ModelSpec) -> tuple[Stage, ...]:
    return tuple(replace(stage, streams=2) for stage in plain_stages(spec))


# ---------------------------------------------------------------- the table


def _check_plain(spec: ModelSpec) -> None:
    _no_merging(spec)
    _no_text(spec)


def _no_merging(spec: ModelSpec) -> None:
    if spec.coarse_depth:
        raise InputError(f"{spec.backbone}: coarse_depth is {spec.coarse_depth}, but its blocks all see single latents")


def _no_text(spec: ModelSpec) -> None:
    if spec.text_width:
        raise InputError(f"{spec.backbone}: text_width is {spec.text_width}, but it takes classes", "set it to 0")


def _check_skips(spec: ModelSpec) -> None:
    _check_plain(spec)
    if spec.head_depth != spec.tail_depth:
        raise InputError(
            f"{spec.backbone}: head_depth {spec.head_depth} and tail_depth {spec.tail_depth} must be equal, "
            f"as long skips lead from each block of the head to one of the tail"
        )


def _check_merging(spec: ModelSpec) -> None:
    _no_text(spec)
    if not spec.coarse_depth or spec.head_depth < 1:
        raise InputError(
            f"{spec.backbone}: needs a head and blocks on merged latents, not head_depth {spec.head_depth}, "
            f"coarse_depth {spec.coarse_depth}"
        )
    if spec.rope:
        raise InputError(f"{spec.backbone}: rope is not offered, because merged latents have no position of their own")


def _check_joint(spec: ModelSpec) -> None:
    _no_merging(spec)
    if not spec.text_width:
        raise InputError(
            f"{spec.backbone}: text_width is 0, but it takes text, and no classes",
            "set it to the width of the text embeddings",
        )
    if not (spec.rope and spec.qk_norm and spec.qk_norm_kind == "rms"):
        raise InputError(
            f"{spec.backbone}: has rotary positions and RMS norms on queries and keys, so needs rope, qk_norm and "
            f"qk_norm_kind 'rms', not {spec.rope}, {spec.qk_norm} and {spec.qk_norm_kind!r}"
        )
    if not spec.depth:
        raise InputError(f"{spec.backbone}: has no blocks; text and image meet in them alone")
    if (spec.hidden_size // spec.num_heads) % HEAD_PARTS:
        raise InputError(
            f"{spec.backbone}: heads of {spec.hidden_size // spec.num_heads} channels (hidden_size {spec.hidden_size}, "
            f"num_heads {spec.num_heads}) cannot be split for RoPE by frame, row and column",
            f"use a multiple of {HEAD_PARTS}",
        )


def _three_fifths(core_depth: int) -> int:
    """Return the number of coarse blocks in a core: 12 of 20, with as many fine blocks before as after them."""
    return core_depth - 2 * (core_depth // 5)


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A row of the table. `check` raises InputError for an invalid spec; `fields` extend the spec of a named size."""

    name: str
    module: str
    class_name: str
    stages: Callable[[ModelSpec], tuple[Stage, ...]]
    check: Callable[[ModelSpec], None]
    fields: Callable[[int], dict[str, Any]] = field(default=lambda _core_depth: {})
    takes_text: bool = False


BACKBONES = {
    backbone.name: backbone
    for backbone in (
        Backbone(
            name=RELEASED_BACKBONE,
            module="elit_export.models.sit",
            class_name="ElitSiT",
            stages=plain_stages,
            check=_check_plain,
        ),
        Backbone(
            name="ELIT-U-ViT",
            module="elit_export.models.uvit",
            class_name="ElitUViT",
            stages=skipping_stages,
            check=_check_skips,
        ),
        Backbone(
            name="ELIT-HDiT",
            module="elit_export.models.hdit",
            class_name="ElitHDiT",
            stages=merging_stages,
            check=_check_merging,
            fields=lambda core_depth: {"merge": 4, "coarse_depth": _three_fifths(core_depth)},
        ),
        Backbone(
            name="ELIT-MM-DiT",
            module="elit_export.models.mmdit",
            class_name="ElitMMDiT",
            stages=joint_stages,
            check=_check_joint,
            takes_text=True,
        ),
    )
}


CLASS_BACKBONES = tuple(backbone.name for backbone in BACKBONES.values() if not backbone.takes_text)


def backbone_of(spec: ModelSpec) -> Backbone:
    """Return the row of a spec; raises InputError if there is none, or if the spec is not valid for it."""
    backbone = backbone_named(spec.backbone)
    backbone.check(spec)
    return backbone


def backbone_named(name: str) -> Backbone:
    if name not in BACKBONES:
        raise InputError(f"unknown backbone {name!r}; known: {', '.join(BACKBONES)}")
    return BACKBONES[name]


def new_model(spec: ModelSpec, data: DataFacts = PIXELS) -> Elit:
    """Return a model with uninitialised weights; raises InputError for a spec that is not valid for its backbone."""
    backbone = backbone_of(spec)
    model: Elit = getattr(import_module(backbone.module), backbone.class_name)(spec, data)
    return model


# ---------------------------------------------------------------- named sizes


@dataclass(frozen=True, kw_only=True)
class Family:
    """Named models of one backbone. `sizes` are (width, depth, heads, tail depth). `head_depth` None means the tail's.

    A family of one size and patch has one model, of its own name.
    """

    backbone: str
    sizes: Mapping[str, tuple[int, int, int, int]]
    patches: tuple[int, ...] = PATCHES
    head_depth: int | None = None
    fields: dict[str, Any] = field(default_factory=dict)


RELEASED_SIZES = {"S": (384, 12, 6, 2), "B": (768, 12, 12, 2), "L": (1024, 24, 16, 4), "XL": (1152, 28, 16, 4)}
FAMILIES = {
    RELEASED_BACKBONE: Family(backbone=RELEASED_BACKBONE, sizes=RELEASED_SIZES, head_depth=RELEASED_HEAD_DEPTH),
    # What the paper trains: rotary positions, normed queries and keys, latents of 16 channels.
    "ELIT-DiT": Family(
        backbone=RELEASED_BACKBONE,
        sizes=RELEASED_SIZES,
        fields={"rope": True, "qk_norm": True, "qk_norm_kind": "rms", "in_channels": 16},
    ),
    # These take the inputs of ELIT-SiT, so that only the backbone differs; a spec may set more fields (`rope`, …).
    "ELIT-U-ViT": Family(backbone="ELIT-U-ViT", sizes=RELEASED_SIZES),
    "ELIT-HDiT": Family(backbone="ELIT-HDiT", sizes=RELEASED_SIZES),
    "ELIT-Qwen-Image": Family(
        backbone="ELIT-MM-DiT",
        sizes={"20B": (3072, 60, 24, 8)},
        patches=(2,),
        fields={
            **{"in_channels": 16, "num_classes": 0, "text_width": 3584},
            **{"rope": True, "qk_norm": True, "qk_norm_kind": "rms"},
        },
    ),
}


def _names() -> Iterator[tuple[str, tuple[Family, str, int]]]:
    for name, family in FAMILIES.items():
        models = list(product(family.sizes, family.patches))
        for size, patch in models:
            yield f"{name}-{size}/{patch}" if len(models) > 1 else name, (family, size, patch)


NAMES = dict(_names())
RELEASED_NAMES = tuple(name for name in NAMES if name.startswith(f"{RELEASED_BACKBONE}-"))


def named_spec(name: str, *, resolution: int = 256, head_depth: int | None = None) -> ModelSpec:
    """Return the spec of a named model, e.g. `ELIT-SiT-XL/2` or `ELIT-Qwen-Image`, on VAE latents of a square image.

    The group side is resolution/64, so that 256px at patch 2 has 16 groups of 16 latents and 512px 16 groups
    of 64. `head_depth` None is 8 for ELIT-SiT, as released, and as deep as the tail for the others (4-20-4 for XL,
    8-44-8 for ELIT-Qwen-Image).
    """
    if name not in NAMES:
        raise InputError(f"unknown model {name!r}; known: {', '.join(NAMES)}")
    if resolution < 64 or resolution % 64:
        raise InputError(f"resolution {resolution} is not a multiple of 64")
    family, size, patch = NAMES[name]
    width, blocks, heads, tail = family.sizes[size]
    head = next(depth for depth in (head_depth, family.head_depth, tail) if depth is not None)
    core = blocks - head - tail
    values: dict[str, Any] = {
        "in_channels": 4,
        "input_size": resolution // VAE_DOWNSAMPLING,
        "patch_size": patch,
        "hidden_size": width,
        "num_heads": heads,
        "head_depth": head,
        "core_depth": core,
        "tail_depth": tail,
        "group_size": resolution // 64,
        "qk_norm": False,
        "mlp_ratio": 4.0,
        "num_classes": 1000,
        "backbone": family.backbone,
    }
    spec = ModelSpec(**(values | BACKBONES[family.backbone].fields(core) | family.fields))
    backbone_of(spec)
    return spec

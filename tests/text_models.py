"""Small models that take text, their inputs, and the diffusers model that one is without Read and Write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elit_export.models.mmdit import ElitMMDiT, run_joint
from elit_export.spec import LATENTS, ROWS, TEXT, ModelSpec
from tests.helpers import weights_by_name


def text_spec(**changes: Any) -> ModelSpec:
    """8×8 tokens in 4 groups of 16 latents, two heads of 32."""
    facts: dict[str, Any] = {
        "backbone": "ELIT-MM-DiT",
        "in_channels": 4,
        "input_size": 16,
        "patch_size": 2,
        "hidden_size": 64,
        "num_heads": 2,
        "head_depth": 1,
        "core_depth": 2,
        "tail_depth": 1,
        "group_size": 4,
        "qk_norm": True,
        "qk_norm_kind": "rms",
        "rope": True,
        "mlp_ratio": 4.0,
        "num_classes": 0,
        "text_width": 24,
    }
    return ModelSpec(**(facts | changes))


def text_model(**changes: Any) -> ElitMMDiT:
    """A small model with nothing zero in it."""
    model = ElitMMDiT(text_spec(**changes))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    model.load_state_dict(weights_by_name(shapes, seed=5))
    return model.eval()


def shallow_text_model() -> ElitMMDiT:
    """4×4 tokens in 4 groups of 4 latents, a block on tokens and one on latents: exports of others take long.

    Its weights are numbers that bf16 holds, so that it is the same model whatever they are stored in.
    """
    model = text_model(input_size=8, group_size=2, core_depth=1, tail_depth=0)
    model.load_state_dict({name: tensor.bfloat16().float() for name, tensor in model.state_dict().items()})
    return model


def mask_of(lengths: list[int], longest: int) -> Tensor:
    return (torch.arange(longest)[None] < torch.tensor(lengths)[:, None]).long()


def inputs_of(spec: ModelSpec, graph: str, *, rows: int, text: int, kept: int) -> dict[str, Tensor]:
    """Random inputs of a graph; row i has i + 1 text tokens, and the last has as many as there can be."""
    generator = torch.Generator().manual_seed(rows + 10 * text)
    sizes = {ROWS: rows, TEXT: text, LATENTS: kept}
    lengths = [min(row + 1, text) for row in range(rows - 1)] + [text]
    exact = {"text_mask": mask_of(lengths, text), LATENTS: torch.arange(kept), "t": torch.linspace(0.1, 0.9, rows)}
    return {
        tensor.name: exact[tensor.name]
        if tensor.name in exact
        else torch.randn([sizes[size] if isinstance(size, str) else size for size in tensor.dims], generator=generator)
        for tensor in spec.graph(graph).inputs
    }


def without_interface(model: ElitMMDiT, x: Tensor, t: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
    """The velocity of the base model: every block on all spatial tokens, neither Read nor Write."""
    c = model.t_embedder(t)
    spatial, _ = model.positions(text_mask, torch.arange(1))
    blocks = [*model.head, *model.core, *model.tail]
    _, tokens = run_joint(blocks, model.embed_text(text, text_mask), model.embed(x), c, spatial)
    return model.unpatchify(model.final(tokens, c))


# ---------------------------------------------------------------- diffusers


def base_model(spec: ModelSpec) -> Any:
    """diffusers' model with nothing zero in it."""
    from diffusers import QwenImageTransformer2DModel

    head = spec.hidden_size // spec.num_heads
    base = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=4 * spec.in_channels,
        out_channels=spec.in_channels,
        num_layers=spec.depth,
        attention_head_dim=head,
        num_attention_heads=spec.num_heads,
        joint_attention_dim=spec.text_width,
        axes_dims_rope=(head // 8, head * 7 // 16, head * 7 // 16),
    )
    shapes = {name: tuple(tensor.shape) for name, tensor in base.state_dict().items()}
    base.load_state_dict(weights_by_name(shapes, seed=6))
    return base.eval()


def saved_base(spec: ModelSpec, folder: Path, **options: Any) -> Path:
    base_model(spec).save_pretrained(folder, **options)
    return folder


def base_velocity(base: Any, spec: ModelSpec, x: Tensor, t: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
    """Packed and unpacked as diffusers' pipeline does: 2×2 pixels to a token, channels first."""
    rows, n, channels = len(x), spec.grid, spec.in_channels
    packed = x.view(rows, channels, n, 2, n, 2).permute(0, 2, 4, 1, 3, 5).reshape(rows, n * n, channels * 4)
    (values,) = base(packed, text, text_mask, t, [[(1, n, n)]] * rows, return_dict=False)
    unpacked: Tensor = values.view(rows, n, n, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return unpacked.reshape(x.shape)

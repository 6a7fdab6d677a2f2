"""The elastic latent interface: group, Read, keep, restore, Write.

Shapes: B batch, N spatial tokens, G groups, J latents per group, K kept, D width, h heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elit_export.models.layers import (
    Mlp,
    Modulation,
    linear,
    merge_heads,
    modulate,
    normed,
    of_kind,
    over_tokens,
    plain_norm,
    precision_of,
    split_heads,
)
from elit_export.spec import LayerKind

RMS_EPS = 1e-5


# ---------------------------------------------------------------- group and ungroup


def group(x: Tensor, grid: int, side: int) -> Tensor:
    """Cut raster tokens into windows of side×side tokens; both are row-major."""
    windows = grid // side
    x = x.unflatten(1, (windows, side, windows, side))  # (B, n/g, g, n/g, g, D)
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # (B, G, J, D)


def ungroup(x: Tensor, grid: int, side: int) -> Tensor:
    """Put windows back into raster order: the inverse of `group`."""
    windows = grid // side
    x = x.unflatten(2, (side, side)).unflatten(1, (windows, windows))  # (B, n/g, n/g, g, g, D)
    return x.transpose(2, 3).flatten(1, 4)  # (B, N, D)


# ---------------------------------------------------------------- keep and restore


def keep(latents: Tensor, kept: Tensor) -> Tensor:
    """Select the kept latents of all groups, as one sequence for the core."""
    return latents.index_select(2, kept).flatten(1, 2)  # (B, G·K, D)


def restore(core_out: Tensor, latents: Tensor, kept: Tensor) -> Tensor:
    """Put the core's output back in front of the dropped latents, which keep the value that Read gave them."""
    groups = latents.shape[1]
    core_out = core_out.unflatten(1, (groups, kept.shape[0]))  # (B, G, K, D)
    return torch.cat([core_out, latents[:, :, kept.shape[0] :]], dim=2)  # (B, G, J, D)


# ---------------------------------------------------------------- cross-attention


class RmsScale(nn.Module):
    """A norm that computes scale · x / (rms(x) + eps) over the full width; unlike RMSNorm, eps is outside the root."""

    kind = LayerKind.NORM

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x / (x.square().mean(-1, keepdim=True).sqrt() + RMS_EPS)


class CrossAttention(nn.Module):
    """Queries attend to a context inside each group; q and k are normalised before the head split."""

    kind = LayerKind.ATTENTION

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(width, width)
        self.kv_proj = nn.Linear(width, 2 * width)
        self.q_norm = RmsScale(width)
        self.k_norm = RmsScale(width)
        self.proj = nn.Linear(width, width)

    def queries(self, x: Tensor) -> Tensor:  # (..., Q, D)
        q = normed(self.q_norm, linear(self.q_proj, x)).to(precision_of(self.kv_proj))
        return split_heads(q, self.num_heads)  # (..., h, Q, D/h)

    def attend(self, queries: Tensor, context: Tensor) -> Tensor:  # (B, G, h, Q, D/h), (B, G, J, D)
        k, v = linear(self.kv_proj, context).chunk(2, dim=-1)
        k = split_heads(normed(self.k_norm, k), self.num_heads)
        v = split_heads(v, self.num_heads)
        # Attention kernels expect four axes: (B·G, h, Q or J, D/h).
        attended = F.scaled_dot_product_attention(queries.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))
        projected: Tensor = self.proj(merge_heads(attended).unflatten(0, (-1, context.shape[1])))
        return projected  # (B, G, Q, D)


# ---------------------------------------------------------------- Read


class Read(nn.Module):
    """Pull the tokens of each group into its J latents.

    The queries are parameters, the same for every group and input, so their projection is a
    constant of the network: it is computed on (J, D) and expanded afterwards.
    """

    kind = LayerKind.TABLE

    def __init__(self, width: int, num_heads: int, grid: int, side: int) -> None:
        super().__init__()
        self.grid, self.side = grid, side
        self.query = nn.Parameter(torch.empty(side**2, width))
        self.pos_embed = nn.Parameter(torch.empty(side**2, width))
        self.latent_pos_embed = nn.Parameter(torch.empty(grid**2, width))  # raster order
        self.attn = CrossAttention(width, num_heads)
        of_kind(LayerKind.CONSTANT, self.attn.q_proj)
        self.norm1 = plain_norm(width)
        self.norm2 = plain_norm(width)
        self.mlp = Mlp(width, width, bias=False)
        # Seven chunks, because the released weights have seven; the last is unused.
        self.modulation = Modulation(width, chunks=7)

    def forward(self, tokens: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:  # (B, N, D), (B, D)
        """Return the latents, and the patches with Read's position from which Write continues, (B, G, J, D) each."""
        patches = group(tokens, self.grid, self.side) + self.pos_embed
        shift_p, scale_p, gate_attn, shift_m, scale_m, gate_m, _ = self.modulation(c)
        queries = self.attn.queries(self.query).expand(*patches.shape[:2], -1, -1, -1)  # (B, G, h, J, D/h)
        attended = self.attn.attend(queries, modulate(self.norm1(patches), shift_p, scale_p))
        latents = self.query + over_tokens(gate_attn, patches) * attended
        mixed = self.mlp(modulate(self.norm2(latents), shift_m, scale_m))
        latents = latents + over_tokens(gate_m, patches) * mixed
        return latents + group(self.latent_pos_embed[None], self.grid, self.side), patches


# ---------------------------------------------------------------- Write


class Write(nn.Module):
    """Put all J latents of each group back onto its tokens: no norm, no modulation, no gate."""

    kind = LayerKind.TABLE

    def __init__(self, width: int, num_heads: int, grid: int, side: int) -> None:
        super().__init__()
        self.grid, self.side = grid, side
        self.pos_embed = nn.Parameter(torch.empty(side**2, width))
        self.attn = CrossAttention(width, num_heads)
        self.mlp = Mlp(width, width, bias=False)

    def forward(self, patches: Tensor, latents: Tensor) -> Tensor:  # (B, G, J, D) each
        patches = patches + self.pos_embed
        patches = patches + self.attn.attend(self.attn.queries(patches), latents)
        patches = patches + self.mlp(patches)
        return ungroup(patches, self.grid, self.side)  # (B, N, D)

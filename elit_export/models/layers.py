"""The parts of a diffusion transformer: embedders, attention, MLP, adaLN-Zero block, final layer.

L is a number of tokens, h the number of heads, D/h the size of one; other letters as in `spec`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from elit_export.models.rope import MAX_PERIOD, RotaryEmbedding
from elit_export.spec import LayerKind, ModelSpec

TIME_FEATURES = 256
NORM_EPS = 1e-6
QK_NORM_EPS = 1e-5
RMS_QK_NORM_EPS = 1e-6


M = TypeVar("M", bound=nn.Module)


def of_kind(kind: LayerKind, module: M) -> M:
    """Set the kind of a library's module; our own modules state theirs as a class attribute."""
    module.kind = kind  # type: ignore[assignment]
    return module


# ---------------------------------------------------------------- embedders


class PatchEmbed(nn.Module):
    """A convolution that turns an image into spatial tokens in raster order."""

    kind = LayerKind.EMBEDDER

    def __init__(self, in_channels: int, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W)
        tokens: Tensor = self.proj(x)  # (B, D, n, n)
        return tokens.flatten(2).transpose(1, 2)  # (B, N, D)


class TimestepEmbedder(nn.Module):
    """An MLP on cosine and sine features of `units` · t, with t in [0, 1]."""

    kind = LayerKind.EMBEDDER

    def __init__(self, width: int, *, units: int = 1) -> None:
        super().__init__()
        self.units = units
        self.mlp = nn.Sequential(nn.Linear(TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:  # (B,)
        half = TIME_FEATURES // 2
        exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
        # In float64 torch and the graphs, which fold this to a constant, round the powers alike; a large t shows it.
        frequencies = torch.exp((-math.log(MAX_PERIOD) * exponents).double()).float()
        angles = t[:, None] * frequencies  # (B, half)
        if self.units != 1:
            # In this order, as float32 rounds the features of a thousandth of t by 1e-4. `abs` changes nothing, but
            # keeps engines from merging the two products into one.
            angles = self.units * angles.abs()
        features: Tensor = self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))
        return features  # (B, D)


def sincos_position_embedding(grid: int, width: int) -> Tensor:
    """Return the fixed 2-D sin-cos positional embedding (1, N, D): half of the channels by column, then half by row."""
    quarter = width // 4
    omega = MAX_PERIOD ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * omega  # (n, D/4)
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # (n, D/2)
    columns = line[None, :, :].expand(grid, grid, -1)
    rows = line[:, None, :].expand(grid, grid, -1)
    return torch.cat([columns, rows], dim=-1).reshape(1, grid * grid, width).float()


# ---------------------------------------------------------------- attention and MLP

# Attention and MLP may hold weights of a lower precision than the float32 tokens around them
# (`graphs.rounding`); they round what comes in, and what they add to a float32 token is float32 again.


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """Run the layer in its own precision."""
    product: Tensor = layer(x.to(precision_of(layer)))
    return product


def precision_of(layer: nn.Linear) -> torch.dtype:
    """Return the precision in which the layer's weight is used; one that is upcast on use is not upcast to find out."""
    return torch.float32 if is_parametrized(layer) else layer.weight.dtype


def normed(norm: nn.Module, x: Tensor) -> Tensor:
    """Apply a norm in float32 or a more exact type, whatever the precision, and round the result to the type of x."""
    return x if isinstance(norm, nn.Identity) else norm(x.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)


def split_heads(x: Tensor, num_heads: int) -> Tensor:  # (..., L, D)
    heads: Tensor = x.unflatten(-1, (num_heads, -1))
    return heads.transpose(-3, -2)  # (..., h, L, D/h)


def merge_heads(x: Tensor) -> Tensor:  # (..., h, L, D/h)
    return x.transpose(-3, -2).flatten(-2)  # (..., L, D)


class SelfAttention(nn.Module):
    """Multi-head attention of tokens on themselves, optionally with a norm on each head's q and k."""

    kind = LayerKind.ATTENTION

    def __init__(self, width: int, num_heads: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm, self.k_norm = norm(width // num_heads), norm(width // num_heads)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rope: RotaryEmbedding | None = None) -> Tensor:  # (B, L, D)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)) for part in linear(self.qkv, x).chunk(3, dim=-1))
        q, k = normed(self.q_norm, q), normed(self.k_norm, k)  # (B, L, h, D/h)
        if rope:
            q, k = rope(q), rope(k)
        attended = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        projected: Tensor = self.proj(merge_heads(attended))
        return projected


class StreamAttention(nn.Module):
    """The weights by which one of several streams takes part in attention over all of them."""

    kind = LayerKind.ATTENTION

    def __init__(self, width: int, num_heads: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.q_norm, self.k_norm = norm(width // num_heads), norm(width // num_heads)
        self.proj = nn.Linear(width, width)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # (B, L, D)
        """Return queries, keys and values (B, L, h, D/h)."""
        q, k, v = (linear(layer, x).unflatten(-1, (self.num_heads, -1)) for layer in (self.q, self.k, self.v))
        return normed(self.q_norm, q), normed(self.k_norm, k), v


def qk_norm_of(spec: ModelSpec) -> Callable[[int], nn.Module]:
    """Return a function that makes the norm of queries or keys, given the size of a head."""
    if not spec.qk_norm:
        return nn.Identity
    kinds: dict[str, Callable[[int], nn.Module]] = {
        "rms": partial(nn.RMSNorm, eps=RMS_QK_NORM_EPS),
        "layer": partial(nn.LayerNorm, eps=QK_NORM_EPS),
    }
    return lambda size: of_kind(LayerKind.NORM, kinds[spec.qk_norm_kind](size))


class Mlp(nn.Module):
    """A linear layer, GELU (tanh form), and a second linear layer."""

    kind = LayerKind.MLP

    def __init__(self, width: int, hidden: int, *, bias: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.fc2(F.gelu(linear(self.fc1, x), approximate="tanh"))
        return mixed


# ---------------------------------------------------------------- skips, merging, splitting


class SkipProjection(nn.Module):
    """A linear layer that fuses tokens with those of a long skip."""

    kind = LayerKind.SKIP

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:  # (B, L, D) each
        fused: Tensor = linear(self.linear, torch.cat([x, skip], dim=-1)).to(x.dtype)
        return fused


class TokenMerge(nn.Module):
    """A linear layer that merges `count` consecutive tokens into one of another width."""

    kind = LayerKind.MERGE

    def __init__(self, width: int, merged_width: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.linear = nn.Linear(count * width, merged_width)

    def forward(self, x: Tensor) -> Tensor:  # (B, L, D)
        neighbours = x.unflatten(1, (-1, self.count)).flatten(2)  # (B, L/count, count·D)
        merged: Tensor = linear(self.linear, neighbours).to(x.dtype)
        return merged


class TokenSplit(nn.Module):
    """A linear layer that splits a token into `count`: the counterpart of TokenMerge, with weights of its own."""

    kind = LayerKind.MERGE

    def __init__(self, merged_width: int, width: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.linear = nn.Linear(merged_width, count * width)

    def forward(self, x: Tensor) -> Tensor:  # (B, L/count, ·)
        tokens = linear(self.linear, x).to(x.dtype)  # (B, L/count, count·D)
        split: Tensor = tokens.unflatten(2, (self.count, -1)).flatten(1, 2)  # (B, L, D)
        return split


# ---------------------------------------------------------------- adaLN-Zero


def plain_norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=False)


class Modulation(nn.Module):
    """A layer that turns a condition into `chunks` vectors, which shift, scale or gate tokens of the given width."""

    kind = LayerKind.MODULATION

    def __init__(self, width: int, chunks: int, *, width_factor: int = 1) -> None:
        super().__init__()
        self.chunks = chunks
        self.linear = nn.Linear(width, chunks * width_factor * width)

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:  # (B, D)
        parts: tuple[Tensor, ...] = self.linear(F.silu(c)).chunk(self.chunks, dim=-1)  # (B, width_factor·D) each
        return parts


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return x · (1 + scale) + shift, broadcast over the token axes between batch and width."""
    return x * (1 + over_tokens(scale, x)) + over_tokens(shift, x)


def over_tokens(c: Tensor, x: Tensor) -> Tensor:
    """Give c (B, D) the token axes of x (B, ..., D)."""
    return c[:, None, :] if x.dim() == 3 else c[:, None, None, :]


class Block(nn.Module):
    """adaLN-Zero transformer block (Peebles & Xie 2023, section 3.2).

    A block that is `width_factor` times as wide has more heads of the same size, and takes the same condition.
    """

    def __init__(self, spec: ModelSpec, *, width_factor: int = 1) -> None:
        super().__init__()
        width = width_factor * spec.hidden_size
        self.norm1 = plain_norm(width)
        self.attn = SelfAttention(width, width_factor * spec.num_heads, qk_norm_of(spec))
        self.norm2 = plain_norm(width)
        self.mlp = Mlp(width, width_factor * spec.mlp_size, bias=True)
        self.modulation = Modulation(spec.hidden_size, chunks=6, width_factor=width_factor)

    def modulated(self, x: Tensor, c: Tensor) -> Tensor:  # (B, L, D), (B, D)
        """Return the input of attention."""
        shift, scale, *_ = self.modulation(c)
        return modulate(self.norm1(x), shift, scale)

    def forward(self, x: Tensor, c: Tensor, rope: RotaryEmbedding | None = None) -> Tensor:  # (B, L, D), (B, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)
        x = x + over_tokens(gate1, x) * self.attn(modulate(self.norm1(x), shift1, scale1), rope)
        mixed: Tensor = self.mlp(modulate(self.norm2(x), shift2, scale2))
        return x + over_tokens(gate2, x) * mixed


def run_blocks(blocks: Iterable[nn.Module], x: Tensor, c: Tensor, rope: RotaryEmbedding | None = None) -> Tensor:
    for block in blocks:
        x = block(x, c, rope)
    return x


class FinalLayer(nn.Module):
    """A modulated norm, and the projection of each token to its p·p·C values."""

    kind = LayerKind.FINAL

    def __init__(self, width: int, out_size: int) -> None:
        super().__init__()
        self.norm = plain_norm(width)
        self.modulation = Modulation(width, chunks=2)
        self.linear = nn.Linear(width, out_size)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:  # (B, N, D), (B, D)
        shift, scale = self.modulation(c)
        values: Tensor = self.linear(modulate(self.norm(x), shift, scale))
        return values  # (B, N, p·p·C)

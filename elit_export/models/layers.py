"""The parts of a diffusion transformer: embedders, rotations, attention, MLP, adaLN-Zero block, final layer.

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
    """A module of a library, which states its kind as those of ours do by their class."""
    module.kind = kind  # type: ignore[assignment]
    return module


# ---------------------------------------------------------------- embedders


class PatchEmbed(nn.Module):
    """Image → spatial tokens in raster order."""

    kind = LayerKind.EMBEDDER

    def __init__(self, in_channels: int, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W)
        tokens: Tensor = self.proj(x)  # (B, D, n, n)
        return tokens.flatten(2).transpose(1, 2)  # (B, N, D)


class TimestepEmbedder(nn.Module):
    """t in [0, 1], as it is or counted in other `units` → cosine and sine features → MLP."""

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
            # In this order, as float32 rounds the features of a thousandth of t by 1e-4; `abs`, which changes nothing,
            # keeps engines from turning the two products into one.
            angles = self.units * angles.abs()
        features: Tensor = self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))
        return features  # (B, D)


def sincos_position_embedding(grid: int, width: int) -> Tensor:
    """Fixed 2-D sine-cosine code, (1, N, D): first half of the channels from the column, last from the row."""
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
    """The layer in its own precision."""
    product: Tensor = layer(x.to(precision_of(layer)))
    return product


def precision_of(layer: nn.Linear) -> torch.dtype:
    """That which its weight has when asked; of one that is upcast then (`models.upcast`), without asking."""
    return torch.float32 if is_parametrized(layer) else layer.weight.dtype


def normed(norm: nn.Module, x: Tensor) -> Tensor:
    """A norm in float32 or what is more exact, as it is in every precision, rounded to that of x."""
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

    def forward(self, x: Tensor, rotation: RotaryEmbedding | None = None) -> Tensor:  # (B, L, D)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)) for part in linear(self.qkv, x).chunk(3, dim=-1))
        q, k = normed(self.q_norm, q), normed(self.k_norm, k)  # (B, L, h, D/h)
        if rotation:
            q, k = rotation(q), rotation(k)
        attended = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        projected: Tensor = self.proj(merge_heads(attended))
        return projected


class StreamAttention(nn.Module):
    """The weights with which one of several streams takes part in attention over all of them."""

    kind = LayerKind.ATTENTION

    def __init__(self, width: int, num_heads: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.q_norm, self.k_norm = norm(width // num_heads), norm(width // num_heads)
        self.proj = nn.Linear(width, width)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # (B, L, D)
        """Queries, keys and values (B, L, h, D/h)."""
        q, k, v = (linear(layer, x).unflatten(-1, (self.num_heads, -1)) for layer in (self.q, self.k, self.v))
        return normed(self.q_norm, q), normed(self.k_norm, k), v


def qk_norm_of(spec: ModelSpec) -> Callable[[int], nn.Module]:
    """What makes the norm of queries or keys, from the size of a head."""
    if not spec.qk_norm:
        return nn.Identity
    kinds: dict[str, Callable[[int], nn.Module]] = {
        "rms": partial(nn.RMSNorm, eps=RMS_QK_NORM_EPS),
        "layer": partial(nn.LayerNorm, eps=QK_NORM_EPS),
    }
    return lambda size: of_kind(LayerKind.NORM, kinds[spec.qk_norm_kind](size))


class Mlp(nn.Module):
    """Linear, GELU (tanh form), Linear."""

    kind = LayerKind.MLP

    def __init__(self, width: int, hidden: int, *, bias: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.fc2(F.gelu(linear(self.fc1, x), approximate="tanh"))
        return mixed


# ---------------------------------------------------------------- joining, merging, splitting


class SkipProjection(nn.Module):
    """Tokens and those of a long skip → tokens."""

    kind = LayerKind.SKIP

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:  # (B, L, D) each
        joined: Tensor = linear(self.linear, torch.cat([x, skip], dim=-1)).to(x.dtype)
        return joined


class TokenMerge(nn.Module):
    """`count` tokens that follow each other → one, of another width."""

    kind = LayerKind.MERGE

    def __init__(self, width: int, merged_width: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.linear = nn.Linear(count * width, merged_width)

    def forward(self, x: Tensor) -> Tensor:  # (B, L, D)
        together = x.unflatten(1, (-1, self.count)).flatten(2)  # (B, L/count, count·D)
        merged: Tensor = linear(self.linear, together).to(x.dtype)
        return merged


class TokenSplit(nn.Module):
    """The way back from TokenMerge, with other weights."""

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
    """Condition → `chunks` vectors that shift, scale or gate tokens `widened` times as wide."""

    kind = LayerKind.MODULATION

    def __init__(self, width: int, chunks: int, *, widened: int = 1) -> None:
        super().__init__()
        self.chunks = chunks
        self.linear = nn.Linear(width, chunks * widened * width)

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:  # (B, D)
        parts: tuple[Tensor, ...] = self.linear(F.silu(c)).chunk(self.chunks, dim=-1)  # (B, widened·D) each
        return parts


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x · (1 + scale) + shift, broadcast over the token axes between batch and width."""
    return x * (1 + over_tokens(scale, x)) + over_tokens(shift, x)


def over_tokens(c: Tensor, x: Tensor) -> Tensor:
    """Give c (B, D) the token axes of x (B, ..., D)."""
    return c[:, None, :] if x.dim() == 3 else c[:, None, None, :]


class Block(nn.Module):
    """adaLN-Zero transformer block (Peebles & Xie 2023, section 3.2).

    One that is `widened` has more heads, not wider ones, and takes the same condition.
    """

    def __init__(self, spec: ModelSpec, *, widened: int = 1) -> None:
        super().__init__()
        width = widened * spec.hidden_size
        self.norm1 = plain_norm(width)
        self.attn = SelfAttention(width, widened * spec.num_heads, qk_norm_of(spec))
        self.norm2 = plain_norm(width)
        self.mlp = Mlp(width, widened * spec.mlp_size, bias=True)
        self.modulation = Modulation(spec.hidden_size, chunks=6, widened=widened)

    def modulated(self, x: Tensor, c: Tensor) -> Tensor:  # (B, L, D), (B, D)
        """What attention takes in."""
        shift, scale, *_ = self.modulation(c)
        return modulate(self.norm1(x), shift, scale)

    def forward(self, x: Tensor, c: Tensor, rotation: RotaryEmbedding | None = None) -> Tensor:  # (B, L, D), (B, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)
        x = x + over_tokens(gate1, x) * self.attn(modulate(self.norm1(x), shift1, scale1), rotation)
        mixed: Tensor = self.mlp(modulate(self.norm2(x), shift2, scale2))
        return x + over_tokens(gate2, x) * mixed


def run_blocks(blocks: Iterable[nn.Module], x: Tensor, c: Tensor, rotation: RotaryEmbedding | None = None) -> Tensor:
    for block in blocks:
        x = block(x, c, rotation)
    return x


class FinalLayer(nn.Module):
    """Modulated norm and the projection of each token to its p·p·C values."""

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

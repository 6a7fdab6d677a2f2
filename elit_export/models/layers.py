"""The parts of a diffusion transformer: embedders, attention, MLP, adaLN-Zero block, final layer.

Takes: tensors.  Gives: nn.Modules without data-dependent control flow.  May touch: nothing.
Knows nothing of: groups, latents, budgets.

L is a number of tokens, h the number of heads; other letters as in `spec`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TIME_FEATURES = 256
MAX_PERIOD = 10_000.0
NORM_EPS = 1e-6
QK_NORM_EPS = 1e-5


# ---------------------------------------------------------------- embedders


class PatchEmbed(nn.Module):
    """Image → spatial tokens in raster order."""

    def __init__(self, in_channels: int, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W)
        tokens: Tensor = self.proj(x)  # (B, D, n, n)
        return tokens.flatten(2).transpose(1, 2)  # (B, N, D)


class TimestepEmbedder(nn.Module):
    """t in [0, 1] as it is → cosine and sine features → MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:  # (B,)
        half = TIME_FEATURES // 2
        exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
        angles = t[:, None] * torch.exp(-math.log(MAX_PERIOD) * exponents)  # (B, half)
        features: Tensor = self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))
        return features  # (B, D)


def position_code(grid: int, width: int) -> Tensor:
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
# (`models.precision`); they round what comes in, and what they add to a float32 token is float32 again.


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer in its own precision."""
    product: Tensor = layer(x.to(layer.weight.dtype))
    return product


def normed(norm: nn.Module, x: Tensor) -> Tensor:
    """A norm in its own precision, rounded back to that of x."""
    return x if isinstance(norm, nn.Identity) else norm(x.to(next(norm.parameters()).dtype)).to(x.dtype)


def split_heads(x: Tensor, num_heads: int) -> Tensor:  # (..., L, D)
    heads: Tensor = x.unflatten(-1, (num_heads, -1))
    return heads.transpose(-3, -2)  # (..., h, L, D/h)


def merge_heads(x: Tensor) -> Tensor:  # (..., h, L, D/h)
    return x.transpose(-3, -2).flatten(-2)  # (..., L, D)


class SelfAttention(nn.Module):
    """Multi-head attention of tokens on themselves, optionally with LayerNorm on each head's q and k."""

    def __init__(self, width: int, num_heads: int, *, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        head_size = width // num_heads
        self.q_norm = nn.LayerNorm(head_size, eps=QK_NORM_EPS) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head_size, eps=QK_NORM_EPS) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # (B, L, D)
        q, k, v = (split_heads(part, self.num_heads) for part in linear(self.qkv, x).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(normed(self.q_norm, q), normed(self.k_norm, k), v)
        projected: Tensor = self.proj(merge_heads(attended))
        return projected


class Mlp(nn.Module):
    """Linear, GELU (tanh form), Linear."""

    def __init__(self, width: int, hidden: int, *, bias: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.fc2(F.gelu(linear(self.fc1, x), approximate="tanh"))
        return mixed


# ---------------------------------------------------------------- adaLN-Zero


def plain_norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=False)


class Modulation(nn.Module):
    """Condition → `chunks` vectors that shift, scale or gate."""

    def __init__(self, width: int, chunks: int) -> None:
        super().__init__()
        self.chunks = chunks
        self.linear = nn.Linear(width, chunks * width)

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:  # (B, D)
        parts: tuple[Tensor, ...] = self.linear(F.silu(c)).chunk(self.chunks, dim=-1)  # (B, D) each
        return parts


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x · (1 + scale) + shift, broadcast over the token axes between batch and width."""
    return x * (1 + over_tokens(scale, x)) + over_tokens(shift, x)


def over_tokens(c: Tensor, x: Tensor) -> Tensor:
    """Give c (B, D) the token axes of x (B, ..., D)."""
    return c[:, None, :] if x.dim() == 3 else c[:, None, None, :]


class Block(nn.Module):
    """adaLN-Zero transformer block (Peebles & Xie 2023, section 3.2)."""

    def __init__(self, width: int, num_heads: int, mlp_size: int, *, qk_norm: bool) -> None:
        super().__init__()
        self.norm1 = plain_norm(width)
        self.attn = SelfAttention(width, num_heads, qk_norm=qk_norm)
        self.norm2 = plain_norm(width)
        self.mlp = Mlp(width, mlp_size, bias=True)
        self.modulation = Modulation(width, chunks=6)

    def modulated(self, x: Tensor, c: Tensor) -> Tensor:  # (B, L, D), (B, D)
        """What attention takes in."""
        shift, scale, *_ = self.modulation(c)
        return modulate(self.norm1(x), shift, scale)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:  # (B, L, D), (B, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)
        x = x + over_tokens(gate1, x) * self.attn(modulate(self.norm1(x), shift1, scale1))
        mixed: Tensor = self.mlp(modulate(self.norm2(x), shift2, scale2))
        return x + over_tokens(gate2, x) * mixed


class FinalLayer(nn.Module):
    """Modulated norm and the projection of each token to its p·p·C values."""

    def __init__(self, width: int, out_size: int) -> None:
        super().__init__()
        self.norm = plain_norm(width)
        self.modulation = Modulation(width, chunks=2)
        self.linear = nn.Linear(width, out_size)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:  # (B, N, D), (B, D)
        shift, scale = self.modulation(c)
        values: Tensor = self.linear(modulate(self.norm(x), shift, scale))
        return values  # (B, N, p·p·C)

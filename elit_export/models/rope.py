"""Rotary positional embeddings (RoPE) of class-conditional models, and of text and image together as in Qwen-Image.

h is the number of heads, D/h the size of one, L a number of tokens. The axis of heads follows that of tokens, as in the
output of linear layers. Everything is computed in float32; the result is rounded to the type of the input.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from elit_export.spec import MAX_TEXT_TOKENS, ModelSpec

MAX_PERIOD = 10_000.0
# Added to the scores of padding. exp of it is 0 in every precision; −∞ would give NaN in kernels that process keys
# in tiles, where a whole tile is padding.
MASKED = -65504.0


# ---------------------------------------------------------------- one stream


@dataclass(frozen=True)
class RotaryEmbedding:
    """2-D rotary positions of L tokens: `cos` and `sin` (L, D/h/2), half of the pairs by column, half by row."""

    cos: Tensor
    sin: Tensor

    def __call__(self, x: Tensor) -> Tensor:  # (B, L, h, D/h)
        """Rotate the pairs (i, i + D/h/2) of each head."""
        cos, sin = self.cos[:, None, :], self.sin[:, None, :]
        first, second = x.to(cos.dtype).chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def rope_angles(grid: int, head_size: int, device: torch.device) -> Tensor:
    """Return the angles (N, D/h/2) of tokens in raster order."""
    quarter = head_size // 4
    omega = MAX_PERIOD ** -(torch.arange(quarter, dtype=torch.float32, device=device) / quarter)
    line = torch.arange(grid, dtype=torch.float32, device=device)[:, None] * omega  # (n, D/h/4)
    columns, rows = line[None, :, :].expand(grid, grid, -1), line[:, None, :].expand(grid, grid, -1)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1)


def rope_from_angles(angles: Tensor) -> RotaryEmbedding:
    return RotaryEmbedding(angles.cos(), angles.sin())


# ---------------------------------------------------------------- text and image


def joint_rope_tables(spec: ModelSpec, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cosines and sines for image tokens in raster order (2, N, D/h/2), and for the longest text (2, T, D/h/2).

    An eighth of a head is rotated by the frame, which is 0 for an image; the rest in halves by row and column, counted
    from the middle. Text continues along the diagonal, after the image's last row and column.
    """
    n, head = spec.grid, spec.hidden_size // spec.num_heads
    frame, row, column = (_frequencies(size, device) for size in (head // 8, head * 7 // 16, head * 7 // 16))
    line = torch.arange(n, device=device)[:, None] - (n - n // 2)  # (n, 1)
    on_image = [torch.zeros(n, n, head // 16, device=device)]
    on_image += [(line * row)[:, None].expand(n, n, -1), (line * column)[None].expand(n, n, -1)]
    on_text = (torch.arange(MAX_TEXT_TOKENS, device=device)[:, None] + n // 2) * torch.cat([frame, row, column])
    tables = (torch.stack([angles.cos(), angles.sin()]) for angles in (torch.cat(on_image, -1).flatten(0, 1), on_text))
    return next(tables), next(tables)


def _frequencies(size: int, device: torch.device) -> Tensor:
    """Return frequencies (size/2,), rounded as in Qwen-Image."""
    return 1.0 / MAX_PERIOD ** (torch.arange(0, size, 2, device=device).float() / size)


@dataclass(frozen=True)
class JointPositions:
    """The positions of the L tokens of both streams, text first, and the mask of the tokens that are attended to.

    `cos` and `sin` (L, D/h/2) rotate the pairs (2i, 2i + 1) of a head; `bias` (B, 1, 1, L) is added to the scores.
    """

    cos: Tensor
    sin: Tensor
    bias: Tensor

    def apply_rope(self, x: Tensor) -> Tensor:  # (B, L, h, D/h)
        """Rotate the pairs (2i, 2i + 1) of each head."""
        cos, sin = self.cos[:, None, :], self.sin[:, None, :]
        first, second = x.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
        pairs = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1)
        return pairs.flatten(-2).to(x.dtype)


def joint_positions(txt: Tensor, image: Tensor, text_mask: Tensor) -> JointPositions:
    """Combine tables (2, T, D/h/2) and (2, L − T, D/h/2) with the mask (B, T)."""
    on_txt = torch.where(text_mask != 0, 0.0, MASKED)
    bias = torch.cat([on_txt, on_txt.new_zeros(text_mask.shape[0], image.shape[1])], dim=1)
    cos, sin = torch.cat([txt, image], dim=1).unbind()
    return JointPositions(cos, sin, bias[:, None, None, :])

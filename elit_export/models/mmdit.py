"""ELIT-MM-DiT: text and image tokens in streams of their own that attend jointly, in the form of Qwen-Image.

Takes: a ModelSpec.  Gives: an nn.Module.  May touch: nothing.  Knows nothing of: files, samplers, text encoders.

Without Read and Write it is the `QwenImageTransformer2DModel` of diffusers 0.42 for one image, number for number. Text
runs through all blocks; only image tokens go through Read and Write. Padding of the text, whatever it holds, changes
nothing. ELIT-Qwen-Image (arXiv 2603.12245) is unpublished but for its split 8-44-8. Our own reading of the rest:

- A latent has the rotary position of the spatial token at its slot of its group, so that the core keeps the base
  model's sense of place and no position depends on the budget. Text keeps its positions in the core.
- Read is modulated by the embedding of t alone, as every block of Qwen-Image is; text reaches it through the tokens.
- Read and Write are those of the released ELIT-SiT, with its initialisation: at first they add nothing but positions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elit_export.errors import InputError
from elit_export.models.elit import Elit, expected_residual, signal_distance
from elit_export.models.interface import Read, Write, group, keep
from elit_export.models.layers import (
    MAX_PERIOD,
    RMS_QK_NORM_EPS,
    FinalLayer,
    Mlp,
    Modulation,
    StreamAttention,
    TimestepEmbedder,
    merge_heads,
    modulate,
    over_tokens,
    plain_norm,
    qk_norm_of,
)
from elit_export.spec import LONGEST_TEXT, PIXELS, DataFacts, ModelSpec

THOUSANDTHS = 1000  # the units that Qwen-Image counts t in
# Added to the scores of padding. exp of it is 0 in every precision; −∞ would be no number in kernels that take the
# keys in tiles, where a tile is all padding.
MASKED = -65504.0


class ElitMMDiT(Elit):
    """Head on text and spatial tokens, Read, core on text and the kept latents, Write, tail."""

    def __init__(self, spec: ModelSpec, data: DataFacts = PIXELS) -> None:
        super().__init__(spec, data)
        width, heads, patch = spec.hidden_size, spec.num_heads, spec.patch_size**2 * spec.in_channels
        self.img_in = nn.Linear(patch, width)
        self.t_embedder = TimestepEmbedder(width, units=THOUSANDTHS)
        self.txt_norm = nn.RMSNorm(spec.text_width, eps=RMS_QK_NORM_EPS)
        self.txt_in = nn.Linear(spec.text_width, width)
        self.head = joint_blocks(spec, spec.head_depth)
        self.read = Read(width, heads, spec.grid, spec.group_size)
        self.core = joint_blocks(spec, spec.core_depth)
        self.write = Write(width, heads, spec.grid, spec.group_size)
        self.tail = joint_blocks(spec, spec.tail_depth)
        self.final = FinalLayer(width, patch)

    # the graphs

    def step(self, x: Tensor, t: Tensor, text: Tensor, text_mask: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        """As `Elit.step`; text (B, T, text_width), text_mask (B, T) int64, 1 for a token and 0 for padding."""
        self.check_kept(latents)
        check_text(self.spec, text, text_mask)
        embedded, c = self.embed(x), self.t_embedder(t)  # (B, N, D), (B, D)
        spatial, latent = self.places(text_mask, latents)
        words = self.embed_text(text, text_mask)
        words, tokens = run_joint(self.head, words, embedded, c, spatial)
        every, patches, processed = self.read_kept(tokens, c, latents)
        words, processed = run_joint(self.core, words, processed, c, latent)  # (B, T, D), (B, G·K, D)
        tokens = self.write_kept(patches, processed, every, latents)
        _, tokens = run_joint(self.tail, words, tokens, c, spatial)
        return self.unpatchify(self.final(tokens, c)), tokens - embedded

    def probe(self, x: Tensor, t: Tensor, signal_prev: Tensor) -> tuple[Tensor, Tensor]:
        """As `Elit.probe`: the image stream's input, which text has not reached yet."""
        signal = self.first_block.image.modulated(self.embed(x), self.t_embedder(t))
        return signal, signal_distance(signal, signal_prev)

    def reuse(self, x: Tensor, t: Tensor, residual: Tensor, residual_prev: Tensor, forecast: Tensor) -> Tensor:
        """As `Elit.reuse`: what text did is in the residual."""
        tokens = self.embed(x) + expected_residual(residual, residual_prev, forecast)
        return self.unpatchify(self.final(tokens, self.t_embedder(t)))

    # parts

    @property
    def first_block(self) -> JointBlock:
        block = next(iter([*self.head, *self.core, *self.tail]))
        assert isinstance(block, JointBlock)
        return block

    def embed(self, x: Tensor) -> Tensor:  # (B, C, H, W)
        n, p = self.spec.grid, self.spec.patch_size
        patches = x.unflatten(3, (n, p)).unflatten(2, (n, p)).permute(0, 2, 4, 1, 3, 5)  # (B, n, n, C, p, p)
        tokens: Tensor = self.img_in(patches.flatten(3).flatten(1, 2))
        return tokens  # (B, N, D)

    def embed_text(self, text: Tensor, text_mask: Tensor) -> Tensor:
        """(B, T, D); padding is emptied, so that not even NaN in it does harm."""
        words: Tensor = self.txt_in(self.txt_norm(torch.where(text_mask[:, :, None] != 0, text, 0.0)))
        return words

    def places(self, text_mask: Tensor, kept: Tensor) -> tuple[Places, Places]:
        """Those of text and spatial tokens, and of text and kept latents."""
        spatial, words = rotary_tables(self.spec, kept.device)
        words = words[:, : text_mask.shape[1]]
        latent = keep(group(spatial, self.spec.grid, self.spec.group_size), kept)  # (2, G·K, D/h/2)
        return places_of(words, spatial, text_mask), places_of(words, latent, text_mask)

    def unpatchify(self, values: Tensor) -> Tensor:  # (B, N, C·p·p)
        n, p, channels = self.spec.grid, self.spec.patch_size, self.spec.in_channels
        values = values.unflatten(2, (channels, p, p)).unflatten(1, (n, n))  # (B, n, n, C, p, p)
        return values.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)  # (B, C, H, W)


def check_text(spec: ModelSpec, text: Tensor, text_mask: Tensor) -> None:
    """Raise InputError for text (B, T, text_width) and a mask (B, T) that are not of one another or of the model."""
    if text.ndim != 3 or text.shape[2] != spec.text_width or text.shape[1] > LONGEST_TEXT:
        raise InputError(f"text has shape {tuple(text.shape)}, must be (B, 1 to {LONGEST_TEXT}, {spec.text_width})")
    if text_mask.shape != text.shape[:2]:
        raise InputError(f"text_mask has shape {tuple(text_mask.shape)}, the text {tuple(text.shape[:2])} tokens")


# ---------------------------------------------------------------- positions and padding


def rotary_tables(spec: ModelSpec, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines for image tokens in raster order (2, N, D/h/2), and for the longest text (2, T, D/h/2).

    An eighth of a head turns by the frame, which is 0 for an image, the rest in halves by row and column, counted
    from the middle. Text goes on along the diagonal, after the image's last row and column.
    """
    n, head = spec.grid, spec.hidden_size // spec.num_heads
    frame, row, column = (_frequencies(size, device) for size in (head // 8, head * 7 // 16, head * 7 // 16))
    line = torch.arange(n, device=device)[:, None] - (n - n // 2)  # (n, 1)
    on_image = [torch.zeros(n, n, head // 16, device=device)]
    on_image += [(line * row)[:, None].expand(n, n, -1), (line * column)[None].expand(n, n, -1)]
    on_text = (torch.arange(LONGEST_TEXT, device=device)[:, None] + n // 2) * torch.cat([frame, row, column])
    tables = (torch.stack([angles.cos(), angles.sin()]) for angles in (torch.cat(on_image, -1).flatten(0, 1), on_text))
    return next(tables), next(tables)


def _frequencies(size: int, device: torch.device) -> Tensor:
    """(size/2,), rounded as Qwen-Image's are."""
    return 1.0 / MAX_PERIOD ** (torch.arange(0, size, 2, device=device).float() / size)


@dataclass(frozen=True)
class Places:
    """Where the L tokens of both streams stand, text first, and which of them may be attended to.

    `cos` and `sin` (L, D/h/2) turn the pairs (2i, 2i + 1) of a head; `bias` (B, 1, 1, L) is added to the scores.
    """

    cos: Tensor
    sin: Tensor
    bias: Tensor

    def turned(self, x: Tensor) -> Tensor:  # (B, L, h, D/h)
        """In float32; the result is rounded as x is. As in `layers.Rotation` heads lie behind the tokens."""
        cos, sin = self.cos[:, None, :], self.sin[:, None, :]
        first, second = x.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
        pairs = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1)
        return pairs.flatten(-2).to(x.dtype)


def places_of(words: Tensor, image: Tensor, text_mask: Tensor) -> Places:
    """From tables (2, T, D/h/2), (2, L − T, D/h/2) and the mask (B, T)."""
    on_words = torch.where(text_mask != 0, 0.0, MASKED)
    bias = torch.cat([on_words, on_words.new_zeros(text_mask.shape[0], image.shape[1])], dim=1)
    cos, sin = torch.cat([words, image], dim=1).unbind()
    return Places(cos, sin, bias[:, None, None, :])


# ---------------------------------------------------------------- blocks


class Stream(nn.Module):
    """What a stream does in a block with weights of its own: all but the attention."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        width = spec.hidden_size
        self.norm1 = plain_norm(width)
        self.attn = StreamAttention(width, spec.num_heads, qk_norm_of(spec))
        self.norm2 = plain_norm(width)
        self.mlp = Mlp(width, spec.mlp_size, bias=True)
        self.modulation = Modulation(width, chunks=6)

    def modulated(self, x: Tensor, c: Tensor) -> Tensor:  # (B, L, D), (B, D)
        """What attention takes in."""
        return self._shifted(x, self.modulation(c))

    def _shifted(self, x: Tensor, chunks: tuple[Tensor, ...]) -> Tensor:
        shift1, scale1, *_ = chunks
        return modulate(self.norm1(x), shift1, scale1)

    def heads(self, x: Tensor, chunks: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, L, h, D/h)."""
        return self.attn.heads(self._shifted(x, chunks))

    def updated(self, x: Tensor, attended: Tensor, chunks: tuple[Tensor, ...]) -> Tensor:  # (B, L, D) each
        _, _, gate1, shift2, scale2, gate2 = chunks
        x = x + over_tokens(gate1, x) * self.attn.proj(attended)
        mixed: Tensor = self.mlp(modulate(self.norm2(x), shift2, scale2))
        return x + over_tokens(gate2, x) * mixed


class JointBlock(nn.Module):
    """Two streams that meet in attention alone (MM-DiT, Esser et al. 2024)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.text = Stream(spec)
        self.image = Stream(spec)

    def forward(self, words: Tensor, tokens: Tensor, c: Tensor, places: Places) -> tuple[Tensor, Tensor]:
        """words (B, T, D), tokens (B, L − T, D), c (B, D) → words, tokens."""
        on_text, on_image = self.text.modulation(c), self.image.modulation(c)
        both = zip(self.text.heads(words, on_text), self.image.heads(tokens, on_image), strict=True)
        q, k, v = (torch.cat(pair, dim=1) for pair in both)  # (B, L, h, D/h)
        q, k, v = (part.transpose(1, 2) for part in (places.turned(q), places.turned(k), v))
        attended = merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=places.bias.to(v.dtype)))
        count = words.shape[1]
        words = self.text.updated(words, attended[:, :count], on_text)
        return words, self.image.updated(tokens, attended[:, count:], on_image)


def joint_blocks(spec: ModelSpec, depth: int) -> nn.ModuleList:
    return nn.ModuleList(JointBlock(spec) for _ in range(depth))


def run_joint(
    blocks: Iterable[nn.Module], words: Tensor, tokens: Tensor, c: Tensor, places: Places
) -> tuple[Tensor, Tensor]:
    for block in blocks:
        words, tokens = block(words, tokens, c, places)
    return words, tokens

"""ELIT-MM-DiT: text and image tokens in separate streams with joint attention, as in Qwen-Image.

Without Read and Write it computes what `QwenImageTransformer2DModel` of diffusers 0.42 computes for one image. Text
runs through all blocks; only image tokens go through Read and Write. What the padding of the text holds changes
nothing. Of ELIT-Qwen-Image (arXiv 2603.12245) only the split 8-44-8 is published. The rest is our own reading:

- A latent has the rotary position of the spatial token at its slot of its group. The core thus uses the positions of
  the base model, and no position depends on the budget. Text keeps its positions in the core.
- Read is modulated by the embedding of t alone, as every block of Qwen-Image is; text reaches it through the tokens.
- Read and Write are those of the released ELIT-SiT, with its initialisation: at first they only add positions.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elit_export.errors import InputError
from elit_export.models.elit import Elit, expected_residual, signal_distance
from elit_export.models.interface import Read, Write, group, keep
from elit_export.models.layers import (
    RMS_QK_NORM_EPS,
    FinalLayer,
    Mlp,
    Modulation,
    StreamAttention,
    TimestepEmbedder,
    merge_heads,
    modulate,
    of_kind,
    over_tokens,
    plain_norm,
    qk_norm_of,
)
from elit_export.models.rope import JointPositions, joint_positions, joint_rope_tables
from elit_export.spec import MAX_TEXT_TOKENS, PIXELS, DataFacts, LayerKind, ModelSpec

THOUSANDTHS = 1000  # the units that Qwen-Image counts t in


class ElitMMDiT(Elit):
    """Head on text and spatial tokens, Read, core on text and the kept latents, Write, tail."""

    def __init__(self, spec: ModelSpec, data: DataFacts = PIXELS) -> None:
        super().__init__(spec, data)
        width, heads, patch = spec.hidden_size, spec.num_heads, spec.patch_size**2 * spec.in_channels
        self.img_in = of_kind(LayerKind.EMBEDDER, nn.Linear(patch, width))
        self.t_embedder = TimestepEmbedder(width, units=THOUSANDTHS)
        self.txt_norm = of_kind(LayerKind.NORM, nn.RMSNorm(spec.text_width, eps=RMS_QK_NORM_EPS))
        self.txt_in = of_kind(LayerKind.EMBEDDER, nn.Linear(spec.text_width, width))
        self.head = joint_blocks(spec, spec.head_depth)
        self.read = Read(width, heads, spec.grid, spec.group_size)
        self.core = joint_blocks(spec, spec.core_depth)
        self.write = Write(width, heads, spec.grid, spec.group_size)
        self.tail = joint_blocks(spec, spec.tail_depth)
        self.final = FinalLayer(width, patch)

    # the graphs

    def step(self, x: Tensor, t: Tensor, text: Tensor, text_mask: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Compute what `Elit.step` says; text (B, T, text_width), text_mask (B, T) int64: 1 is a token, 0 padding."""
        self.check_kept(latents)
        check_text(self.spec, text, text_mask)
        embedded, c = self.embed(x), self.t_embedder(t)  # (B, N, D), (B, D)
        spatial_positions, latent_positions = self.positions(text_mask, latents)
        txt = self.embed_text(text, text_mask)
        txt, img = run_joint(self.head, txt, embedded, c, spatial_positions)
        all_latents, patches, core_out = self.read_kept(img, c, latents)
        txt, core_out = run_joint(self.core, txt, core_out, c, latent_positions)  # (B, T, D), (B, G·K, D)
        img = self.write_kept(patches, core_out, all_latents, latents)
        _, img = run_joint(self.tail, txt, img, c, spatial_positions)
        return self.unpatchify(self.final(img, c)), img - embedded

    def probe(self, x: Tensor, t: Tensor, signal_prev: Tensor) -> tuple[Tensor, Tensor]:
        """Compute what `Elit.probe` says, of the image stream's input, which text has not reached yet."""
        signal = self.first_block.image.modulated(self.embed(x), self.t_embedder(t))
        return signal, signal_distance(signal, signal_prev)

    def reuse(self, x: Tensor, t: Tensor, residual: Tensor, residual_prev: Tensor, forecast: Tensor) -> Tensor:
        """Compute what `Elit.reuse` says; the effect of the text is part of the residual."""
        img = self.embed(x) + expected_residual(residual, residual_prev, forecast)
        return self.unpatchify(self.final(img, self.t_embedder(t)))

    # parts

    @property
    def first_block(self) -> JointBlock:
        block = next(iter([*self.head, *self.core, *self.tail]))
        assert isinstance(block, JointBlock)
        return block

    def embed(self, x: Tensor) -> Tensor:  # (B, C, H, W)
        n, p = self.spec.grid, self.spec.patch_size
        patches = x.unflatten(3, (n, p)).unflatten(2, (n, p)).permute(0, 2, 4, 1, 3, 5)  # (B, n, n, C, p, p)
        img: Tensor = self.img_in(patches.flatten(3).flatten(1, 2))
        return img  # (B, N, D)

    def embed_text(self, text: Tensor, text_mask: Tensor) -> Tensor:
        """Embed text (B, T, D). Padding is set to zero first, so that NaN in it does no harm."""
        txt: Tensor = self.txt_in(self.txt_norm(torch.where(text_mask[:, :, None] != 0, text, 0.0)))
        return txt

    def positions(self, text_mask: Tensor, kept: Tensor) -> tuple[JointPositions, JointPositions]:
        """Return the positions of text and spatial tokens, and of text and kept latents."""
        spatial, txt = joint_rope_tables(self.spec, kept.device)
        txt = txt[:, : text_mask.shape[1]]
        latent = keep(group(spatial, self.spec.grid, self.spec.group_size), kept)  # (2, G·K, D/h/2)
        return joint_positions(txt, spatial, text_mask), joint_positions(txt, latent, text_mask)

    def unpatchify(self, values: Tensor) -> Tensor:  # (B, N, C·p·p)
        n, p, channels = self.spec.grid, self.spec.patch_size, self.spec.in_channels
        values = values.unflatten(2, (channels, p, p)).unflatten(1, (n, n))  # (B, n, n, C, p, p)
        return values.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)  # (B, C, H, W)


def check_text(spec: ModelSpec, text: Tensor, text_mask: Tensor) -> None:
    """Raise InputError if text (B, T, text_width) and mask (B, T) do not fit each other or the model."""
    if text.ndim != 3 or text.shape[2] != spec.text_width or text.shape[1] > MAX_TEXT_TOKENS:
        raise InputError(f"text has shape {tuple(text.shape)}, must be (B, 1 to {MAX_TEXT_TOKENS}, {spec.text_width})")
    if text_mask.shape != text.shape[:2]:
        raise InputError(f"text_mask has shape {tuple(text_mask.shape)}, the text {tuple(text.shape[:2])} tokens")


# ---------------------------------------------------------------- blocks


class Stream(nn.Module):
    """The part of a block that each stream runs with weights of its own: everything except the attention."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        width = spec.hidden_size
        self.norm1 = plain_norm(width)
        self.attn = StreamAttention(width, spec.num_heads, qk_norm_of(spec))
        self.norm2 = plain_norm(width)
        self.mlp = Mlp(width, spec.mlp_size, bias=True)
        self.modulation = Modulation(width, chunks=6)

    def modulated(self, x: Tensor, c: Tensor) -> Tensor:  # (B, L, D), (B, D)
        """Return the input of attention."""
        return self._shifted(x, self.modulation(c))

    def _shifted(self, x: Tensor, chunks: tuple[Tensor, ...]) -> Tensor:
        shift1, scale1, *_ = chunks
        return modulate(self.norm1(x), shift1, scale1)

    def heads(self, x: Tensor, chunks: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values (B, L, h, D/h)."""
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

    def forward(self, txt: Tensor, img: Tensor, c: Tensor, positions: JointPositions) -> tuple[Tensor, Tensor]:
        """Run one block: txt (B, T, D), img (B, L − T, D), c (B, D) → txt, img."""
        on_text, on_image = self.text.modulation(c), self.image.modulation(c)
        both = zip(self.text.heads(txt, on_text), self.image.heads(img, on_image), strict=True)
        q, k, v = (torch.cat(pair, dim=1) for pair in both)  # (B, L, h, D/h)
        q, k, v = (part.transpose(1, 2) for part in (positions.apply_rope(q), positions.apply_rope(k), v))
        attended = merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=positions.bias.to(v.dtype)))
        count = txt.shape[1]
        txt = self.text.updated(txt, attended[:, :count], on_text)
        return txt, self.image.updated(img, attended[:, count:], on_image)


def joint_blocks(spec: ModelSpec, depth: int) -> nn.ModuleList:
    return nn.ModuleList(JointBlock(spec) for _ in range(depth))


def run_joint(
    blocks: Iterable[nn.Module], txt: Tensor, img: Tensor, c: Tensor, positions: JointPositions
) -> tuple[Tensor, Tensor]:
    for block in blocks:
        txt, img = block(txt, img, c, positions)
    return txt, img

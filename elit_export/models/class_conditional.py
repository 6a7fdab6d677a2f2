"""The base class of class-conditional models: embedders, Read, Write, final layer, and the methods that become graphs.

Follows the released ELIT-SiT checkpoints (arXiv 2603.12245); shapes as in `spec`.
"""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor, nn

from elit_export.models.elit import Elit, expected_residual, signal_distance
from elit_export.models.interface import Read, Write, group, keep
from elit_export.models.layers import (
    Block,
    FinalLayer,
    PatchEmbed,
    TimestepEmbedder,
    of_kind,
    sincos_position_embedding,
)
from elit_export.models.rope import RotaryEmbedding, rope_angles, rope_from_angles
from elit_export.spec import DataFacts, LayerKind, ModelSpec


class ClassConditional(Elit):
    """A model whose tokens are all modulated by the sum of the embeddings of t and of the label y.

    A subclass gives the core, and defines in `transform` how tokens go through all blocks.
    """

    def __init__(self, spec: ModelSpec, data: DataFacts, *, core: nn.ModuleList) -> None:
        super().__init__(spec, data)
        width, heads = spec.hidden_size, spec.num_heads
        self.patch_embed = PatchEmbed(spec.in_channels, spec.patch_size, width)
        self.pos_embed: Tensor
        self.register_buffer("pos_embed", sincos_position_embedding(spec.grid, width))
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = of_kind(LayerKind.TABLE, nn.Embedding(spec.num_classes + 1, width))
        self.head = blocks(spec, spec.head_depth)
        self.read = Read(width, heads, spec.grid, spec.group_size)
        self.core = core
        self.write = Write(width, heads, spec.grid, spec.group_size)
        self.tail = blocks(spec, spec.tail_depth)
        self.final = FinalLayer(width, spec.patch_size**2 * spec.in_channels)

    @abstractmethod
    def transform(self, tokens: Tensor, c: Tensor, kept: Tensor) -> Tensor:
        """Run all blocks, Read and Write: tokens (B, N, D), condition (B, D), kept = arange(K) → (B, N, D)."""

    # the graphs

    def step(self, x: Tensor, t: Tensor, y: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Compute what `Elit.step` says; y is (B,) int64."""
        self.check_kept(latents)
        embedded = self.patch_embed(x) + self.pos_embed  # (B, N, D)
        c = self.t_embedder(t) + self.y_embedder(y)  # (B, D)
        tokens = self.transform(embedded, c, latents)
        return self.unpatchify(self.final(tokens, c)), tokens - embedded

    def probe(self, x: Tensor, t: Tensor, y: Tensor, signal_prev: Tensor) -> tuple[Tensor, Tensor]:
        """Compute what `Elit.probe` says."""
        embedded = self.patch_embed(x) + self.pos_embed
        signal = self.first_block.modulated(embedded, self.t_embedder(t) + self.y_embedder(y))
        return signal, signal_distance(signal, signal_prev)

    def reuse(
        self, x: Tensor, t: Tensor, y: Tensor, residual: Tensor, residual_prev: Tensor, forecast: Tensor
    ) -> Tensor:
        """Compute what `Elit.reuse` says."""
        expected = expected_residual(residual, residual_prev, forecast)
        embedded = self.patch_embed(x) + self.pos_embed
        return self.unpatchify(self.final(embedded + expected, self.t_embedder(t) + self.y_embedder(y)))

    # parts

    @property
    def first_block(self) -> Block:
        block = next(iter([*self.head, *self.core, *self.tail]))
        assert isinstance(block, Block)
        return block

    def rotary_embeddings(self, kept: Tensor) -> tuple[RotaryEmbedding | None, RotaryEmbedding | None]:
        """Return RoPE for spatial tokens and for kept latents: a latent has the position of the token at its slot."""
        spec = self.spec
        if not spec.rope:
            return None, None
        angles = rope_angles(spec.grid, spec.hidden_size // spec.num_heads, kept.device)
        return rope_from_angles(angles), rope_from_angles(
            keep(group(angles[None], spec.grid, spec.group_size), kept)[0]
        )

    def unpatchify(self, values: Tensor) -> Tensor:  # (B, N, p·p·C)
        n, p, channels = self.spec.grid, self.spec.patch_size, self.spec.in_channels
        values = values.unflatten(2, (p, p, channels)).unflatten(1, (n, n))  # (B, n, n, p, p, C)
        return values.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # (B, C, H, W)


def blocks(spec: ModelSpec, depth: int, *, width_factor: int = 1) -> nn.ModuleList:
    return nn.ModuleList(Block(spec, width_factor=width_factor) for _ in range(depth))

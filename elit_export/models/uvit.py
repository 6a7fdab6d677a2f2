"""ELIT-U-ViT: ELIT-SiT with long skips, from each block of the first half to its mirror in the second.

Our reading of the paper (arXiv 2603.12245), whose U-ViT is unpublished. The output of block i is joined into the
input of block depth − 1 − i: concatenated, and brought back to the width by a linear layer (U-ViT, Bao et al. 2023).
Head and tail are equally deep, so that skips lead from spatial tokens to spatial tokens and from latents to latents,
as many as are kept. The two innermost blocks of an even core are neighbours and have no skip: with 13 joins for 28
blocks the published training FLOPs come out, with 14 they do not.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from elit_export.models.class_conditional import ClassConditional, blocks
from elit_export.models.layers import SkipProjection
from elit_export.models.registry import skipping_stages
from elit_export.models.rope import RotaryEmbedding
from elit_export.spec import PIXELS, DataFacts, ModelSpec


class ElitUViT(ClassConditional):
    """Head, Read, core on the kept latents, Write, tail, with skips inside the core and from head to tail."""

    def __init__(self, spec: ModelSpec, data: DataFacts = PIXELS) -> None:
        super().__init__(spec, data, core=blocks(spec, spec.core_depth))
        _, core, tail = skipping_stages(spec)
        self.core_joins, self.tail_joins = joins(spec, core.joins), joins(spec, tail.joins)

    def transform(self, tokens: Tensor, c: Tensor, kept: Tensor) -> Tensor:
        spatial, latent = self.rotations(kept)
        skips = run_and_keep(self.head, tokens, c, spatial)
        latents, patches, processed = self.read_kept(skips[-1], c, kept)
        processed = self._core(processed, c, latent)
        tokens = self.write_kept(patches, processed, latents, kept)
        return run_with_skips(self.tail, self.tail_joins, tokens, skips[1:], c, spatial)

    def _core(self, x: Tensor, c: Tensor, rotation: RotaryEmbedding | None) -> Tensor:  # (B, G·K, D)
        """First half, whose outputs are kept, the blocks without a skip, and the half that they are joined into."""
        pairs, depth = len(self.core_joins), len(self.core)
        skips = run_and_keep(self.core[:pairs], x, c, rotation)
        middle = run_and_keep(self.core[pairs : depth - pairs], skips[-1], c, rotation)[-1]
        return run_with_skips(self.core[depth - pairs :], self.core_joins, middle, skips[1:], c, rotation)


def joins(spec: ModelSpec, count: int) -> nn.ModuleList:
    return nn.ModuleList(SkipProjection(spec.hidden_size) for _ in range(count))


def run_and_keep(blocks: Iterable[nn.Module], x: Tensor, c: Tensor, rotation: RotaryEmbedding | None) -> list[Tensor]:
    """What goes in, then what comes out of each block."""
    seen = [x]
    for block in blocks:
        seen.append(block(seen[-1], c, rotation))
    return seen


def run_with_skips(
    blocks: Iterable[nn.Module],
    joins: Iterable[nn.Module],
    x: Tensor,
    skips: list[Tensor],
    c: Tensor,
    rotation: RotaryEmbedding | None,
) -> Tensor:
    """The last skip goes into the first block."""
    for block, join, skip in zip(blocks, joins, reversed(skips), strict=True):
        x = block(join(x, skip), c, rotation)
    return x

"""ELIT-U-ViT: ELIT-SiT with long skips, from each block of the first half to its counterpart in the second.

This is our reading of the paper (arXiv 2603.12245), whose U-ViT is unpublished. The output of block i is concatenated
with the input of block depth − 1 − i, and projected back to the width by a linear layer (U-ViT, Bao et al. 2023).
Head and tail are equally deep, so that skips lead from spatial tokens to spatial tokens and from kept latents to kept
latents. The two innermost blocks of an even core are neighbours and have no skip: 13 skips for 28 blocks reproduce the
published training FLOPs, 14 do not.
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
        self.core_joins = skip_projections(spec, core.joins)
        self.tail_joins = skip_projections(spec, tail.joins)

    def transform(self, tokens: Tensor, c: Tensor, kept: Tensor) -> Tensor:
        spatial_rope, latent_rope = self.rotary_embeddings(kept)
        skips = run_and_keep(self.head, tokens, c, spatial_rope)
        latents, patches, core_out = self.read_kept(skips[-1], c, kept)
        core_out = self._core(core_out, c, latent_rope)
        tokens = self.write_kept(patches, core_out, latents, kept)
        return run_with_skips(self.tail, self.tail_joins, tokens, skips[1:], c, spatial_rope)

    def _core(self, x: Tensor, c: Tensor, rope: RotaryEmbedding | None) -> Tensor:  # (B, G·K, D)
        """Run the first half and keep its outputs, then blocks without a skip, then the half that takes the skips."""
        pairs, depth = len(self.core_joins), len(self.core)
        skips = run_and_keep(self.core[:pairs], x, c, rope)
        middle = run_and_keep(self.core[pairs : depth - pairs], skips[-1], c, rope)[-1]
        return run_with_skips(self.core[depth - pairs :], self.core_joins, middle, skips[1:], c, rope)


def skip_projections(spec: ModelSpec, count: int) -> nn.ModuleList:
    return nn.ModuleList(SkipProjection(spec.hidden_size) for _ in range(count))


def run_and_keep(blocks: Iterable[nn.Module], x: Tensor, c: Tensor, rope: RotaryEmbedding | None) -> list[Tensor]:
    """Return the input of the first block, then the output of each block."""
    outputs = [x]
    for block in blocks:
        outputs.append(block(outputs[-1], c, rope))
    return outputs


def run_with_skips(
    blocks: Iterable[nn.Module],
    projections: Iterable[nn.Module],
    x: Tensor,
    skips: list[Tensor],
    c: Tensor,
    rope: RotaryEmbedding | None,
) -> Tensor:
    """Run the blocks, each with the skip of its counterpart: the last skip goes into the first block."""
    for block, project, skip in zip(blocks, projections, reversed(skips), strict=True):
        x = block(project(x, skip), c, rope)
    return x

"""ELIT-HDiT: an hourglass whose middle blocks run on a quarter of the latents, twice as wide.

Our reading of the paper (arXiv 2603.12245), whose HDiT is unpublished. Without an interface, a 2×2 of spatial tokens
is merged after block 8 of 28 and split again after block 20 (HDiT, Crowson et al. 2024). In ELIT that lies in the
core, where there are no pixels to stay next to: four latents of a group that follow each other, so of like
importance, become one, and a model keeps multiples of four. What splitting gives is added to the latents that were
merged, which needs no weights; it starts at zero. Heads keep their size, the wide blocks have twice as many, and the
condition stays as it is. Merged latents have no position of their own, so there is no `rope`.
"""

from __future__ import annotations

from torch import Tensor, nn

from elit_export.models.class_conditional import ClassConditional, blocks
from elit_export.models.layers import TokenMerge, TokenSplit, run_blocks
from elit_export.models.registry import merging_stages
from elit_export.spec import PIXELS, DataFacts, ModelSpec


class ElitHDiT(ClassConditional):
    """Head, Read, core (fine, merge, coarse, split, fine) on the kept latents, Write, tail."""

    def __init__(self, spec: ModelSpec, data: DataFacts = PIXELS) -> None:
        _, fine, coarse, *_ = merging_stages(spec)
        middle = blocks(spec, coarse.depth, widened=coarse.widened)
        core = nn.ModuleList([*blocks(spec, fine.depth), *middle, *blocks(spec, fine.depth)])
        super().__init__(spec, data, core=core)
        self.fine_depth = fine.depth
        self.merge = TokenMerge(spec.hidden_size, coarse.widened * spec.hidden_size, coarse.merged)
        self.split = TokenSplit(coarse.widened * spec.hidden_size, spec.hidden_size, coarse.merged)

    def transform(self, tokens: Tensor, c: Tensor, kept: Tensor) -> Tensor:
        latents, patches, processed = self.read_kept(run_blocks(self.head, tokens, c), c, kept)
        processed = self._core(processed, c)
        return run_blocks(self.tail, self.write_kept(patches, processed, latents, kept), c)

    def _core(self, x: Tensor, c: Tensor) -> Tensor:  # (B, G·K, D)
        start, end = self.fine_depth, len(self.core) - self.fine_depth
        x = run_blocks(self.core[:start], x, c)
        coarse = run_blocks(self.core[start:end], self.merge(x), c)  # (B, G·K/4, 2·D)
        return run_blocks(self.core[end:], x + self.split(coarse), c)

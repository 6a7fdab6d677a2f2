"""ELIT-HDiT: an hourglass whose middle blocks run on a quarter of the latents, twice as wide.

This is our reading of the paper (arXiv 2603.12245), whose HDiT is unpublished. Without Read and Write, a 2×2 square of
spatial tokens is merged after block 8 of 28 and split again after block 20 (HDiT, Crowson et al. 2024). In ELIT these
blocks lie in the core. There, four consecutive latents of a group, which are of similar importance, become one, and a
model keeps multiples of four. The output of the split is added to the latents before the merge; it starts at zero.
Heads keep their size, the wide blocks have twice as many, and the condition stays as it is. Merged latents have no
position of their own, so there is no `rope`.
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
        middle = blocks(spec, coarse.depth, width_factor=coarse.width_factor)
        core = nn.ModuleList([*blocks(spec, fine.depth), *middle, *blocks(spec, fine.depth)])
        super().__init__(spec, data, core=core)
        self.fine_depth = fine.depth
        self.merge = TokenMerge(spec.hidden_size, coarse.width_factor * spec.hidden_size, coarse.merged)
        self.split = TokenSplit(coarse.width_factor * spec.hidden_size, spec.hidden_size, coarse.merged)

    def transform(self, tokens: Tensor, c: Tensor, kept: Tensor) -> Tensor:
        latents, patches, core_out = self.read_kept(run_blocks(self.head, tokens, c), c, kept)
        core_out = self._core(core_out, c)
        return run_blocks(self.tail, self.write_kept(patches, core_out, latents, kept), c)

    def _core(self, x: Tensor, c: Tensor) -> Tensor:  # (B, G·K, D)
        start, end = self.fine_depth, len(self.core) - self.fine_depth
        x = run_blocks(self.core[:start], x, c)
        coarse = run_blocks(self.core[start:end], self.merge(x), c)  # (B, G·K/4, 2·D)
        return run_blocks(self.core[end:], x + self.split(coarse), c)

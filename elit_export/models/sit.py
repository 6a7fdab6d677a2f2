"""ELIT-SiT: a scalable interpolant transformer whose core runs on a variable number of latents.

Follows the released ELIT-SiT checkpoints (arXiv 2603.12245). With `rope` and the norm "rms" on queries and keys it is
the DiT that the paper trains. That one is unpublished, and this our reading of it: self-attention alone is rotated,
in the core by the position of the spatial token at a latent's slot, so that nothing depends on the budget; the fixed
position code stays beside it, as without, so that one switch changes one thing. Frequencies fall to 1 / 10 000 as those
of that code do, the pairs that are turned lie half a head apart, queries and keys are normed (eps 1e-6, as the other
norms) before they are turned: the usual choices, of which checkpoints would tell another.
"""

from __future__ import annotations

from torch import Tensor

from elit_export.models.class_conditional import ClassConditional, blocks
from elit_export.models.layers import run_blocks
from elit_export.spec import PIXELS, DataFacts, ModelSpec


class ElitSiT(ClassConditional):
    """Head, Read, core on the kept latents, Write, tail."""

    def __init__(self, spec: ModelSpec, data: DataFacts = PIXELS) -> None:
        super().__init__(spec, data, core=blocks(spec, spec.core_depth))

    def transform(self, tokens: Tensor, c: Tensor, kept: Tensor) -> Tensor:
        spatial, latent = self.rotations(kept)
        tokens = run_blocks(self.head, tokens, c, spatial)
        latents, patches, processed = self.read_kept(tokens, c, kept)
        processed = run_blocks(self.core, processed, c, latent)  # (B, G·K, D)
        return run_blocks(self.tail, self.write_kept(patches, processed, latents, kept), c, spatial)

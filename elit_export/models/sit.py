"""ELIT-SiT: a scalable interpolant transformer whose core runs on a variable number of latents.

It follows the released ELIT-SiT checkpoints (arXiv 2603.12245). With `rope` and the norm "rms" on queries and keys it
is the DiT that the paper trains. That one is unpublished; this is our reading of it:

- RoPE applies to self-attention alone. In the core a latent has the position of the spatial token at its slot, so that
  no position depends on the budget.
- The sin-cos positional embedding stays, so that `rope` changes nothing else.
- Frequencies fall to 1 / 10 000, as in the sin-cos embedding; the rotated pairs lie half a head apart; queries and keys
  are normed (eps 1e-6, as in the other norms) before they are rotated. These are the usual choices.
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
        spatial_rope, latent_rope = self.rotary_embeddings(kept)
        tokens = run_blocks(self.head, tokens, c, spatial_rope)
        latents, patches, core_out = self.read_kept(tokens, c, kept)
        core_out = run_blocks(self.core, core_out, c, latent_rope)  # (B, G·K, D)
        return run_blocks(self.tail, self.write_kept(patches, core_out, latents, kept), c, spatial_rope)

"""What every class-conditional ELIT model is around its blocks: embedders, final layer, and what graphs are made of.

Takes: a ModelSpec.  Gives: an abstract nn.Module.  May touch: nothing.  Knows nothing of: files, samplers.

Follows the released ELIT-SiT checkpoints (arXiv 2603.12245); shapes as in `spec`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from elit_export.errors import InputError
from elit_export.models.interface import Read, Write, group, keep, restore
from elit_export.models.layers import (
    Block,
    FinalLayer,
    Modulation,
    PatchEmbed,
    Rotation,
    Split,
    TimestepEmbedder,
    position_code,
    rotation_angles,
    rotation_of,
)
from elit_export.spec import DataFacts, ModelSpec, listed

INIT_STD = 0.02


class Elit(nn.Module, ABC):
    """Velocity of a flow from data (t=0) to noise (t=1), at any budget in `spec.budgets`.

    A backbone says what its core is, and how tokens go through all of it. A new model holds uninitialised weights: load
    some, or call `initialise`.
    """

    def __init__(self, spec: ModelSpec, data: DataFacts, *, core: nn.ModuleList) -> None:
        super().__init__()
        self.spec = spec
        self.data = data
        width, heads = spec.hidden_size, spec.num_heads
        self.patch_embed = PatchEmbed(spec.in_channels, spec.patch_size, width)
        self.pos_embed: Tensor
        self.register_buffer("pos_embed", position_code(spec.grid, width))
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = nn.Embedding(spec.num_classes + 1, width)
        self.head = blocks(spec, spec.head_depth)
        self.read = Read(width, heads, spec.grid, spec.group_size)
        self.core = core
        self.write = Write(width, heads, spec.grid, spec.group_size)
        self.tail = blocks(spec, spec.tail_depth)
        self.final = FinalLayer(width, spec.patch_size**2 * spec.in_channels)

    @abstractmethod
    def transform(self, tokens: Tensor, c: Tensor, kept: Tensor) -> Tensor:
        """All blocks, Read and Write: tokens (B, N, D), condition (B, D), kept = arange(K) → (B, N, D)."""

    # the graphs

    def forward(self, x: Tensor, t: Tensor, y: Tensor, latents: Tensor) -> Tensor:
        """x (B, C, H, W), t (B,), y (B,) int64, latents = arange(K) int64 → velocity (B, C, H, W)."""
        return self.step(x, t, y, latents)[0]

    def step(self, x: Tensor, t: Tensor, y: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        """forward, and the residual: tokens before the final layer minus tokens after the embedder (B, N, D)."""
        embedded = self.patch_embed(x) + self.pos_embed  # (B, N, D)
        c = self.t_embedder(t) + self.y_embedder(y)  # (B, D)
        tokens = self.transform(embedded, c, latents)
        return self.unpatchify(self.final(tokens, c)), tokens - embedded

    def probe(self, x: Tensor, t: Tensor, y: Tensor, signal_prev: Tensor) -> tuple[Tensor, Tensor]:
        """What step caching decides by: the modulated input of the first block, as TeaCache takes it.

        Gives it as `signal` (B, N, D), and how far it is from that of the step before, `distance` (B,):
        mean|signal − signal_prev| / mean|signal_prev|, infinite where signal_prev is zero.
        """
        embedded = self.patch_embed(x) + self.pos_embed
        signal = self.first_block.modulated(embedded, self.t_embedder(t) + self.y_embedder(y))
        distance = (signal - signal_prev).abs().mean((1, 2)) / signal_prev.abs().mean((1, 2))
        return signal, distance

    def reuse(
        self, x: Tensor, t: Tensor, y: Tensor, residual: Tensor, residual_prev: Tensor, forecast: Tensor
    ) -> Tensor:
        """The velocity with a residual (B, N, D) of earlier steps in place of all blocks.

        residual + forecast · (residual − residual_prev): forecast (B,) is 0 to take it as it is, or how many
        times the step between the two to go on.
        """
        expected = residual + forecast[:, None, None] * (residual - residual_prev)
        embedded = self.patch_embed(x) + self.pos_embed
        return self.unpatchify(self.final(embedded + expected, self.t_embedder(t) + self.y_embedder(y)))

    def time(self, t: Tensor) -> Tensor:
        """The embedding of t (B, D): how much it changes is known before sampling."""
        embedding: Tensor = self.t_embedder(t)
        return embedding

    # parts

    @property
    def first_block(self) -> Block:
        block = next(iter([*self.head, *self.core, *self.tail]))
        assert isinstance(block, Block)
        return block

    def read_kept(self, tokens: Tensor, c: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All latents and the patches (B, G, J, D) of spatial tokens, and the kept latents (B, G·K, D).

        Raises InputError for a number of latents that the backbone does not keep.
        """
        if kept.shape[0] % self.spec.merge:
            raise InputError(f"this model cannot keep {kept.shape[0]} latents: it runs {listed(self.spec.budgets)}")
        latents, patches = self.read(tokens, c)
        return latents, patches, keep(latents, kept)

    def write_kept(self, patches: Tensor, processed: Tensor, latents: Tensor, kept: Tensor) -> Tensor:
        """Spatial tokens (B, N, D); latents that were not kept are written as they were read."""
        tokens: Tensor = self.write(patches, restore(processed, latents, kept))
        return tokens

    def rotations(self, kept: Tensor) -> tuple[Rotation | None, Rotation | None]:
        """Positions of spatial tokens and of kept latents: a latent has that of the token at its slot."""
        spec = self.spec
        if not spec.rope:
            return None, None
        angles = rotation_angles(spec.grid, spec.hidden_size // spec.num_heads, kept.device)
        return rotation_of(angles), rotation_of(keep(group(angles[None], spec.grid, spec.group_size), kept)[0])

    def unpatchify(self, values: Tensor) -> Tensor:  # (B, N, p·p·C)
        n, p, channels = self.spec.grid, self.spec.patch_size, self.spec.in_channels
        values = values.unflatten(2, (p, p, channels)).unflatten(1, (n, n))  # (B, n, n, p, p, C)
        return values.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # (B, C, H, W)


def blocks(spec: ModelSpec, depth: int, *, widened: int = 1) -> nn.ModuleList:
    return nn.ModuleList(Block(spec, widened=widened) for _ in range(depth))


# ---------------------------------------------------------------- initialisation


def initialise(model: Elit, generator: torch.Generator) -> Elit:
    """Fill a new model as the ELIT authors do, from `generator` alone.

    Every adaLN, the final projection and what Write and Split add start at zero, so a fresh model hides
    most mistakes: never test parity with it.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            weight = module.weight.data
            nn.init.xavier_uniform_(weight.view(weight.shape[0], -1), generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    tables = (model.y_embedder.weight, model.read.query, model.read.pos_embed)
    for table in (*tables, model.read.latent_pos_embed, model.write.pos_embed):
        nn.init.normal_(table, std=INIT_STD, generator=generator)
    for layer in (model.t_embedder.mlp[0], model.t_embedder.mlp[2]):
        assert isinstance(layer, nn.Linear)
        nn.init.normal_(layer.weight, std=INIT_STD, generator=generator)
    for layer in _zero_layers(model):
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
    return model


def _zero_layers(model: Elit) -> Iterable[nn.Module]:
    adaptive = (module.linear for module in model.modules() if isinstance(module, Modulation))
    written = (model.write.attn.proj, model.write.mlp.fc2)
    splitting = (module.linear for module in model.modules() if isinstance(module, Split))
    return *adaptive, model.final.linear, *written, *splitting

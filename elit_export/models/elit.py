"""The base class of all ELIT models, whatever conditions them, and the initialisation of a new model.

Shapes as in `spec`. A method that is a graph takes the inputs of `spec.graph`, in that order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from elit_export.errors import InputError
from elit_export.models.interface import Read, Write, keep, restore
from elit_export.models.layers import FinalLayer, Modulation, TimestepEmbedder, TokenSplit
from elit_export.spec import DataFacts, ModelSpec, listed

INIT_STD = 0.02


class Elit(nn.Module, ABC):
    """A model of the velocity of a flow from data (t=0) to noise (t=1), at any budget in `spec.budgets`.

    A new model holds uninitialised weights: load some, or call `initialise`. Subclasses give the inputs of `step`,
    `probe` and `reuse` names of their own; callers here pass them by position.
    """

    t_embedder: TimestepEmbedder
    head: nn.ModuleList
    read: Read
    core: nn.ModuleList
    write: Write
    tail: nn.ModuleList
    final: FinalLayer

    def __init__(self, spec: ModelSpec, data: DataFacts) -> None:
        super().__init__()
        self.spec = spec
        self.data = data

    # the graphs

    @abstractmethod
    def step(self, x: Tensor, t: Tensor, *inputs: Any, **named: Any) -> tuple[Tensor, Tensor]:
        """Return the velocity (B, C, H, W) and the residual (B, N, D): tokens before the final layer minus the input.

        x (B, C, H, W), t (B,), then the conditioning, then latents = arange(K) int64.
        """

    @abstractmethod
    def probe(self, x: Tensor, t: Tensor, *inputs: Any, **named: Any) -> tuple[Tensor, Tensor]:
        """Return what step caching decides by: `signal` (B, N, D) and its `distance` (B,) from `signal_prev`.

        The signal is the modulated input of the first block, as in TeaCache. `signal_prev` is the last of the inputs.
        """

    @abstractmethod
    def reuse(self, x: Tensor, t: Tensor, *inputs: Any, **named: Any) -> Tensor:
        """Return the velocity with a residual of earlier steps in place of all blocks.

        The last of the inputs are residual, residual_prev (B, N, D) and forecast (B,): see `expected_residual`.
        """

    def forward(self, x: Tensor, t: Tensor, *inputs: Tensor) -> Tensor:
        """Return the velocity alone, from the inputs of `step`."""
        return self.step(x, t, *inputs)[0]

    def time(self, t: Tensor) -> Tensor:
        """Return the embedding of t (B, D). How much it changes at each step is known before sampling."""
        embedding: Tensor = self.t_embedder(t)
        return embedding

    # parts

    def check_kept(self, kept: Tensor) -> None:
        """Raise InputError for a number of latents that the model does not keep."""
        spec, count = self.spec, kept.shape[0]
        if count < 1 or count > spec.latents or count % spec.budget_step:
            raise InputError(f"this model cannot keep {count} latents: it runs {listed(spec.budgets)}")

    def read_kept(self, tokens: Tensor, c: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return all latents and the patches (B, G, J, D) of spatial tokens, and the kept latents (B, G·K, D)."""
        latents, patches = self.read(tokens, c)
        return latents, patches, keep(latents, kept)

    def write_kept(self, patches: Tensor, core_out: Tensor, latents: Tensor, kept: Tensor) -> Tensor:
        """Return spatial tokens (B, N, D). Latents that were not kept are written as they were read."""
        tokens: Tensor = self.write(patches, restore(core_out, latents, kept))
        return tokens


def signal_distance(signal: Tensor, signal_prev: Tensor) -> Tensor:
    """Return mean|signal − signal_prev| / mean|signal_prev| of each row (B,), infinite where signal_prev is zero."""
    return (signal - signal_prev).abs().mean((1, 2)) / signal_prev.abs().mean((1, 2))


def expected_residual(residual: Tensor, residual_prev: Tensor, forecast: Tensor) -> Tensor:
    """Return residual + forecast · (residual − residual_prev).

    forecast (B,) is 0 to take the residual as it is; 1 extrapolates by the step that lies between the two residuals.
    """
    return residual + forecast[:, None, None] * (residual - residual_prev)


# ---------------------------------------------------------------- initialisation


def initialise(model: Elit, generator: torch.Generator) -> Elit:
    """Fill a new model as the ELIT authors do, from `generator` alone.

    All adaLN layers, the final projection and what Write and TokenSplit add start at zero. A fresh model therefore
    hides most mistakes: never test parity with it.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            weight = module.weight.data
            nn.init.xavier_uniform_(weight.view(weight.shape[0], -1), generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    embedded = (module.weight for module in model.modules() if isinstance(module, nn.Embedding))
    read = model.read
    for table in (*embedded, read.query, read.pos_embed, read.latent_pos_embed, model.write.pos_embed):
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
    writing = (model.write.attn.proj, model.write.mlp.fc2)
    splitting = (module.linear for module in model.modules() if isinstance(module, TokenSplit))
    return *adaptive, model.final.linear, *writing, *splitting

"""A model whose large products run in half precision, the rest in float32.

Cast are the layers whose kind says so: `LayerKind.casts` in `spec.layers`, by layer in `cost.layers`. In float32 stay
the tokens between them, embedders, adaLN, every norm, the final layer, and the query projection of Read: a constant of
the network, rounded once after it is computed. OpenVINO casts by itself.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from elit_export.cost.layers import layers_of
from elit_export.models.elit import Elit
from elit_export.spec import Precision


def in_precision(model: Elit, precision: Precision) -> Elit:
    """The model itself for fp32, else a copy with rounded weights; the model given stays as it is."""
    if not precision.dtype:
        return model
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    rounded = copy.deepcopy(model, shared)
    for layer in layers_of(model.spec):
        if layer.kind.casts:
            _cast(rounded.get_submodule(layer.path), getattr(torch, precision.dtype))
    return rounded


def _cast(layer: nn.Module, dtype: torch.dtype) -> None:
    """New parameters, because the layer's own are shared."""
    for name, parameter in list(layer.named_parameters()):
        setattr(layer, name, nn.Parameter(parameter.detach().to(dtype), requires_grad=False))

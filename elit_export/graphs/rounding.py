"""Casts the large products of a model to half precision; the rest stays in float32.

`LayerKind.casts` in `spec.layers` decides by kind of layer, `cost.layers` lists the layers. Tokens between layers,
embedders, adaLN, norms, the final layer and the query projection of Read stay in float32; that projection is a constant
of the network, rounded once after it is computed. OpenVINO casts by itself.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from elit_export.cost.layers import layers_of
from elit_export.models.elit import Elit
from elit_export.spec import Precision


def in_precision(model: Elit, precision: Precision) -> Elit:
    """Return the model itself for fp32, else a copy with rounded weights; the argument is not changed."""
    if not precision.dtype:
        return model
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    rounded = copy.deepcopy(model, shared)
    for layer in layers_of(model.spec):
        if layer.kind.casts:
            _cast(rounded.get_submodule(layer.path), getattr(torch, precision.dtype))
    return rounded


def _cast(layer: nn.Module, dtype: torch.dtype) -> None:
    """Replace a layer's parameters by cast ones; its own are shared with the original model."""
    for name, parameter in list(layer.named_parameters()):
        setattr(layer, name, nn.Parameter(parameter.detach().to(dtype), requires_grad=False))

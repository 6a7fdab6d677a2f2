"""A model whose large products run in half precision, the rest in float32.

Takes: a float32 model.  Gives: another that shares all but the rounded weights.  May touch: nothing.

Rounded are the linear layers of attention and MLP, and with them attention itself, and those that join, merge and
split tokens. In float32 stay the tokens between them, patch, text and timestep embedders, adaLN, every norm, and the
final layer. So does the query projection of Read: it is a constant of the network, rounded once after it is computed.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from elit_export.models.elit import Elit
from elit_export.models.interface import CrossAttention
from elit_export.models.layers import Join, Merge, Mlp, SelfAttention, Split, StreamAttention
from elit_export.spec import Precision

DTYPES = {Precision.FP16: torch.float16, Precision.BF16: torch.bfloat16}
ROUNDED = (SelfAttention, StreamAttention, CrossAttention, Mlp, Join, Merge, Split)


def in_precision(model: Elit, precision: Precision) -> Elit:
    """The model itself for fp32, else a copy with rounded weights; the model given stays as it is."""
    if precision is Precision.FP32:
        return model
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    rounded = copy.deepcopy(model, shared)
    kept = rounded.read.attn.q_proj
    for module in rounded.modules():
        if isinstance(module, ROUNDED):
            for layer in module.children():
                if isinstance(layer, nn.Linear) and layer is not kept:
                    _round(layer, DTYPES[precision])
    return rounded


def _round(layer: nn.Linear, dtype: torch.dtype) -> None:
    """New parameters, because the layer's own are shared."""
    for name, parameter in list(layer.named_parameters()):
        setattr(layer, name, nn.Parameter(parameter.detach().to(dtype), requires_grad=False))

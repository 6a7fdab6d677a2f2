"""A model that computes in float32, whatever its weights are stored in.

Each weight is upcast when a layer uses it and dropped afterwards, so that a model of 20 billion bfloat16 weights
runs in the size of its files, 41 GB of memory that the system may drop, and not in 82 GB of its own.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from elit_export.models.elit import Elit


class Upcast(nn.Module):
    """A parametrization that returns the stored weight in float32."""

    def forward(self, stored: Tensor) -> Tensor:
        return stored.float()


def upcast_on_use(model: Elit) -> Elit:
    """Return the model itself if it is all float32, else a copy with the outputs of `model.float()` in less memory."""
    if _is_float32(model):
        return model
    upcast_model = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    for module in list(upcast_model.modules()):
        for name in [name for name, tensor in _own_tensors(module) if _is_narrow(tensor)]:
            parametrize.register_parametrization(module, name, Upcast(), unsafe=True)  # of another type, on purpose
    return upcast_model


def upcast_whole(model: Elit) -> Elit:
    """Return the model itself if it is all float32, else a copy with float32 weights, which is larger and faster."""
    if _is_float32(model):
        return model
    held = {id(tensor): tensor.detach() for tensor in (*model.parameters(), *model.buffers())}
    exact = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in held.items()}
    parameters = {id(parameter) for parameter in model.parameters()}
    return copy.deepcopy(
        model, {key: nn.Parameter(t, requires_grad=False) if key in parameters else t for key, t in exact.items()}
    )


def _is_float32(model: Elit) -> bool:
    return not any(_is_narrow(tensor) for tensor in (*model.parameters(), *model.buffers()))


def _is_narrow(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype is not torch.float32


def _own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]

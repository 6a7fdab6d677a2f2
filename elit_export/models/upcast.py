"""A model that computes in float32, whatever its weights are stored in.

Each weight is widened when a layer asks for it and forgotten afterwards, so that a model of 20 billion bfloat16 weights
runs in what its files take, 41 GB of memory that the system may drop, and not in 82 GB of its own.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from elit_export.models.elit import Elit


class Upcast(nn.Module):
    """A weight as what asks for it gets it."""

    def forward(self, stored: Tensor) -> Tensor:
        return stored.float()


def upcast_on_use(model: Elit) -> Elit:
    """The model itself if it is all float32, else a copy of its modules; it answers as `model.float()` would."""
    if _is_float32(model):
        return model
    widened = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    for module in list(widened.modules()):
        for name in [name for name, tensor in _own_tensors(module) if _is_narrow(tensor)]:
            parametrize.register_parametrization(module, name, Upcast(), unsafe=True)  # of another type, on purpose
    return widened


def upcast_whole(model: Elit) -> Elit:
    """The model itself if it is all float32, else a copy that holds its weights in float32, for what asks for speed."""
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

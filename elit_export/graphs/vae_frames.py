"""Reduces a decoder of videos to a single frame.

A causal convolution reads its own frame and earlier ones. Before the first frame there are only zeros, so only the last
time slice of its kernel matters: a two-dimensional convolution, with a third of the multiplications for a kernel of
three frames.
"""

from __future__ import annotations

import copy
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import IdentityEliminationPass
from onnxscript.rewriter import RewriteRule, RewriteRuleSet
from torch import Tensor, nn


def of_one_frame(module: nn.Module) -> nn.Module:
    """Copy a decoder for one frame (B, C, 1, H, W); its 3-D convolutions must be causal and keep the sides."""
    shared = {id(parameter): parameter for parameter in module.parameters()}
    copied = copy.deepcopy(module, shared)
    for parent in list(copied.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Conv3d):
                setattr(parent, name, _OneFrameConv(child))
            elif isinstance(child, nn.Upsample):
                _simplify(child)
    return copied


class _OneFrameConv(nn.Module):
    """The last time slice of a causal 3-D convolution, as a 2-D convolution."""

    def __init__(self, conv: nn.Conv3d) -> None:
        super().__init__()
        _, height, width = conv.kernel_size
        self.conv = nn.Conv2d(
            conv.in_channels,
            conv.out_channels,
            (height, width),
            padding=(height // 2, width // 2),
            device="meta",  # weights and bias are replaced
        )
        self.conv.weight = nn.Parameter(conv.weight[:, :, -1].contiguous(), requires_grad=False)
        self.conv.bias = conv.bias

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x.squeeze(2))
        return y.unsqueeze(2)


def _simplify(upsample: nn.Upsample) -> None:
    """Use `nearest` for `nearest-exact` by whole factors: they are equal, and only `nearest` is one node of ONNX."""
    factors = upsample.scale_factor if isinstance(upsample.scale_factor, tuple) else (upsample.scale_factor,)
    if upsample.mode == "nearest-exact" and all(factor and float(factor).is_integer() for factor in factors):
        upsample.mode = "nearest"


def join_frames(model: ir.Model) -> None:
    """Remove pairs of Unsqueeze and Squeeze of the time axis, at which OpenVINO loses names of inputs."""
    RewriteRuleSet([RewriteRule(_added_and_dropped, _as_it_was)]).apply_to_model(model)
    IdentityEliminationPass()(model)


def _added_and_dropped(op: Any, x: Any, axes: Any) -> Any:
    return op.Squeeze(op.Unsqueeze(x, axes), axes)


def _as_it_was(op: Any, x: Any, **_: Any) -> Any:
    return op.Identity(x)

"""A decoder of videos → the same for a single frame, without what other frames alone need.

A causal convolution looks at its own frame and at those before it. Before the first there are only zeros, so that of
its kernel only the last slice in time counts: a convolution in two dimensions, with a third of the multiplications
where a kernel spans three frames.
"""

from __future__ import annotations

import copy
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import IdentityEliminationPass
from onnxscript.rewriter import RewriteRule, RewriteRuleSet
from torch import Tensor, nn


def of_one_frame(module: nn.Module) -> nn.Module:
    """A copy whose 3-D convolutions, taken to be causal and to keep sides, work on one frame (B, C, 1, H, W)."""
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
    def __init__(self, conv: nn.Conv3d) -> None:
        super().__init__()
        _, height, width = conv.kernel_size
        self.conv = nn.Conv2d(
            conv.in_channels,
            conv.out_channels,
            (height, width),
            padding=(height // 2, width // 2),
            device="meta",  # what it would be filled with is replaced
        )
        self.conv.weight = nn.Parameter(conv.weight[:, :, -1].contiguous(), requires_grad=False)
        self.conv.bias = conv.bias

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x.squeeze(2))
        return y.unsqueeze(2)


def _simplify(upsample: nn.Upsample) -> None:
    """By whole factors `nearest-exact` and `nearest` are the same, and only the second is one node of ONNX."""
    factors = upsample.scale_factor if isinstance(upsample.scale_factor, tuple) else (upsample.scale_factor,)
    if upsample.mode == "nearest-exact" and all(factor and float(factor).is_integer() for factor in factors):
        upsample.mode = "nearest"


def join_frames(made: ir.Model) -> None:
    """Take out of a graph the axes of time that are added only to be dropped: OpenVINO loses names of inputs there."""
    RewriteRuleSet([RewriteRule(_added_and_dropped, _as_it_was)]).apply_to_model(made)
    IdentityEliminationPass()(made)


def _added_and_dropped(op: Any, x: Any, axes: Any) -> Any:
    return op.Squeeze(op.Unsqueeze(x, axes), axes)


def _as_it_was(op: Any, x: Any, **_: Any) -> Any:
    return op.Identity(x)

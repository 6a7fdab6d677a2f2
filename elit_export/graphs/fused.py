"""A whole cached step as one function, which computes or reuses in an ONNX `If`.

It decides as `runtime/residuals.py` does, in the same float32 arithmetic. Names of closure variables are part of the
exported graph: renaming one can change its bytes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from elit_export.models.elit import Elit
from elit_export.spec import FUSED, PROBE, REUSE, STEP


def fused(model: Elit, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Run a cached step with the inputs and outputs of `spec.graph("fused")`.

    `reused` counts consecutive reuses, −1 before the first computed step. Until two steps are computed the two
    `t_computed` are equal, and the residual is reused unchanged.
    """
    values = {tensor.name: value for tensor, value in zip(model.spec.graph(FUSED).inputs, inputs, strict=True)}

    def run(graph: str, **more: Tensor) -> Any:
        named = values | more
        return getattr(model, graph)(*(named[tensor.name] for tensor in model.spec.graph(graph).inputs))

    t, t_computed, t_computed_prev = (values[name] for name in ("t", "t_computed", "t_computed_prev"))
    residual, residual_prev, reused = (values[name] for name in ("residual", "residual_prev", "reused"))
    signal_next, distance = run(PROBE, signal_prev=values["signal"])
    accumulated = values["accumulated"] + polynomial(values["coefficients"], distance).clamp_min(0)
    is_covered = (distance >= values["low"]) & (distance <= values["high"])  # not so for NaN
    over = (~is_covered | ~(accumulated < values["threshold"])).any()  # also computes where the threshold is NaN
    compute = values["force"] | (reused < 0) | (reused >= values["most"]) | over

    span = t_computed - t_computed_prev
    is_level = (span == 0) | (values["order"] == 0)
    weight = torch.where(is_level, 0.0, (t - t_computed) / torch.where(span == 0, 1.0, span))

    is_first = reused < 0

    def computed() -> tuple[Tensor, Tensor, Tensor]:
        velocity, latest = run(STEP)
        latest = latest.contiguous()  # as in the other branch: torch requires equal strides of both
        return velocity, latest, torch.where(is_first, latest, residual)

    def forecast() -> tuple[Tensor, Tensor, Tensor]:
        return run(REUSE, forecast=weight), residual.clone(), residual_prev.clone()

    velocity, *residuals = torch.cond(compute, computed, forecast)
    times = (
        torch.where(compute, t, t_computed),
        torch.where(compute, torch.where(is_first, t, t_computed), t_computed_prev),
    )
    counts = torch.where(compute, 0.0, accumulated), torch.where(compute, 0, reused + 1)
    return velocity, compute, *residuals, signal_next, *times, *counts


def polynomial(coefficients: Tensor, at: Tensor) -> Tensor:
    """Evaluate a polynomial by Horner's scheme; `coefficients` start with the lowest power."""
    value = torch.zeros_like(at)
    for coefficient in reversed(coefficients.unbind()):
        value = value * at + coefficient
    return value

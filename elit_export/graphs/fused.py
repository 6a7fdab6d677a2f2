"""A whole cached step as one function: the choice between computing and reusing inside, as ONNX `If`.

Takes: a model, a step's inputs, what the step before left, the host's choices.  Gives: the velocity and
what the next step needs.  May touch: nothing.  Knows nothing of: calibrations, which are inputs.

It decides as `runtime/residuals.py` does, in the same float32 arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from elit_export.models.elit import Elit


def fused(
    model: Elit,
    x: Tensor,
    t: Tensor,
    y: Tensor,
    latents: Tensor,
    residual: Tensor,
    residual_prev: Tensor,
    signal: Tensor,
    t_computed: Tensor,
    t_computed_prev: Tensor,
    accumulated: Tensor,
    reused: Tensor,
    force: Tensor,
    threshold: Tensor,
    coefficients: Tensor,
    low: Tensor,
    high: Tensor,
    most: Tensor,
    order: Tensor,
) -> tuple[Tensor, ...]:
    """Shapes as in `spec.inputs_of("fused")`; gives what `spec.outputs_of("fused")` names.

    `reused` counts the reuses in a row, −1 before anything was computed. Until two steps were computed the two
    `t_computed` are equal, and the residual is taken as it is.
    """
    signal_next, distance = model.probe(x, t, y, signal)
    accumulated = accumulated + polynomial(coefficients, distance).clamp_min(0)
    is_covered = (distance >= low) & (distance <= high)  # not so for NaN
    over = (~is_covered | ~(accumulated < threshold)).any()  # computes too where the threshold is NaN
    compute = force | (reused < 0) | (reused >= most) | over

    span = t_computed - t_computed_prev
    is_level = (span == 0) | (order == 0)
    weight = torch.where(is_level, 0.0, (t - t_computed) / torch.where(span == 0, 1.0, span))

    is_first = reused < 0

    def computed() -> tuple[Tensor, Tensor, Tensor]:
        velocity, found = model.step(x, t, y, latents)
        found = found.contiguous()  # as what is reused is: torch wants both branches to lie in memory alike
        return velocity, found, torch.where(is_first, found, residual)

    def forecast() -> tuple[Tensor, Tensor, Tensor]:
        velocity = model.reuse(x, t, y, residual, residual_prev, weight)
        return velocity, residual.clone(), residual_prev.clone()

    velocity, *residuals = torch.cond(compute, computed, forecast)
    times = (
        torch.where(compute, t, t_computed),
        torch.where(compute, torch.where(is_first, t, t_computed), t_computed_prev),
    )
    counts = torch.where(compute, 0.0, accumulated), torch.where(compute, 0, reused + 1)
    return velocity, compute, *residuals, signal_next, *times, *counts


def polynomial(coefficients: Tensor, at: Tensor) -> Tensor:
    """Horner's scheme, the lowest power first in `coefficients`."""
    value = torch.zeros_like(at)
    for coefficient in reversed(coefficients.unbind()):
        value = value * at + coefficient
    return value

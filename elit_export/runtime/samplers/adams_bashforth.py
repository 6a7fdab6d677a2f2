"""Adams–Bashforth of order 2 and 3 with variable steps: one evaluation a step, reusing the last ones.

The velocity is interpolated by a polynomial through the last evaluations and integrated over the
step. With r = h/h_prev, order 2 is v̂ = (1 + r/2)·v − (r/2)·v_prev. The first steps use the order
their history allows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from elit_export.runtime.samplers.base import Float64, Noise, Velocity


def ab2(velocity: Velocity, x: Float64, times: Float64, _noise: Noise) -> Iterator[Float64]:
    return adams_bashforth(velocity, x, times, order=2)


def ab3(velocity: Velocity, x: Float64, times: Float64, _noise: Noise) -> Iterator[Float64]:
    return adams_bashforth(velocity, x, times, order=3)


def adams_bashforth(velocity: Velocity, x: Float64, times: Float64, *, order: int) -> Iterator[Float64]:
    history: list[tuple[float, Float64]] = []  # (t, v), latest first
    for step, (t, t_next) in enumerate(pairwise(times)):
        history = [(t, velocity(x, t, step)), *history[: order - 1]]
        weights = integration_weights([past for past, _ in history], t, t_next)
        x = x + sum(weight * v for weight, (_, v) in zip(weights, history, strict=True))
        yield x


def integration_weights(nodes: Sequence[float], start: float, end: float) -> Float64:
    """Weights w with ∫ p dt from start to end = Σ wᵢ·p(nodeᵢ), for every polynomial p the nodes determine."""
    h = end - start
    offsets = (np.asarray(nodes) - start) / h
    powers = np.arange(len(nodes))
    moments = 1.0 / (powers + 1)  # of 1, s, s², … over [0, 1]
    return np.asarray(h * np.linalg.solve(offsets[None, :] ** powers[:, None], moments), np.float64)

"""Adams–Bashforth of order 2 and 3 with variable steps: one evaluation a step, reusing the last ones.

The velocity is interpolated by a polynomial through the last evaluations and integrated over the
step. With r = h/h_prev, order 2 is v̂ = (1 + r/2)·v − (r/2)·v_prev. Until there is a history, the
order is lower; order 3 would be lost to a first step by Euler, so that step is Heun's, one call more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from elit_export.runtime.samplers.base import Float64, Noise, Velocity


def ab2(velocity: Velocity, x: Float64, times: Float64, _noise: Noise) -> Iterator[Float64]:
    history: list[tuple[float, Float64]] = []
    for step, (t, t_next) in enumerate(pairwise(times)):
        history = [(t, velocity(x, t, step)), *history[:1]]
        x = x + integral(history, t_next)
        yield x


def ab3(velocity: Velocity, x: Float64, times: Float64, _noise: Noise) -> Iterator[Float64]:
    history: list[tuple[float, Float64]] = []
    for step, (t, t_next) in enumerate(pairwise(times)):
        history = [(t, velocity(x, t, step)), *history[:2]]
        if step == 0:
            v = history[0][1]
            v_next = velocity(x + (t_next - t) * v, t_next, step)
            x = x + (t_next - t) * (v + v_next) / 2
        else:
            x = x + integral(history, t_next)
        yield x


def integral(history: Sequence[tuple[float, Float64]], end: float) -> Float64:
    """∫ v dt from the latest time in `history` (t, v), which comes first, to `end`."""
    times = [t for t, _ in history]
    weights = integration_weights(times, times[0], end)
    return np.asarray(sum(weight * v for weight, (_, v) in zip(weights, history, strict=True)), np.float64)


def integration_weights(nodes: Sequence[float], start: float, end: float) -> Float64:
    """Weights w with ∫ p dt from start to end = Σ wᵢ·p(nodeᵢ), for every polynomial p the nodes determine."""
    h = end - start
    offsets = (np.asarray(nodes) - start) / h
    powers = np.arange(len(nodes))
    moments = 1.0 / (powers + 1)  # of 1, s, s², … over [0, 1]
    return np.asarray(h * np.linalg.solve(offsets[None, :] ** powers[:, None], moments), np.float64)

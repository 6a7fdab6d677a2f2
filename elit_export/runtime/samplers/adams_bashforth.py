"""Adams–Bashforth of order 2 and 3 with variable steps: one evaluation per step, and the last ones again.

The velocity is interpolated by a polynomial through the last evaluations and integrated over the
step. With r = h/h_prev, order 2 is v̂ = (1 + r/2)·v − (r/2)·v_prev. The first steps, without history,
have a lower order. A first step by Euler would spoil order 3, so `ab3` begins with one of Heun: one more call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from elit_export.arrays import Float64
from elit_export.runtime.samplers.base import Noise, Sampler, Velocity


def ab2(velocity: Velocity, x: Float64, times: Float64, _noise: Noise) -> Iterator[Float64]:
    history: list[Float64] = []
    for step, weights in enumerate(step_weights(times, order=2)):
        history = [velocity(x, times[step], step, 0), *history[:1]]
        x = x + weighted(history, weights)
        yield x


def ab3(velocity: Velocity, x: Float64, times: Float64, _noise: Noise) -> Iterator[Float64]:
    history: list[Float64] = []
    for step, weights in enumerate(step_weights(times, order=3)):
        t, t_next = times[step], times[step + 1]
        history = [velocity(x, t, step, 0), *history[:2]]
        if step == 0:
            v_next = velocity(x + (t_next - t) * history[0], t_next, step, 1)
            x = x + (t_next - t) * (history[0] + v_next) / 2
        else:
            x = x + weighted(history, weights)
        yield x


def weighted(history: Sequence[Float64], weights: Float64) -> Float64:
    total: Float64 = weights[0] * history[0]
    for weight, v in zip(weights[1:], history[1:], strict=True):
        total += weight * v
    return total


def step_weights(times: Float64, *, order: int) -> list[Float64]:
    """Return the weights of each step for its last `order` evaluations (fewer at the start), the latest first."""
    steps = len(times) - 1
    starting = [
        integration_weights(times[step::-1], times[step], times[step + 1]) for step in range(min(order - 1, steps))
    ]
    if steps < order:
        return starting
    later = np.arange(order - 1, steps)
    nodes = times[later[:, None] - np.arange(order)]  # (steps, order), the latest first
    return [*starting, *integration_weights(nodes, times[later], times[later + 1])]


def integration_weights(nodes: npt.ArrayLike, start: npt.ArrayLike, end: npt.ArrayLike) -> Float64:
    """Return weights w with ∫ p dt from start to end = Σ wᵢ·p(nodeᵢ), for all polynomials p that the nodes determine.

    nodes (..., n), start and end (...) → (..., n).
    """
    nodes, start, h = np.asarray(nodes), np.asarray(start), np.asarray(end) - np.asarray(start)
    offsets = (nodes - start[..., None]) / h[..., None]
    powers = np.arange(nodes.shape[-1])
    moments = 1.0 / (powers[:, None] + 1)  # of 1, s, s², … over [0, 1]
    solved = np.linalg.solve(
        offsets[..., None, :] ** powers[:, None], np.broadcast_to(moments, (*h.shape, *moments.shape))
    )
    return np.asarray(h[..., None] * solved[..., 0], np.float64)


def ab3_nodes(step: int, _steps: int) -> tuple[float, ...]:
    return (0.0, 1.0) if step == 0 else (0.0,)


AB2 = Sampler("ab2", ab2, accuracy=2)
AB3 = Sampler("ab3", ab3, accuracy=3, nodes=ab3_nodes)

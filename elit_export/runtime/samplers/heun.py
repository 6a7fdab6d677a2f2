"""Heun's method, order 2: two evaluations a step, one on the last (as the reference sampler)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from elit_export.arrays import Float64
from elit_export.runtime.samplers.base import Noise, Sampler, Velocity


def heun(velocity: Velocity, x: Float64, times: Float64, _noise: Noise) -> Iterator[Float64]:
    last = len(times) - 2
    for step, (t, t_next) in enumerate(pairwise(times)):
        v = velocity(x, t, step, 0)
        if step < last:
            v = (v + velocity(x + (t_next - t) * v, t_next, step, 1)) / 2
        x = x + (t_next - t) * v
        yield x


def heun_nodes(step: int, steps: int) -> tuple[float, ...]:
    return (0.0, 1.0) if step < steps - 1 else (0.0,)


HEUN = Sampler("heun", heun, accuracy=2, nodes=heun_nodes)

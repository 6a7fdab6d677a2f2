"""Euler's method, order 1."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from elit_export.arrays import Float64
from elit_export.runtime.samplers.base import Noise, Sampler, Velocity


def euler(velocity: Velocity, x: Float64, times: Float64, _noise: Noise) -> Iterator[Float64]:
    for step, (t, t_next) in enumerate(pairwise(times)):
        x = x + (t_next - t) * velocity(x, t, step, 0)
        yield x


EULER = Sampler("euler", euler, accuracy=1)

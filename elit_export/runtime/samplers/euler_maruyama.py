"""Euler–Maruyama for the reverse SDE with diffusion w = 2t, as the reference sampler.

    dx = (v − ½·w·score)·dt + √w·dW,   score = (−(1−t)·v − x) / (t² + (1−t)·t)   (linear path)

The grid stops at t = 0.04, where the score is still well conditioned; the last step to 0 adds no noise.
The drift is affine in v, so combining velocities or combining drifts gives the same guidance.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from elit_export.arrays import Float64
from elit_export.runtime.samplers.base import Noise, Sampler, Velocity

LAST_NOISY_TIME = 0.04


def sde_times(steps: int) -> Float64:
    """Return `steps` times from 1 to 0.04, then 0."""
    return np.append(np.linspace(1.0, LAST_NOISY_TIME, steps), 0.0)


def euler_maruyama(velocity: Velocity, x: Float64, times: Float64, noise: Noise) -> Iterator[Float64]:
    last = len(times) - 2
    for step, (t, t_next) in enumerate(pairwise(times)):
        h = t_next - t
        v = velocity(x, t, step, 0)
        score = (-(1 - t) * v - x) / (t**2 + (1 - t) * t)
        diffusion = 2 * t
        x = x + h * (v - 0.5 * diffusion * score)
        if step < last:
            x = x + np.sqrt(diffusion) * noise() * np.sqrt(abs(h))
        yield x


EULER_MARUYAMA = Sampler("euler-maruyama", euler_maruyama, accuracy=1, min_steps=2, uses_noise=True, times=sde_times)

"""DPM-Solver++(2M) (Lu et al. 2022) on the linear path: multistep on the predicted data x − t·v.

With α = 1 − t, σ = t and λ = log(α/σ), one evaluation a step. λ is infinite at both ends of the
path, so the first and the last step are of order 1; the last one lands on the predicted data.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from elit_export.runtime.samplers.base import Float64, Noise, Velocity


def dpmpp_2m(velocity: Velocity, x: Float64, times: Float64, _noise: Noise) -> Iterator[Float64]:
    previous: Float64 | None = None
    h_previous = np.inf
    for step, (t, t_next) in enumerate(pairwise(times)):
        data = x - t * velocity(x, t, step)
        h = _log_snr(t_next) - _log_snr(t)
        estimate = data
        if previous is not None and np.isfinite(h) and np.isfinite(h_previous):
            estimate = data + (h / (2 * h_previous)) * (data - previous)
        shrink = t_next / t
        x = shrink * x + ((1 - t_next) - shrink * (1 - t)) * estimate
        previous, h_previous = data, h
        yield x


def _log_snr(t: float) -> float:
    with np.errstate(divide="ignore"):
        return float(np.log(1 - t) - np.log(t))

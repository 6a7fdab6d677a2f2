"""UniPC for flow matching (bh2, data prediction): a predictor, and a corrector that costs no evaluation.

    x = (1 − t)·data + t·noise, so data = x − t·v, α = 1 − t, σ = t, λ = log(α/σ)
    x_next = (t_next/t)·x + α_next · ∫ h·exp((s − 1)·h)·data(λ + s·h) ds over [0, 1], h = λ_next − λ

The data is interpolated by a polynomial in λ through its last predictions. The corrector does the last step again with
the prediction at its end. As in the paper (arXiv 2302.04867) and in diffusers' UniPCMultistepScheduler, two predictions
are weighted by (1 − exp(−h))/2 in place of the exact integral, and the last step takes one: at t = 0, where λ is
infinite, x becomes the predicted data.

At t = 1 λ is −∞. As in diffusers, σ there is 1 − 1e-6; the velocity is evaluated at t = 1 itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from elit_export.arrays import Float64
from elit_export.runtime.samplers.adams_bashforth import weighted
from elit_export.runtime.samplers.base import Noise, Run, Sampler, Velocity

MAX_SIGMA = 1 - 1e-6
QUADRATURE = np.polynomial.legendre.leggauss(12)  # exact to rounding for h up to 1


def unipc(order: int) -> Run:
    """Return UniPC with a predictor of this order."""

    def run(velocity: Velocity, x: Float64, times: Float64, _noise: Noise) -> Iterator[Float64]:
        sigmas, steps = np.minimum(times, MAX_SIGMA), len(times) - 1
        history: list[Float64] = []  # predictions of the data, the latest first
        start, used = x, 0  # the state where the last step began, and the predictions that it used
        for step in range(steps):
            known = sigmas[step::-1]
            history = [x - sigmas[step] * velocity(x, times[step], step, 0), *history[:order]]
            if step > 0:
                x = stepped(start, history[: used + 1], known, known[1], known[0])
            start, used = x, min(order, step + 1, steps - step)
            x = stepped(start, history[:used], known, known[0], sigmas[step + 1])
            yield x

    return run


def stepped(x: Float64, data: Sequence[Float64], sigmas: Float64, start: float, end: float) -> Float64:
    """Step from σ = start to σ = end by predictions of the data, which were made at the first of `sigmas`."""
    weights = data_weights(sigmas[: len(data)], start, end)
    return (end / start) * x + (1 - end) * weighted(data, weights)


def data_weights(sigmas: Float64, start: float, end: float) -> Float64:
    """Return the weight of each prediction in the integral over the step; they sum to 1 − exp(−h)."""
    with np.errstate(divide="ignore"):  # λ is infinite at t = 0
        first, last = log_snr(np.array([start, end]))
    moments = exponential_moments(last - first, len(sigmas))
    if len(sigmas) == 2:
        moments[1] = moments[0] / 2
    places = (log_snr(sigmas) - first) / (last - first)
    weights: Float64 = np.linalg.solve(places ** np.arange(len(sigmas))[:, None], moments)
    return weights


def log_snr(sigmas: Float64) -> Float64:
    """Return λ."""
    snr: Float64 = np.log1p(-sigmas) - np.log(sigmas)
    return snr


def exponential_moments(h: float, count: int) -> Float64:
    """Return ∫ h·exp((s − 1)·h)·sʲ ds over [0, 1] for j < count; h may be infinite."""
    if h < 1:  # where the recursion below would subtract nearly equal numbers
        nodes, shares = (QUADRATURE[0] + 1) / 2, QUADRATURE[1] / 2
        return np.asarray(nodes ** np.arange(count)[:, None] @ (shares * h * np.exp((nodes - 1) * h)), np.float64)
    moments = [-np.expm1(-h)]
    for power in range(1, count):
        moments.append(1 - power / h * moments[-1])
    return np.array(moments)


UNIPC = Sampler("unipc", unipc(order=2), accuracy=2)

"""Adams–Bashforth–Moulton of order 3 with variable steps: each step is corrected once its velocity is known, for free.

The predictor is that of `ab2`. When the velocity at its end is known, the step is done again by the polynomial through
it and the last two (Adams–Moulton), and the next step starts there. The states that are yielded are predictions, and so
the last step is not corrected. The first step is Euler's, corrected by the trapezoidal rule; that of `ab3` costs one
evaluation more.

The first steps, of a lower order, are shorter than the rest. The shares were measured (docs/benchmarks.md).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from elit_export.arrays import Float64
from elit_export.runtime.samplers.adams_bashforth import integration_weights, step_weights, weighted
from elit_export.runtime.samplers.base import Noise, Sampler, Velocity

FIRST_STEPS = (0.5, 0.7, 0.9)  # shares of a later step


def abm3(velocity: Velocity, x: Float64, times: Float64, _noise: Noise) -> Iterator[Float64]:
    start, history = x, list[Float64]()  # the state where the last step began, and velocities, the latest first
    for step, weights in enumerate(step_weights(times, order=2)):
        history = [velocity(x, times[step], step, 0), *history[:2]]
        if step > 0:
            start = start + weighted(history, corrector_weights(times, step))
        x = start + weighted(history[:2], weights)
        yield x


def corrector_weights(times: Float64, step: int) -> Float64:
    """Return the weights of the last three velocities (two at the start), that of `step` first, for the step before."""
    return integration_weights(times[max(step - 2, 0) : step + 1][::-1], times[step - 1], times[step])


def short_start(steps: int) -> Float64:
    """Return steps + 1 times from 1 to 0, evenly spaced but for the first steps."""
    shares = np.ones(steps)
    shares[: len(FIRST_STEPS)] = FIRST_STEPS[:steps]
    left = np.append(np.cumsum(shares[::-1])[::-1], 0.0)
    return np.asarray(left / left[0], np.float64)


ABM3 = Sampler("abm3", abm3, accuracy=3, times=short_start)

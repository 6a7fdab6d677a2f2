"""UniPC against diffusers' scheduler of that name, and its weights against their integrals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler

from elit_export.runtime.samplers.base import even_times
from elit_export.runtime.samplers.unipc import MAX_SIGMA, UNIPC, data_weights, exponential_moments, log_snr, unipc
from elit_export.runtime.timegrid import warp
from tests.runtime.test_samplers import START, Floats, mixture_flow, mixture_velocity, no_noise


def by_diffusers(times: Floats, order: int) -> tuple[Floats, Floats]:
    """The sample, and the times that the scheduler made of these: float32, 1 - 1e-6 in place of 1."""
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=order)
    scheduler.set_timesteps(sigmas=times[:-1].copy())
    x = torch.tensor(START)[:, None]
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas.double().numpy(), strict=False):
        velocity = torch.tensor(mixture_velocity(x[:, 0].numpy(), sigma))
        x = scheduler.step(velocity[:, None], t, x).prev_sample
    return x[:, 0].numpy(), scheduler.sigmas.double().numpy()


def relative(actual: Floats, expected: Floats) -> float:
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("grid", ["linear", "shift:3"])
@pytest.mark.parametrize("steps", [1, 2, 3, 8, 14])
@pytest.mark.parametrize("order", [2, 3])
def test_it_is_diffusers_unipc(order: int, steps: int, grid: str) -> None:
    expected, times = by_diffusers(warp(even_times(steps), grid), order)
    *_, found = unipc(order)(mixture_velocity, START, times, no_noise)
    assert relative(found, expected) <= 1e-5


def test_from_t_1_it_is_diffusers_unipc_too() -> None:
    """There the velocity is evaluated at 1 itself, not at 1 - 1e-6."""
    expected, times = by_diffusers(even_times(8), order=2)
    assert times[0] < 1
    *_, found = UNIPC.run(mixture_velocity, START, even_times(8), no_noise)
    assert relative(found, expected) <= 1e-5


def test_at_t_0_the_sample_is_the_predicted_data() -> None:
    times = np.array([0.9, 0.5, 0.2, 0.0])
    *_, before, end = UNIPC.run(mixture_velocity, START, times, no_noise)
    assert np.isfinite(end).all()
    assert np.allclose(end, before - 0.2 * mixture_velocity(before, 0.2), rtol=0, atol=1e-15)


@pytest.mark.parametrize("times", [[0.9, 0.6, 0.3, 0.1], [0.97, 0.9, 0.2, 0.0]])
def test_constant_data_is_exact(times: list[float]) -> None:
    data = np.linspace(-1, 1, 5)
    for t, x in zip(
        times[1:], UNIPC.run(lambda x, t, *_: (x - data) / t, START, np.array(times), no_noise), strict=True
    ):
        noise = (START - (1 - times[0]) * data) / times[0]
        assert np.allclose(x, (1 - t) * data + t * noise, rtol=0, atol=1e-14)


def test_a_first_step_from_noise_is_eulers() -> None:
    first, *_ = UNIPC.run(mixture_velocity, START, np.array([1.0, 0.4, 0.0]), no_noise)
    assert np.allclose(first, START - 0.6 * mixture_velocity(START, 1.0), rtol=0, atol=3e-6)


def test_the_end_of_the_flow_is_reached() -> None:
    *_, end = UNIPC.run(mixture_velocity, START, even_times(100), no_noise)
    assert np.allclose(end, mixture_flow(START, 1.0, 0.0), rtol=0, atol=1e-3)


@pytest.mark.parametrize("h", [1e-4, 0.03, 0.999, 1.0, 7.0, 40.0])
def test_moments_are_their_integrals(h: float) -> None:
    nodes, shares = np.polynomial.legendre.leggauss(200)
    s = (nodes + 1) / 2
    expected = [float(shares @ (h * np.exp((s - 1) * h) * s**power)) / 2 for power in range(4)]
    assert exponential_moments(h, 4) == pytest.approx(expected, rel=1e-12)


def test_moments_of_an_infinite_step_are_those_of_its_end() -> None:
    assert exponential_moments(math.inf, 3).tolist() == [1, 1, 1]


def test_weights_are_exact_for_polynomials_in_the_log_snr() -> None:
    sigmas, start, end = np.array([0.3, 0.5, 0.8]), 0.5, 0.3
    h = float(log_snr(np.array(end)) - log_snr(np.array(start)))
    nodes, shares = np.polynomial.legendre.leggauss(40)
    s = (nodes + 1) / 2
    for power in range(3):
        exact = shares @ (h * np.exp((s - 1) * h) * (log_snr(np.array(start)) + s * h) ** power) / 2
        assert data_weights(sigmas, start, end) @ log_snr(sigmas) ** power == pytest.approx(exact, rel=1e-12)


def test_two_predictions_are_weighted_as_the_paper_does() -> None:
    """By half of 1 - exp(-h) for their slope, where the exact moment is 1 - (1 - exp(-h))/h."""
    weights = data_weights(np.array([0.3, 0.5]), 0.5, 0.3)
    h = math.log(0.7 / 0.3)
    assert weights == pytest.approx([-math.expm1(-h) / 2] * 2, rel=1e-12)


def test_the_noise_end_of_the_log_snr_is_finite() -> None:
    assert np.isfinite(log_snr(np.array(MAX_SIGMA)))

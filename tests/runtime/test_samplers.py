"""Samplers against flows whose end is known.

The main flow is that of data drawn from two Gaussians in one dimension. Its velocity is not linear in x, and in one
dimension a flow keeps quantiles, so where x at t = a arrives at t = b follows from the two distribution functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elit_export.errors import InputError
from elit_export.runtime.samplers import SAMPLERS, sampler_named
from elit_export.runtime.samplers.adams_bashforth import integration_weights, step_weights, weighted
from elit_export.runtime.samplers.base import Evaluation, Sampler, Velocity
from elit_export.runtime.samplers.euler_maruyama import sde_times

Floats = npt.NDArray[np.float64]
START = np.array([-1.7, -0.6, 0.1, 0.9, 1.6])

# ---------------------------------------------------------------- two Gaussians

SHARES, MEANS, DEVIATIONS = np.array([0.3, 0.7]), np.array([-1.0, 0.8]), np.array([0.6, 0.4])
erf = np.vectorize(math.erf)


def variances(t: float) -> Floats:
    return (1 - t) ** 2 * DEVIATIONS**2 + t**2


def mixture_velocity(x: Floats, t: float, _step: int = 0, _stage: int = 0) -> Floats:
    """E[noise − data | x] for x = (1−t)·data + t·noise."""
    variance, distance = variances(t), x[:, None] - (1 - t) * MEANS
    likelihood = SHARES * np.exp(-(distance**2) / (2 * variance)) / np.sqrt(variance)
    posterior = likelihood / likelihood.sum(axis=1, keepdims=True)
    each = -MEANS + (t - (1 - t) * DEVIATIONS**2) / variance * distance
    return np.asarray((posterior * each).sum(axis=1))


def mixture_quantile(x: Floats, t: float) -> Floats:
    z = (x[:, None] - (1 - t) * MEANS) / np.sqrt(2 * variances(t))
    return np.asarray((SHARES * (1 + erf(z)) / 2).sum(axis=1))


def mixture_flow(x: Floats, start: float, end: float) -> Floats:
    """Where x at t = start arrives at t = end: the x of the same quantile, by bisection."""
    wanted = mixture_quantile(x, start)
    low, high = np.full_like(x, -10.0), np.full_like(x, 10.0)
    for _ in range(60):
        middle = (low + high) / 2
        below = mixture_quantile(middle, end) < wanted
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return (low + high) / 2


# ---------------------------------------------------------------- running


def no_noise() -> Floats:
    raise AssertionError("a deterministic sampler drew noise")


def states(name: str, velocity: Velocity, times: Floats, start: Floats = START) -> list[Floats]:
    return list(SAMPLERS[name].run(velocity, start, times, no_noise))


def order(error: Callable[[int], float], steps: int = 160) -> float:
    """log₂ of how much the error falls when the steps double."""
    return math.log2(error(steps) / error(2 * steps))


def mixture_error(name: str, start: float = 1.0, end: float = 0.0) -> Callable[[int], float]:
    expected = mixture_flow(START, start, end)
    return lambda steps: float(
        np.abs(states(name, mixture_velocity, np.linspace(start, end, steps + 1))[-1] - expected).max()
    )


# ---------------------------------------------------------------- order of convergence


def test_the_known_flow_satisfies_its_differential_equation() -> None:
    around = mixture_flow(START, 1.0, 0.5 + 1e-4), mixture_flow(START, 1.0, 0.5 - 1e-4)
    slope = (around[0] - around[1]) / 2e-4
    assert np.allclose(slope, mixture_velocity(mixture_flow(START, 1.0, 0.5), 0.5), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "expected"), [("euler", 1), ("heun", 2), ("ab2", 2), ("ab3", 3), ("abm3", 3), ("unipc", 2)]
)
def test_order(name: str, expected: int) -> None:
    assert order(mixture_error(name)) == pytest.approx(expected, abs=0.05)
    assert SAMPLERS[name].order() == expected


def test_a_start_by_euler_would_cost_ab3_an_order() -> None:
    """What its first step by Heun is for: after Euler's, of error h², the same formulas are of order 2."""
    expected = mixture_flow(START, 1.0, 0.0)

    def error(steps: int) -> float:
        history: list[Floats] = []
        x = START
        times = np.linspace(1, 0, steps + 1)
        for t, weights in zip(times, step_weights(times, order=3), strict=False):
            history = [mixture_velocity(x, t), *history[:2]]
            x = x + weighted(history, weights)
        return float(np.abs(x - expected).max())

    assert order(error) == pytest.approx(2, abs=0.1)


# ---------------------------------------------------------------- formulas


@pytest.mark.parametrize("name", ["euler", "heun", "ab2", "ab3", "abm3"])
def test_a_constant_velocity_is_exact_on_any_grid(name: str) -> None:
    times = np.array([1.0, 0.9, 0.4, 0.35, 0.0])
    found = states(name, lambda x, _t, _step, _stage: np.full_like(x, 2.0), times)
    assert np.allclose(found, START + 2.0 * (times[1:, None] - 1.0), rtol=0, atol=1e-14)


def test_ab2_is_its_closed_form_on_variable_steps() -> None:
    times = np.array([1.0, 0.93, 0.7, 0.66, 0.3, 0.0])
    x, h_previous, v_previous = START, math.inf, np.zeros_like(START)
    for (t, t_next), found in zip(pairwise(times), states("ab2", mixture_velocity, times), strict=True):
        h, v = t_next - t, mixture_velocity(x, t)
        r = h / h_previous
        x = x + h * ((1 + r / 2) * v - (r / 2) * v_previous)
        h_previous, v_previous = h, v
        assert np.allclose(found, x, rtol=0, atol=1e-14)


def integrated(nodes: list[float], velocities: list[Floats], start: float, end: float) -> Floats:
    """∫ from start to end of the polynomial through the velocities at the nodes, by NumPy's own polynomials."""
    fitted = np.polynomial.polynomial.polyfit(nodes, np.array(velocities), len(nodes) - 1)
    return np.array([polynomial(end) - polynomial(start) for polynomial in map(integral, fitted.T)])


def integral(coefficients: Floats) -> np.polynomial.Polynomial:
    return np.polynomial.Polynomial(coefficients).integ()


def test_abm3_does_each_step_again_once_its_velocity_is_known() -> None:
    times = [1.0, 0.93, 0.7, 0.66, 0.3, 0.0]
    found = states("abm3", mixture_velocity, np.array(times))
    start, velocities = START, [mixture_velocity(START, 1.0)]
    assert np.allclose(found[0], START - 0.07 * velocities[0], rtol=0, atol=1e-14)
    for step in range(1, len(times) - 1):
        velocities.append(mixture_velocity(found[step - 1], times[step]))
        last = slice(max(step - 2, 0), step + 1)
        start = start + integrated(times[last], velocities[last], times[step - 1], times[step])
        predicted = integrated(times[step - 1 : step + 1], velocities[step - 1 :], times[step], times[step + 1])
        assert np.allclose(found[step], start + predicted, rtol=0, atol=1e-13)


def test_abm3_is_exact_for_a_velocity_that_is_a_line_in_t() -> None:
    """All but its first state, a prediction by Euler."""
    times = np.array([1.0, 0.9, 0.4, 0.35, 0.0])
    found = states("abm3", lambda x, t, _step, _stage: np.full_like(x, 2.0 + 3.0 * t), times)
    exact = START + (2.0 * times + 1.5 * times**2 - 3.5)[1:, None]
    assert np.allclose(found[1:], exact[1:], rtol=0, atol=1e-14)
    assert not np.allclose(found[0], exact[0], rtol=0, atol=1e-3)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 20])
def test_the_first_steps_of_abm3_are_shorter(steps: int) -> None:
    times = SAMPLERS["abm3"].times(steps)
    assert times[0] == 1.0
    assert times[-1] == 0.0
    gaps = -np.diff(times)
    expected = np.array([0.5, 0.7, 0.9, *[1.0] * 20])[:steps]
    assert np.allclose(gaps / gaps[0], expected / 0.5, rtol=1e-12, atol=0)


def test_heun_averages_both_ends_and_ends_with_euler() -> None:
    def v(x: Floats, t: float) -> Floats:
        return mixture_velocity(x, t)

    first, last = states("heun", mixture_velocity, np.array([1.0, 0.4, 0.0]))
    predicted = START - 0.6 * v(START, 1.0)
    assert np.allclose(first, START - 0.6 * (v(START, 1.0) + v(predicted, 0.4)) / 2, rtol=0, atol=1e-15)
    assert np.allclose(last, first - 0.4 * v(first, 0.4), rtol=0, atol=1e-15)


@given(
    gaps=st.lists(st.floats(0.05, 0.5), min_size=0, max_size=3),
    start=st.floats(-1, 1),
    h=st.floats(0.05, 0.5),
    direction=st.sampled_from([-1, 1]),
    data=st.data(),
)
def test_integration_weights_are_exact_for_polynomials(
    gaps: list[float], start: float, h: float, direction: int, data: st.DataObject
) -> None:
    nodes = [start, *(start - direction * float(gap) for gap in np.cumsum(gaps))]
    coefficients = data.draw(st.lists(st.floats(-1, 1), min_size=len(nodes), max_size=len(nodes)))
    polynomial = np.polynomial.Polynomial(coefficients)
    end = start + direction * h
    exact = polynomial.integ()(end) - polynomial.integ()(start)
    found = integration_weights(nodes, start, end) @ polynomial(np.array(nodes))
    assert found == pytest.approx(exact, rel=0, abs=1e-10)


# ---------------------------------------------------------------- noise


def test_the_sde_grid_stops_short_of_the_data_and_then_jumps() -> None:
    times = sde_times(7)
    assert len(times) == 8
    assert np.allclose(times[:7], np.linspace(1.0, 0.04, 7), rtol=0, atol=0)
    assert times[7] == 0.0


def test_euler_maruyama_draws_noise_on_every_step_but_the_last() -> None:
    drawn: list[int] = []

    def noise() -> Floats:
        drawn.append(len(drawn))
        return np.zeros_like(START)

    found = SAMPLERS["euler-maruyama"].run(mixture_velocity, START, sde_times(7), noise)
    drawn_by_step = [len(drawn) for _ in found]
    assert drawn_by_step == [1, 2, 3, 4, 5, 6, 6]


def test_the_first_step_of_euler_maruyama() -> None:
    """At t = 1 the score is −x and w = 2, so x ← x + h·(v + x) + √(2|h|)·noise."""
    noise = np.arange(5.0)
    first, _ = SAMPLERS["euler-maruyama"].run(mixture_velocity, START, np.array([1.0, 0.4, 0.0]), lambda: noise)
    drift = mixture_velocity(START, 1.0) + START
    assert np.allclose(first, START - 0.6 * drift + math.sqrt(1.2) * noise, rtol=0, atol=1e-14)


def test_euler_maruyama_samples_the_data() -> None:
    """Mean and variance of two Gaussians; with 20,000 paths the mean is known to 0.007."""
    stream = np.random.default_rng(0)
    start = stream.standard_normal(20_000)
    run = SAMPLERS["euler-maruyama"].run(
        mixture_velocity, start, sde_times(100), lambda: stream.standard_normal(20_000)
    )
    *_, end = run
    mean = float(SHARES @ MEANS)
    assert end.mean() == pytest.approx(mean, abs=0.03)
    assert end.var() == pytest.approx(float(SHARES @ (DEVIATIONS**2 + MEANS**2)) - mean**2, abs=0.04)


# ---------------------------------------------------------------- every sampler


def run_recording(sampler: Sampler, steps: int) -> tuple[list[Floats], list[list[Evaluation]]]:
    """The states, and the evaluations that each step made."""
    seen: list[Evaluation] = []

    def velocity(x: Floats, t: float, step: int, stage: int) -> Floats:
        seen.append(Evaluation(float(t), step, stage))
        return mixture_velocity(x, t)

    found, by_step = [], []
    for x in sampler.run(velocity, START, sampler.times(steps), lambda: np.ones_like(START)):
        found.append(x)
        by_step.append(seen.copy())
        seen.clear()
    return found, by_step


@pytest.mark.parametrize("steps", [2, 5])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_run_costs_what_the_table_says(name: str, steps: int) -> None:
    _, evaluations = run_recording(SAMPLERS[name], steps)
    assert sum(map(len, evaluations)) == SAMPLERS[name].calls(steps)


@pytest.mark.parametrize("steps", [2, 5])
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_table_says_what_every_step_evaluates(name: str, steps: int) -> None:
    sampler = SAMPLERS[name]
    _, evaluations = run_recording(sampler, steps)
    assert [one for made in evaluations for one in made] == list(sampler.evaluations(sampler.times(steps)))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("euler", [1, 1, 1, 1]),
        ("heun", [2, 2, 2, 1]),
        ("ab2", [1, 1, 1, 1]),
        ("ab3", [2, 1, 1, 1]),
        ("abm3", [1, 1, 1, 1]),
        ("unipc", [1, 1, 1, 1]),
        ("euler-maruyama", [1, 1, 1, 1]),
    ],
)
def test_evaluations_of_each_step(name: str, expected: list[int]) -> None:
    _, evaluations = run_recording(SAMPLERS[name], 4)
    assert [len(step) for step in evaluations] == expected


@pytest.mark.parametrize(("name", "steps"), [("euler", 20), ("heun", 10), ("ab2", 20), ("ab3", 19), ("abm3", 20)])
def test_the_most_steps_within_so_many_calls(name: str, steps: int) -> None:
    sampler = SAMPLERS[name]
    assert sampler.steps_within(20) == steps
    assert sampler.calls(steps) <= 20 < sampler.calls(steps + 1)


@pytest.mark.parametrize("name", SAMPLERS)
def test_evaluations_know_their_step_and_time(name: str) -> None:
    """A step's first evaluation, stage 0, is at its own t, its second at the next."""
    times = SAMPLERS[name].times(4)
    found, evaluations = run_recording(SAMPLERS[name], 4)
    assert len(found) == 4
    for index, step in enumerate(evaluations):
        assert step == [(times[index], index, 0), (times[index + 1], index, 1)][: len(step)]


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_state_stays_float64_when_the_velocity_is_float32(name: str) -> None:
    sampler = SAMPLERS[name]

    def velocity(x: Floats, t: float, _step: int, _stage: int) -> Floats:
        return mixture_velocity(x, t).astype(np.float32)

    run = sampler.run(velocity, START, sampler.times(4), lambda: np.ones_like(START))
    assert [x.dtype for x in run] == [np.dtype(np.float64)] * 4


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_start_and_given_states_are_not_written_again(name: str) -> None:
    start, sampler, seen = START.copy(), SAMPLERS[name], []
    for x in sampler.run(mixture_velocity, start, sampler.times(4), lambda: np.ones_like(START)):
        seen.append((x, x.copy()))
    assert np.array_equal(start, START)
    assert all(np.array_equal(x, copy) for x, copy in seen)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_fewest_steps_the_table_allows_run(name: str) -> None:
    found, _ = run_recording(SAMPLERS[name], SAMPLERS[name].min_steps)
    assert np.isfinite(found[-1]).all()


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_table_is_keyed_by_name(name: str) -> None:
    assert sampler_named(name).name == name


def test_an_unknown_sampler_lists_the_known_ones() -> None:
    with pytest.raises(
        InputError, match="unknown sampler 'ddim'; known: euler, heun, ab2, ab3, abm3, unipc, euler-maruyama"
    ):
        sampler_named("ddim")

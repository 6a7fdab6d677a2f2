"""Time grids stay on [0, 1] and in order."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elit_export.errors import InputError
from elit_export.runtime.options import ResolvedOptions, SamplingOptions, resolve
from elit_export.runtime.samplers.adams_bashforth import step_weights
from elit_export.runtime.samplers.base import even_times
from elit_export.runtime.timegrid import warp
from tests.helpers import tiny_spec
from tests.spec.refusals import wrong_refusals


@pytest.mark.parametrize("steps", [1, 3, 10, 20, 50, 250])
def test_even_times_are_the_decimals_people_write(steps: int) -> None:
    """t of step k is the float nearest to (S−k)/S, so that `0.3` in an interval or a schedule meets the step at 0.3."""
    assert even_times(steps).tolist() == [(steps - k) / steps for k in range(steps + 1)]


def test_linear_leaves_times_as_they_are() -> None:
    assert np.array_equal(warp(even_times(7), "linear"), even_times(7))


def test_shift_two() -> None:
    assert np.allclose(warp(np.array([1.0, 0.5, 0.2, 0.0]), "shift:2.0"), [1.0, 2 / 3, 1 / 3, 0.0], rtol=1e-15, atol=0)


def test_shift_one_is_linear() -> None:
    assert np.array_equal(warp(even_times(9), "shift:1"), even_times(9))


def test_a_shift_above_one_takes_more_steps_near_noise() -> None:
    assert (warp(even_times(10), "shift:3")[1:-1] > even_times(10)[1:-1]).all()
    assert (warp(even_times(10), "shift:0.5")[1:-1] < even_times(10)[1:-1]).all()


@given(st.floats(0.01, 100.0))
def test_every_shift_keeps_both_ends_exactly_and_runs_down(shift: float) -> None:
    times = warp(even_times(20), f"shift:{shift!r}")
    assert (times[0], times[-1]) == (1.0, 0.0)
    assert (np.diff(times) < 0).all()


@given(st.floats(0.1, 10.0))
def test_the_inverse_shift_undoes_a_shift(shift: float) -> None:
    there_and_back = warp(warp(even_times(20), f"shift:{shift!r}"), f"shift:{1 / shift!r}")
    assert np.allclose(there_and_back, even_times(20), rtol=0, atol=1e-13)


def test_an_unknown_grid_names_the_known_ones() -> None:
    grids = ("", "shift", "shift:", "shift:x", "shift:0", "shift:-1", "shift:nan", "shift:inf", "cosine", "warp:2")
    known = r".*linear nor shift:S with S > 0, e\.g\. shift:2\.0"
    cases = [(grid, re.escape(repr(grid)) + known) for grid in grids]
    assert wrong_refusals(lambda grid: warp(even_times(4), grid), cases) == {}


def resolved(**options: str) -> ResolvedOptions:
    return resolve(tiny_spec(), SamplingOptions(**options))


@pytest.mark.parametrize("sampler", ["euler", "ab3"])
def test_a_grid_whose_times_coincide_is_refused(sampler: str) -> None:
    grids = [f"shift:{shift}" for shift in ("1e13", "1e17", "1e18", "1e300", "1e-13", "1e-155", "1e-320")]
    cases = [(grid, f"time grid '{grid}' makes times coincide in 14 steps; choose S near") for grid in grids]
    assert wrong_refusals(lambda grid: resolved(sampler=sampler, time_grid=grid), cases) == {}


@pytest.mark.parametrize("shift", ["1e10", "1e-10"])
@pytest.mark.parametrize("order", [2, 3])
def test_a_steep_grid_whose_times_differ_has_weights(shift: str, order: int) -> None:
    times = resolved(time_grid=f"shift:{shift}").times
    assert all(np.isfinite(weights).all() for weights in step_weights(times, order=order))


def test_an_upward_grid_is_one_too() -> None:
    assert np.array_equal(warp(even_times(5)[::-1], "linear"), even_times(5)[::-1])
    with pytest.raises(InputError, match="coincide"):
        warp(np.array([0.0, 0.5, 0.5, 1.0]), "linear")

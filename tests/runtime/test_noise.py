"""Noise depends on (seed, sample) and on nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elit_export.errors import InputError
from elit_export.runtime.noise import SeededNoise

SHAPE = (2, 3, 3)


def test_the_same_seed_gives_the_same_noise() -> None:
    assert np.array_equal(SeededNoise(5, 3, SHAPE)(), SeededNoise(5, 3, SHAPE)())


def test_noise_is_float64_of_the_asked_shape() -> None:
    noise = SeededNoise(0, 4, SHAPE)()
    assert noise.dtype == np.float64
    assert noise.shape == (4, *SHAPE)


def test_sample_i_is_the_stream_of_key_seed_and_i() -> None:
    noise = SeededNoise(5, 3, SHAPE)
    streams = [np.random.Generator(np.random.Philox(key=np.array([5, i], np.uint64))) for i in range(3)]
    for _ in range(2):
        assert np.array_equal(noise(), [stream.standard_normal(SHAPE) for stream in streams])


@given(seed=st.integers(0, 2**32), small=st.integers(1, 4), more=st.integers(1, 4))
def test_a_sample_does_not_see_the_batch_around_it(seed: int, small: int, more: int) -> None:
    alone, together = SeededNoise(seed, small, SHAPE), SeededNoise(seed, small + more, SHAPE)
    for _ in range(2):
        assert np.array_equal(alone(), together()[:small])


def test_samples_steps_and_seeds_all_differ() -> None:
    noise = SeededNoise(5, 3, SHAPE)
    drawn = [*noise(), *noise(), *SeededNoise(6, 3, SHAPE)()]
    assert len({array.tobytes() for array in drawn}) == 9


def test_noise_is_standard_normal() -> None:
    noise = SeededNoise(1, 4, (100, 100))()
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02


def test_the_largest_seeds_differ_too() -> None:
    """2⁶³ and 2⁶³ + 1 are one number in float64."""
    assert not np.array_equal(SeededNoise(2**63, 1, SHAPE)(), SeededNoise(2**63 + 1, 1, SHAPE)())


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(InputError, match=f"seed {seed} must"):
        SeededNoise(seed, 1, SHAPE)

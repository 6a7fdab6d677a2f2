"""Noise that depends on (seed, sample) alone, never on the batch a sample runs in."""

from __future__ import annotations

import numpy as np

from elit_export.arrays import Float64
from elit_export.errors import InputError


class SeededNoise:
    """Streams of standard normal numbers, one per sample: first the start noise, then the noise of each step."""

    def __init__(self, seed: int, samples: int, shape: tuple[int, ...], *, first: int = 0) -> None:
        """`first` is the number of the first sample."""
        check_seed(seed)
        numbers = range(first, first + samples)
        keys = [np.array([seed, number], np.uint64) for number in numbers]  # a tuple would pass through float64
        self._streams = [np.random.Generator(np.random.Philox(key=key)) for key in keys]
        self._shape = shape

    def __call__(self) -> Float64:
        """Return the next noise of all samples, (B, C, H, W)."""
        return np.stack([stream.standard_normal(self._shape) for stream in self._streams])


def check_seed(seed: int) -> None:
    """Raise InputError for a seed out of range."""
    if not 0 <= seed < 1 << 64:
        raise InputError(f"seed {seed} must lie in 0 to 2**64 - 1")

"""Time grids: where on [0, 1] a sampler's evenly spaced points lie."""

from __future__ import annotations

import math

import numpy as np

from elit_export.arrays import Float64
from elit_export.errors import InputError

Times = Float64
MIN_DISTANCE = 1e-12  # between two times; multistep samplers divide by it, and float32 times of engines are coarser


def warp(times: Times, grid: str) -> Times:
    """Move times to a grid: `linear` keeps t, `shift:S` gives S·t / (1 + (S − 1)·t), more steps near noise for S > 1.

    Raises InputError for another grid, and for one so steep that times coincide.
    """
    warped = _warped(times, grid)
    changes = np.diff(warped)
    if not ((changes <= -MIN_DISTANCE).all() or (changes >= MIN_DISTANCE).all()):
        raise InputError(f"time grid {grid!r} makes times coincide in {len(changes)} steps", "choose S nearer to 1")
    return warped


def _warped(times: Times, grid: str) -> Times:
    if grid == "linear":
        return times
    kind, _, number = grid.partition(":")
    try:
        shift = float(number)
    except ValueError:
        shift = math.nan
    if kind != "shift" or not 0 < shift < math.inf:
        raise InputError(f"time grid {grid!r} is neither linear nor shift:S with S > 0, e.g. shift:2.0")
    return shift * times / ((1 - times) + shift * times)  # in this form t = 1 stays exactly 1

"""Measures time robustly on a noisy machine: medians of functions that run in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from elit_export.callbacks import noop

PEAK_SIZES = (1024, 2048, 4096)
PEAK_REPEATS = 3
STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Timing:
    """The median of the runs, and the 10th and 90th percentile as its spread."""

    median_ms: float
    low_ms: float
    high_ms: float
    runs: int


def timed_in_turn(
    functions: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 2,
    before: Callable[[], None] = noop,
) -> dict[str, Timing]:
    """Run each function once per round, so that a slow moment of the machine hits all of them.

    `before` runs before each and is not timed.
    """
    for function in functions.values():
        for _ in range(warmup):
            function()
    times_ms: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            before()
            times_ms[name].append(once_ms(function))
    return {name: timing_of(values) for name, values in times_ms.items()}


def once_ms(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return (time.perf_counter() - started) * 1e3


def timing_of(values: Sequence[float]) -> Timing:
    """Summarize times in milliseconds."""
    low, median, high = np.percentile(values, (10, 50, 90))
    return Timing(float(median), float(low), float(high), len(values))


def _ones(size: int) -> Any:
    return np.ones((size, size), np.float32)


def matmul_peak_gflops(square: Callable[[int], Any] = _ones) -> float:
    """Measure the highest rate of a matrix product over three sizes, in GFLOP/s (2 FLOPs per multiply-add).

    `square` makes a matrix with that many rows and columns: by default NumPy's in float32.
    """
    return max(_matmul_gflops(square(size), size) for size in PEAK_SIZES)


def _matmul_gflops(a: Any, size: int) -> float:
    best_ms = min(once_ms(lambda: a @ a) for _ in range(PEAK_REPEATS))
    return 2 * size**3 / best_ms / 1e6


def resident_bytes() -> int | None:
    """The memory that this process holds now; None where the system does not report it (here only Linux does)."""
    if not STATUS.exists():
        return None
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024

"""How fast PyTorch multiplies matrices here, in each precision that CPUs have."""

from __future__ import annotations

import torch

from elit_export.bench.timing import PEAK_REPEATS, PEAK_SIZES, once_ms
from elit_export.spec import Precision


def matmul_peaks_gflops() -> dict[Precision, float]:
    """Best rate of a square matrix product in PyTorch, by precision (2 FLOPs per multiply-add)."""
    types = {Precision.FP32: torch.float32, Precision.BF16: torch.bfloat16}
    return {precision: max(_matmul_gflops(size, dtype) for size in PEAK_SIZES) for precision, dtype in types.items()}


def _matmul_gflops(size: int, dtype: torch.dtype) -> float:
    a = torch.ones(size, size, dtype=dtype)
    best_ms = min(once_ms(lambda: a @ a) for _ in range(PEAK_REPEATS))
    return 2 * size**3 / best_ms / 1e6

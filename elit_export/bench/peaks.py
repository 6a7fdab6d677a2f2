"""Measures how fast PyTorch multiplies matrices here, in each precision that CPUs have."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from elit_export.bench.timing import matmul_peak_gflops
from elit_export.spec import Precision


def matmul_peaks_gflops() -> dict[Precision, float]:
    """Measure the highest rate of a square matrix product in PyTorch, by precision."""
    types = {Precision.FP32: torch.float32, Precision.BF16: torch.bfloat16}
    return {precision: matmul_peak_gflops(partial(_ones, dtype=dtype)) for precision, dtype in types.items()}


def _ones(size: int, dtype: torch.dtype) -> Tensor:
    return torch.ones(size, size, dtype=dtype)

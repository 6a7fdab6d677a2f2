"""The tolerances of engines against PyTorch: the one table. docs/benchmarks.md has the margins that were measured."""

from __future__ import annotations

from dataclasses import dataclass

from elit_export.spec import Precision

CACHE_DB = 115.0  # of the graphs of the step cache, which are fp32 in every plan set
# Of the decoder of a VAE, fp32 in every plan set: DECODE_DB limits the error of all pixels together, DECODE_RELATIVE
# that of each pixel, as a share of the largest value. Neither implies the other: one pixel of 512 × 512 that is off by
# 2e-3 of the largest value leaves 110 dB, and 1e-4 at every pixel is at most 80 dB.
DECODE_DB = 85.0
DECODE_RELATIVE = 1e-4


@dataclass(frozen=True)
class Tolerance:
    """The minimum SQNR of one step and of a whole short trajectory, in dB."""

    step_db: float
    trajectory_db: float


TOLERANCES = {
    # The order of sums differs; 115 dB is a relative error of 1.8e-6.
    Precision.FP32: Tolerance(step_db=115.0, trajectory_db=110.0),
    # Linear layers and attention are rounded (`graphs.rounding`).
    Precision.FP16: Tolerance(step_db=55.0, trajectory_db=50.0),
    # OpenVINO also rounds what lies between products.
    Precision.BF16: Tolerance(step_db=36.0, trajectory_db=32.0),
    # Products in 8 bits have their largest errors at the last steps, where little noise is left.
    Precision.INT8: Tolerance(step_db=25.0, trajectory_db=22.0),
    Precision.FP8: Tolerance(step_db=22.0, trajectory_db=18.0),
}

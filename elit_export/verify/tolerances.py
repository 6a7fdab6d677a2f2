"""How far an engine may be from PyTorch: the one table."""

from __future__ import annotations

from dataclasses import dataclass

from elit_export.spec import Precision


@dataclass(frozen=True)
class Tolerance:
    """Least SQNR of one step and of a whole short trajectory, in dB."""

    step_db: float
    trajectory_db: float


TOLERANCES = {
    # fp32 engines differ from PyTorch by the order of sums only; 115 dB is a relative error of 1.8e-6.
    # Measured at the corners of every profile: 127 dB (shipped model), 121 dB (XL/2 shape).
    Precision.FP32: Tolerance(step_db=115.0, trajectory_db=110.0),
}

"""How far an engine may be from PyTorch: the one table."""

from __future__ import annotations

from dataclasses import dataclass

from elit_export.spec import Precision
from elit_export.verify.metrics import Difference


@dataclass(frozen=True)
class Tolerance:
    """Least SQNR of one step and of a whole short trajectory, in dB."""

    step_db: float
    trajectory_db: float


TOLERANCES = {
    # fp32 engines differ from PyTorch by the order of sums only. Measured: see the margins in
    # `elit-export inspect`; 115 dB is a relative error of 1.8e-6.
    Precision.FP32: Tolerance(step_db=115.0, trajectory_db=110.0),
}


def shortfall(found: Difference, least_db: float) -> str:
    """Empty if `found` is good enough, else what was found and what would have passed."""
    if found.sqnr_db >= least_db:
        return ""
    return (
        f"SQNR {found.sqnr_db:.1f} dB (max error {found.max_relative:.1e} of the largest value) "
        f"misses {least_db:g} dB; a tolerance of {found.sqnr_db:.0f} dB would have passed"
    )

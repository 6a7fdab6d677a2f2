"""Solver tables as a manifest holds them: numbers fitted to a model's trajectories, and how well they hold."""

from __future__ import annotations

from elit_export.bundle.artifacts import Facts
from elit_export.spec import Precision, SolverTable


class SolverError(Facts):
    """The error of a method's samples against the reference solution, in dB: of the median image, of all together
    (pooled), and of the worst image.
    """

    sampler: str
    steps: int
    calls: int
    median_db: float
    pooled_db: float
    worst_db: float


class SolverFacts(Facts):
    """A table and what it was calibrated for. The errors are those of images that it was not fitted to.

    `compared` are samplers without calibration on the same images: `ab3` with as many calls, and Euler's 50 steps.
    """

    checkpoint_sha256: str
    table: SolverTable
    guidance: str
    guidance_interval: tuple[float, float] | None = None
    schedule: str
    target: str
    precision: Precision
    images: int  # that it was fitted to
    held_out_images: int
    seed: int
    error: SolverError
    compared: tuple[SolverError, ...]

    @property
    def name(self) -> str:
        """How a sampling asks for it."""
        return f"solver:{self.table.calls}"

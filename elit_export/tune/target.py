"""The target of a search, read from the command line, and what it asks of each preset."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from elit_export.errors import InputError
from elit_export.tune.pareto import Goal

PRESETS = ("fast", "balanced", "best")
SHARES = {"fast": 0.35, "balanced": 0.6, "best": 1.0}  # of the target's time
MORE_DB = {"fast": 0.0, "balanced": 3.0, "best": 6.0}  # than the target's
TOLERANCE = 0.05  # by which a preset, measured again, may miss its target
TOLERANCE_DB = -20 * math.log10(1 - TOLERANCE)  # the same share of the amplitude of an error
UNITS_MS = {"ms": 1.0, "s": 1000.0, "": 1.0}


@dataclass(frozen=True)
class Target:
    """Asks for at most so many ms, at least so many times as fast as the baseline, or at least so many dB."""

    latency_ms: float | None = None
    speedup: float | None = None
    min_sqnr_db: float | None = None

    def __post_init__(self) -> None:
        values = [value for value in (self.latency_ms, self.speedup, self.min_sqnr_db) if value is not None]
        if len(values) != 1:
            raise InputError("a search needs one target", "give one of --latency 40ms, --speedup 10, --min-sqnr 34")
        if not (math.isfinite(values[0]) and values[0] > 0):
            raise InputError(f"the target {values[0]:g} must be a finite number above zero")

    def __str__(self) -> str:
        if self.latency_ms is not None:
            return f"at most {self.latency_ms:.10g} ms"
        if self.speedup is not None:
            return f"at least {self.speedup:g} times as fast as the baseline"
        return f"at least {self.min_sqnr_db:g} dB"

    @property
    def is_time(self) -> bool:
        return self.min_sqnr_db is None

    def limit_ms(self, baseline_ms: float) -> float:
        """Return the time that the target allows beside a baseline; infinite where it is not of time."""
        if self.latency_ms is not None:
            return self.latency_ms
        return math.inf if self.speedup is None else baseline_ms / self.speedup

    def goals(self, names: Iterable[str]) -> list[Goal]:
        """List what each preset must reach. A name that is not one of PRESETS asks for the target itself."""
        if self.min_sqnr_db is None:
            return [Goal(name, max_cost=SHARES.get(name, 1.0)) for name in names]
        return [Goal(name, min_db=self.min_sqnr_db + MORE_DB.get(name, 0.0)) for name in names]


def milliseconds(text: str) -> float:
    """Read `40ms`, `0.04s` or `40`, which is in ms; raises InputError."""
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*(ms|s|)", text.strip(), re.ASCII)
    if not match:
        raise InputError(f"latency {text!r} is not a time", "write it as 40ms or 0.04s")
    return float(match[1]) * UNITS_MS[match[2]]


def rounded_up(ms: float) -> str:
    """Write a time as `milliseconds` reads it: three digits, from 1000 ms on whole ones, never less than it is."""
    ms = max(ms, 0.001)
    digits = max(0, 2 - math.floor(math.log10(ms)))
    return f"{math.ceil(ms * 10**digits) / 10**digits:.{digits}f}"

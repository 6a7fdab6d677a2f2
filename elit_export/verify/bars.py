"""Bars: ratios a bench must hold, kept in a file.

Takes: a bench's facts and a JSON file of bars.  Gives: what misses.  May touch: that file (reading).

    [{"metric": "budgets.0.speedups.eager", "min": 0.9}, {"metric": "switching", "max": 1.2}]

A metric is a path into the facts that `bench --json` writes; numbers in it count list entries, -1 is the last.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from elit_export.errors import InputError


class Bar(BaseModel):
    """A metric's limits, both inclusive."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    metric: str
    min: float = -math.inf
    max: float = math.inf


def load_bars(path: Path) -> list[Bar]:
    """Read and check a file of bars; raises InputError."""
    if not path.is_file():
        raise InputError(f"no file of bars at {path}")
    try:
        return TypeAdapter(list[Bar]).validate_json(path.read_bytes())
    except ValidationError as error:
        raise InputError(f"{path}: not a list of bars: {error}") from error


def misses(bars: list[Bar], facts: Any) -> list[str]:
    """A line for each bar that does not hold; raises InputError for a metric that is not in the facts."""
    found = [(bar, _value(facts, bar.metric)) for bar in bars]
    return [
        f"{bar.metric} is {value:.4g}, the bar is {_limits(bar)}"
        for bar, value in found
        if not bar.min <= value <= bar.max
    ]


def _limits(bar: Bar) -> str:
    limits = {"at least": bar.min, "at most": bar.max}
    return " and ".join(f"{word} {limit:g}" for word, limit in limits.items() if math.isfinite(limit))


def _value(facts: Any, metric: str) -> float:
    value = facts
    for key in metric.split("."):
        try:
            value = value[int(key)] if isinstance(value, list) else value[key]
        except (KeyError, IndexError, ValueError, TypeError) as error:
            known = list(value) if isinstance(value, dict) else json.dumps(value)[:80]
            raise InputError(f"no metric {metric!r} in this bench; at {key!r} there is {known}") from error
    if value is None:
        raise InputError(f"metric {metric!r} was not measured: this system or this bench does not tell it")
    if not isinstance(value, int | float):
        raise InputError(f"metric {metric!r} is not a number")
    return float(value)

"""Limits that measured ratios must hold, kept in a file.

    [{"metric": "budgets.0.speedups.eager", "min": 0.9}, {"metric": "switching", "max": 1.2}]

A metric is a path into the facts that `--json` writes; numbers in it count list entries, -1 is the last.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from elit_export.bundle.readers import read_json
from elit_export.errors import InputError


class Limit(BaseModel):
    """The limits of a metric, both inclusive."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    metric: str
    min: float = -math.inf
    max: float = math.inf


def load_limits(path: Path) -> list[Limit]:
    """Read and check a file of limits; raises InputError."""
    try:
        return TypeAdapter(list[Limit]).validate_python(read_json(path, what="the limits", error=InputError))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise InputError(f"no file of limits at {path}") from error
    except ValidationError as error:
        raise InputError(f"{path}: not a list of limits: {error}") from error


def check_metrics(limits: Sequence[Limit], facts: Any, unmeasured: Mapping[str, str]) -> None:
    """Raise InputError before anything is measured for a metric that the facts cannot have.

    `facts` are described by types: a dataclass, or a dict of the like. `unmeasured` says of keys in paths what to give
    so that they are measured.
    """
    for limit in limits:
        known = facts
        for key in limit.metric.split("."):
            if key in unmeasured:
                raise InputError(f"metric {limit.metric!r} is not measured by this command", unmeasured[key])
            known = _below(known, key, limit.metric)


def _below(facts: Any, key: str, metric: str) -> Any:
    """Return the type below a key of facts that are described by types; Any where the types do not say."""
    inner = [part for part in get_args(facts) if part is not NoneType]
    if get_origin(facts) in (Union, UnionType):
        return _below(inner[0], key, metric)
    if is_dataclass(facts):
        facts = get_type_hints(facts)
    if isinstance(facts, dict):
        if key not in facts:
            raise InputError(f"no metric {metric!r} in this bench", f"at {key!r} there is {', '.join(facts)}")
        return facts[key]
    if get_origin(facts) is list and not key.removeprefix("-").isdecimal():
        raise InputError(
            f"no metric {metric!r} in this bench", f"at {key!r} give the number of an entry, -1 is the last"
        )
    return inner[-1] if get_origin(facts) in (list, dict) else Any


def misses(limits: Sequence[Limit], facts: Any) -> list[str]:
    """Write a line for each limit that does not hold; raises InputError for a metric that is not in the facts."""
    values = [(limit, _value(facts, limit.metric)) for limit in limits]
    return [
        f"{limit.metric} is {value:.4g}, the limit is {_text(limit)}"
        for limit, value in values
        if not limit.min <= value <= limit.max
    ]


def _text(limit: Limit) -> str:
    ends = {"at least": limit.min, "at most": limit.max}
    return " and ".join(f"{word} {end:g}" for word, end in ends.items() if math.isfinite(end))


def _value(facts: Any, metric: str) -> float:
    value = facts
    for key in metric.split("."):
        try:
            value = value[int(key)] if isinstance(value, list) else value[key]
        except (KeyError, IndexError, ValueError, TypeError) as error:
            keys = list(value) if isinstance(value, dict) else json.dumps(value)[:80]
            raise InputError(f"no metric {metric!r} in this bench; at {key!r} there is {keys}") from error
    if value is None:
        raise InputError(
            f"metric {metric!r} was not measured: this system does not report it, or this bench does not measure it"
        )
    if not isinstance(value, int | float):
        raise InputError(f"metric {metric!r} is not a number")
    return float(value)

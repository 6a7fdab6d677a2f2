"""Manifests of earlier schemas → today's.

A field with a default needs no new schema. A number changes only when an old field changes its meaning, or a new one
follows from old ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Values = dict[str, Any]


def migrated(values: Values, schema: int) -> Values:
    """The values of a manifest of `schema`, which must be in STEPS, as today's schema has them."""
    while schema in STEPS:
        values = STEPS[schema](values)
        schema += 1
        values["schema_version"] = schema
    return values


def _graphs_say_what_they_are(values: Mapping[str, Any]) -> Values:
    """6 → 7: the name under which a graph is stored, `step-int8-SAMPLES`, told which graph it is and its precision."""
    graphs = {}
    for name, graph in values["graphs"].items():
        what, precision, *_ = name.split("-")
        graphs[name] = {**graph, "graph": what, "precision": precision}
    return {**values, "graphs": graphs}


STEPS: dict[int, Callable[[Mapping[str, Any]], Values]] = {6: _graphs_say_what_they_are}

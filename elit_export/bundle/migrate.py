"""Manifests of earlier schemas → today's.

A field with a default needs no new schema. A number changes only when an old field changes its meaning, or a new one
follows from old ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

Values = dict[str, Any]
DECODER_FIELDS = ("channels", "image_channels", "scale", "shift", "factor", "side")
FIT_FIELDS = ("coefficients", "low", "high")


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


def _values_are_nested(values: Mapping[str, Any]) -> Values:
    """7 → 8: the numbers of a decoder, and those of a fit, became values of their own."""
    sets = [{**each, "decoder": _nested(each["decoder"], "spec", DECODER_FIELDS)} for each in values["plan_sets"]]
    calibration = values["cache_calibration"]
    if calibration is not None:
        calibration = {**calibration, "fits": [_nested(fit, "fit", FIT_FIELDS) for fit in calibration["fits"]]}
    return {**values, "plan_sets": sets, "cache_calibration": calibration}


def _nested(values: Mapping[str, Any] | None, name: str, inner: Iterable[str]) -> Values | None:
    """The fields `inner` moved into one field `name`; a field that lacks stays lacking, for the manifest to refuse."""
    if values is None:
        return None
    outer = {key: value for key, value in values.items() if key not in inner}
    return {**outer, name: {key: values[key] for key in inner if key in values}}


STEPS: dict[int, Callable[[Mapping[str, Any]], Values]] = {6: _graphs_say_what_they_are, 7: _values_are_nested}

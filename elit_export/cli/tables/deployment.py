"""What a named model asks of a GPU → tables for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from elit_export.cli.tables.layout import Table, digits, size, table

Facts = dict[str, Any]


def deployment_tables(inspected: Facts) -> Iterator[Table]:
    """Yield the tables of a named model; a file with weights of its own has none."""
    if facts := inspected.get("deployment"):
        yield _weights(facts)
        yield _times(facts)


def _weights(facts: Facts) -> Table:
    plans, rows = facts["per_profile_plans"], facts["rows"]
    return table(
        f"on a GPU (arithmetic, nothing measured; {rows} rows)",
        (
            "precision",
            "weights",
            "activations",
            "one plan fits a GPU of",
            f"{plans} plans, one a profile",
            "they fit one of",
        ),
        [
            (
                name,
                size(cost["weight_bytes"]),
                size(cost["activation_bytes"]),
                _smallest(facts["gpus"], cost["fits_one_plan"]),
                size(cost["per_profile_bytes"]),
                _smallest(facts["gpus"], cost["fits_per_profile"]),
            )
            for name, cost in facts["precisions"].items()
        ],
        [
            f"{facts['rounded_parameters'] / 1e9:.2f} B parameters are rounded, "
            f"{facts['exact_parameters'] / 1e9:.2f} B (adaLN, embedders, norms) stay in fp32",
            "activations are an estimate",
            f"GPUs known: {'; '.join(facts['gpus'])}",
        ],
    )


def _times(facts: Facts) -> Table:
    return table(
        f"expected time of a step ({facts['rows']} rows)",
        ("budget", "ms", f"FLOPs guided by {facts['weak']} / base model's"),
        [
            (name, digits(step_ms, 2), f"{facts['guided_share'][name]:.3f}")
            for name, step_ms in facts["step_ms"].items()
        ],
        [
            f"FLOPs at {facts['assumed_share']:.0%}, an assumption, of {facts['peak_flops'] / 1e12:.0f} TFLOP/s, the "
            "dense bf16 peak of an H100 SXM",
            "the base model, without Read and Write, is guided by itself",
        ],
    )


def _smallest(gpus: Mapping[str, int], holding: Sequence[str]) -> str:
    """The least memory of a GPU that holds it; GPUs come in that order."""
    return f"{gpus[holding[0]]} GB" if holding else "none known"

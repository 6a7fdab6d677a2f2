"""What a named model asks of a GPU → tables for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table
from rich.text import Text

from elit_export.cli.tables.inspect import size, table

Facts = dict[str, Any]


def deployment_tables(inspected: Facts) -> Iterator[Table]:
    """None for what has weights of its own."""
    if facts := inspected.get("deployment"):
        yield _weights(facts)
        yield _times(facts)


def _weights(facts: Facts) -> Table:
    plans, rows = facts["per_profile_plans"], facts["rows"]
    made = table(
        f"on a GPU (arithmetic, nothing measured; {rows} rows)",
        ("precision", "weights", "activations", "one plan fits", f"{plans} plans, one a profile", "they fit"),
        [
            (
                name,
                size(found["weight_bytes"]),
                size(found["activation_bytes"]),
                _listed(found["fits_one_plan"]),
                size(found["per_profile_bytes"]),
                _listed(found["fits_per_profile"]),
            )
            for name, found in facts["precisions"].items()
        ],
    )
    made.caption = Text(
        f"{facts['rounded_parameters'] / 1e9:.2f} B parameters are rounded, {facts['exact_parameters'] / 1e9:.2f} B "
        f"(adaLN, embedders, norms) stay in fp32; activations are an estimate"
    )
    return made


def _times(facts: Facts) -> Table:
    made = table(
        f"expected time of a step ({facts['rows']} rows)",
        ("budget", "ms", f"FLOPs guided by {facts['weak']} / base model's"),
        [(name, f"{found:.0f}", f"{facts['guided_share'][name]:.3f}") for name, found in facts["step_ms"].items()],
    )
    made.caption = Text(
        f"FLOPs at {facts['assumed_share']:.0%}, an assumption, of {facts['peak_flops'] / 1e12:.0f} TFLOP/s, the dense "
        f"bf16 peak of an H100 SXM. The base model, without Read and Write, is guided by itself"
    )
    return made


def _listed(gpus: list[str]) -> str:
    return "; ".join(gpus) or "none"

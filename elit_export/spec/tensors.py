"""What graphs are called, take and give, and in which arithmetic.

Takes: nothing.  Gives: TensorSpec, Precision, names.  May touch: nothing.  Knows nothing of: budgets, models.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Precision(StrEnum):
    """The arithmetic of the large products; what surrounds them stays in a higher precision."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"
    FP8 = "fp8"


QUANTIZED = (Precision.INT8, Precision.FP8)  # these need samples of real inputs


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph; a string in `shape` is a dynamic dimension."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


ROWS = "rows"
LATENTS = "latents"
TEXT = "text"
TEXT_MASK = "text_mask"
LONGEST_TEXT = 1024  # tokens
STEP = "step"
CACHE_GRAPHS = ("probe", "reuse", "time")  # beside `step`: what step caching calls
FUSED = "fused"  # all of them in one graph, for hosts without this runtime
DECODE = "decode"  # latents of a VAE → pixels
EXACT_GRAPHS = (*CACHE_GRAPHS, DECODE)  # fp32 whatever the precision of the target
COEFFICIENTS = 5  # of the polynomial that `fused` takes, lowest power first


# What a host of `fused` decides: to compute whatever the signal says, when to, and how residuals are forecast.
FUSED_CHOICES = (
    TensorSpec("force", "bool", ()),
    TensorSpec("threshold", "float32", ()),
    TensorSpec("coefficients", "float32", (COEFFICIENTS,)),
    TensorSpec("low", "float32", ()),
    TensorSpec("high", "float32", ()),
    TensorSpec("most", "int64", ()),
    TensorSpec("order", "int64", ()),
)

"""Computes the size of a model and the GPU memory it needs, from the spec alone.

Parameters are exact (a test compares them with the model). The rest is arithmetic from the assumptions below; none of
it is measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from elit_export.cost.flops import flops
from elit_export.cost.layers import layers_of
from elit_export.spec import ModelSpec, Precision

GIGABYTE = 10**9
GPUS_GB = {  # by memory, the least first
    "RTX 3090, RTX 4090, A10 or L4, 24 GB": 24,
    "RTX 5090, 32 GB": 32,
    "A40, L40S or RTX 6000 Ada, 48 GB": 48,
    "A100 or H100, 80 GB": 80,
    "RTX PRO 6000, 96 GB": 96,
    "H200, 141 GB": 141,
    "B200, 180 GB": 180,
}
PEAK_FLOPS = 989e12  # of an H100 SXM: dense products in bf16, NVIDIA's data sheet
ASSUMED_SHARE = 0.4  # of that peak
ROWS = 2  # one image with guidance
# Values per token that are alive at once. In float32: the token, the residual, and the inputs of attention and MLP. In
# the precision of products: queries, keys, values and the attention's output, and the MLP's hidden values before and
# after GELU. Where attention is decomposed: its scores before and after softmax, unless an engine fuses them.
FLOAT32_WIDTHS, PRODUCT_WIDTHS, PRODUCT_HIDDEN, SCORES = 4, 4, 2, 2
EXACT_BYTES = 4


@dataclass(frozen=True)
class Parameters:
    """The number of parameters: `rounded` are cast in a lower precision, `exact` stay in float32."""

    rounded: int
    exact: int

    @property
    def total(self) -> int:
        return self.rounded + self.exact

    def size_bytes(self, precision: Precision) -> int:
        """The size in a graph or plan; quantized ones keep a few more layers in float32."""
        return self.rounded * precision.weight_bytes + self.exact * EXACT_BYTES


def parameters(spec: ModelSpec) -> Parameters:
    """Count the parameters of a model."""
    layers = layers_of(spec)
    return Parameters(
        rounded=sum(layer.parameters for layer in layers if layer.kind.casts),
        exact=sum(layer.parameters for layer in layers if not layer.kind.casts),
    )


def activation_bytes(spec: ModelSpec, precision: Precision, rows: int, text: int) -> int:
    """Estimate the memory that a plan needs beside its weights."""
    length, width, value = spec.tokens + text, spec.hidden_size, precision.value_bytes
    token_bytes = (
        EXACT_BYTES * FLOAT32_WIDTHS + value * PRODUCT_WIDTHS
    ) * width + value * PRODUCT_HIDDEN * spec.mlp_size
    scores = 0 if precision.native_attention else SCORES * EXACT_BYTES * spec.num_heads * length**2
    return rows * (length * token_bytes + scores)


def fitting(size_bytes: int) -> tuple[str, ...]:
    """List the GPUs whose memory holds `size_bytes`."""
    return tuple(name for name, gigabytes in GPUS_GB.items() if size_bytes <= gigabytes * GIGABYTE)


def expected_ms(spec: ModelSpec, kept: int, text: int) -> float:
    """Estimate the time of one step of ROWS rows at ASSUMED_SHARE of PEAK_FLOPS."""
    budget = spec.budget(kept)
    return 1000 * ROWS * flops(spec, budget, text=text).total / (ASSUMED_SHARE * PEAK_FLOPS)

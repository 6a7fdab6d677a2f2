"""How large a model is and what that asks of a GPU, from the spec alone.

Takes: a ModelSpec.  Gives: parameters, bytes, which GPUs hold a plan, expected times.
May touch: nothing; needs no torch.

Parameters are exact (tests count the model's own); bytes are those of the weights that `models.precision` describes.
The rest is arithmetic from assumptions stated below, none of it measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from elit_export.models.backbones import Stage, backbone_of
from elit_export.models.cost import TIME_FEATURES, flops
from elit_export.spec import ModelSpec, Precision

GIGABYTE = 10**9
GPUS_GB = {"A100 or H100, 80 GB": 80, "96 GB": 96, "H200, 141 GB": 141, "B200, 180 GB": 180}
PEAK_FLOPS = 989e12  # of an H100 SXM: dense products in bf16, NVIDIA's data sheet
ASSUMED_SHARE = 0.4  # of that peak
ROWS = 2  # one image with guidance
# Values of a token that are alive at once: the tokens, what a block adds, the inputs of the two, in float32; queries,
# keys, values and what was attended, and the MLP's hidden ones before and after GELU, in half precision unless all are
# float32. Where graphs spell attention out, its scores before and after softmax too, unless an engine fuses them.
FLOAT32_WIDTHS, PRODUCT_WIDTHS, PRODUCT_HIDDEN, SCORES = 4, 4, 2, 2
NATIVE_ATTENTION = (Precision.FP16, Precision.BF16)
ROUNDED_BYTES = {Precision.FP32: 4, Precision.FP16: 2, Precision.BF16: 2, Precision.INT8: 1, Precision.FP8: 1}
EXACT_BYTES = 4


@dataclass(frozen=True)
class Parameters:
    """`rounded` are those that a lower precision rounds (attention, MLP, joins, merging), `exact` stay in float32."""

    rounded: int
    exact: int

    @property
    def total(self) -> int:
        return self.rounded + self.exact

    def size_bytes(self, precision: Precision) -> int:
        """In a graph or plan; quantized ones leave a few more layers exact."""
        return self.rounded * ROUNDED_BYTES[precision] + self.exact * EXACT_BYTES


def parameters(spec: ModelSpec) -> Parameters:
    stages = backbone_of(spec).stages(spec)
    around = _embedders(spec) + _linear(spec.hidden_size, 2 * spec.hidden_size) + _last(spec)
    return Parameters(
        rounded=sum(_rounded_in_blocks(spec, stage) for stage in stages) + _rounded_in_interface(spec),
        exact=sum(_exact_in_blocks(spec, stage) for stage in stages) + _exact_in_interface(spec) + around,
    )


def activation_bytes(spec: ModelSpec, precision: Precision, rows: int, text: int) -> int:
    """An estimate of what a plan needs beside its weights."""
    native = precision in NATIVE_ATTENTION
    product = 4 if precision is Precision.FP32 else 2
    length, width = spec.tokens + text, spec.hidden_size
    of_token = (4 * FLOAT32_WIDTHS + product * PRODUCT_WIDTHS) * width + product * PRODUCT_HIDDEN * spec.mlp_size
    scores = 0 if native else SCORES * 4 * spec.num_heads * length**2
    return rows * (length * of_token + scores)


def fitting(size_bytes: int) -> tuple[str, ...]:
    """The GPUs that hold so much."""
    return tuple(name for name, gigabytes in GPUS_GB.items() if size_bytes <= gigabytes * GIGABYTE)


def expected_ms(spec: ModelSpec, kept: int, text: int) -> float:
    """One step of ROWS rows at ASSUMED_SHARE of PEAK_FLOPS."""
    budget = spec.budget(kept)
    return 1000 * ROWS * flops(spec, budget, text=text).total / (ASSUMED_SHARE * PEAK_FLOPS)


# ---------------------------------------------------------------- parts


def _linear(inputs: int, outputs: int, *, bias: bool = True) -> int:
    return inputs * outputs + (outputs if bias else 0)


def _rounded_in_blocks(spec: ModelSpec, stage: Stage) -> int:
    """Attention and MLP of each block, and what joins, merges and splits tokens."""
    width, hidden = stage.widened * spec.hidden_size, stage.widened * spec.mlp_size
    block = 4 * _linear(width, width) + _linear(width, hidden) + _linear(hidden, width)
    found = stage.streams * stage.depth * block + stage.joins * _linear(2 * spec.hidden_size, spec.hidden_size)
    if stage.merged > 1:
        together = stage.merged * spec.hidden_size
        found += _linear(together, width) + _linear(width, together)
    return found


def _exact_in_blocks(spec: ModelSpec, stage: Stage) -> int:
    """adaLN, and norms of queries and keys."""
    adaptive = _linear(spec.hidden_size, 6 * stage.widened * spec.hidden_size)
    each = spec.hidden_size // spec.num_heads * (1 if spec.qk_norm_kind == "rms" else 2)
    return stage.streams * stage.depth * (adaptive + (2 * each if spec.qk_norm else 0))


def _rounded_in_interface(spec: ModelSpec) -> int:
    """Read and Write, but for the query projection of Read."""
    width = spec.hidden_size
    attention = _linear(width, 2 * width) + _linear(width, width)
    return 2 * (attention + 2 * _linear(width, width, bias=False)) + _linear(width, width)


def _exact_in_interface(spec: ModelSpec) -> int:
    """Tables, Read's query projection and adaLN, and the norms of both."""
    width = spec.hidden_size
    tables = (3 * spec.latents + spec.tokens) * width
    return tables + _linear(width, width) + _linear(width, 7 * width) + 2 * 2 * width


def _patch(spec: ModelSpec) -> int:
    return spec.patch_size**2 * spec.in_channels


def _embedders(spec: ModelSpec) -> int:
    width = spec.hidden_size
    conditioning = (
        spec.text_width + _linear(spec.text_width, width) if spec.text_width else (spec.num_classes + 1) * width
    )
    return _linear(_patch(spec), width) + _linear(TIME_FEATURES, width) + _linear(width, width) + conditioning


def _last(spec: ModelSpec) -> int:
    return _linear(spec.hidden_size, _patch(spec))

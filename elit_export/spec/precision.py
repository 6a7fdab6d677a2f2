"""The precision of a model's large products, and what follows from it."""

from __future__ import annotations

from enum import StrEnum
from typing import Self


class Precision(StrEnum):
    """A precision of the large products; everything around them stays in a higher one.

    `weight_bytes` is the size of a rounded weight, `value_bytes` of a value between the products. A quantized
    precision is calibrated on real inputs; its graph is made from the fp32 graph and has its opset. `dtype` is
    the type that layers are cast to, empty if none is.
    """

    weight_bytes: int
    value_bytes: int
    quantized: bool
    opset: int
    dtype: str

    FP32 = "fp32", 4, 4, False, 20, ""
    FP16 = "fp16", 2, 2, False, 23, "float16"
    BF16 = "bf16", 2, 2, False, 23, "bfloat16"
    INT8 = "int8", 1, 2, True, 20, ""
    FP8 = "fp8", 1, 2, True, 20, ""

    def __new__(
        cls,
        name: str,
        weight_bytes: int = 0,
        value_bytes: int = 0,
        quantized: bool = False,
        opset: int = 0,
        dtype: str = "",
    ) -> Self:
        member = str.__new__(cls, name)
        member._value_ = name
        member.weight_bytes, member.value_bytes = weight_bytes, value_bytes
        member.quantized, member.opset, member.dtype = quantized, opset, dtype
        return member

    @property
    def native_attention(self) -> bool:
        """Whether graphs hold ONNX's Attention: TensorRT has no fp32 kernel for it, and 8-bit graphs come from fp32."""
        return bool(self.dtype)

    @property
    def exported(self) -> Precision:
        """The precision of the graph that torch exports."""
        return Precision.FP32 if self.quantized else self


QUANTIZED = tuple(precision for precision in Precision if precision.quantized)

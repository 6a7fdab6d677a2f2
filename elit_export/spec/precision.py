"""The arithmetic of a model's large products, and what follows from it."""

from __future__ import annotations

from enum import StrEnum
from typing import Self


class Precision(StrEnum):
    """A record for each precision of the large products; what surrounds them stays in a higher one.

    `weight_bytes` is what a rounded weight takes, `value_bytes` what the values between the products take. A quantized
    precision is calibrated on real inputs; its graph is made from the fp32 one, so it has the opset of that. `dtype` is
    the name of the type that layers are cast to, empty where none is.
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
        made = str.__new__(cls, name)
        made._value_ = name
        made.weight_bytes, made.value_bytes = weight_bytes, value_bytes
        made.quantized, made.opset, made.dtype = quantized, opset, dtype
        return made

    @property
    def native_attention(self) -> bool:
        """Whether graphs hold ONNX's Attention: TensorRT has no kernel of it in fp32, from which 8 bits are made."""
        return bool(self.dtype)

    @property
    def exported(self) -> Precision:
        """The precision of the graph that torch exports."""
        return Precision.FP32 if self.quantized else self


QUANTIZED = tuple(precision for precision in Precision if precision.quantized)

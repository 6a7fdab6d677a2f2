"""The translations of torch's scaled_dot_product_attention into ONNX.

Queries, keys and values are (B, h, L, D/h) each. `bias` is None, or added to the scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset20 as op
from onnxscript import opset23

from elit_export.spec import GraphSpec, Precision


def _decomposed(query: Any, key: Any, value: Any, bias: Any, scale: float) -> Any:
    """Write softmax(q · kᵀ / √d + bias) · v in six nodes, or seven with a bias.

    The exporter's own form reshapes k by its runtime shape, which prevents backends from recognising attention.
    """
    scaled = op.Mul(query, op.Constant(value_float=scale))
    scores = op.MatMul(scaled, op.Transpose(key, perm=[0, 1, 3, 2]))
    return op.MatMul(op.Softmax(_biased(scores, bias), axis=-1), value)


def _biased(scores: Any, bias: Any) -> Any:
    return scores if bias is None else op.Add(scores, bias)


def _native(query: Any, key: Any, value: Any, bias: Any, scale: float) -> Any:
    """Write one node of ONNX's Attention."""
    attended, *_ = opset23.Attention(query, key, value, _for_each_query(query, bias), scale=scale)
    return attended


def _for_each_query(query: Any, bias: Any) -> Any:
    """Expand a bias (B, 1, 1, L) to (B, 1, L, L), as ONNX Runtime 1.24 does not broadcast it."""
    if bias is None:
        return None
    queries: Any = opset23.Shape(query, start=2, end=3)
    one: Any = opset23.Constant(value_ints=[1])
    shape: Any = opset23.Concat(one, one, queries, one, axis=0)
    return opset23.Expand(bias, shape)


def _half_decomposed(query: Any, key: Any, value: Any, bias: Any, scale: float) -> Any:
    """Write _decomposed with both products in half precision; scale, bias and softmax are float32."""
    half, float32 = query.dtype, ir.DataType.FLOAT
    query_float32: Any = op.Cast(query, to=float32)
    scaled: Any = op.Mul(query_float32, op.Constant(value_float=scale))
    scores: Any = op.MatMul(op.Cast(scaled, to=half), op.Transpose(key, perm=[0, 1, 3, 2]))
    scores_float32: Any = op.Cast(scores, to=float32)
    bias_float32: Any = None if bias is None else op.Cast(bias, to=float32)
    weights: Any = op.Softmax(_biased(scores_float32, bias_float32), axis=-1)
    return op.MatMul(op.Cast(weights, to=half), value)


def attention_table(graph: GraphSpec, precision: Precision) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Give the exporter's translation table for a graph in a precision.

    TensorRT has no native attention in fp32, and (TensorRT for RTX 1.7) none inside an If.
    """
    if not precision.native_attention:
        return {SDPA: _in_place_of_sdpa(_decomposed)}
    return {SDPA: _in_place_of_sdpa(_half_decomposed if graph.has_if else _native)}


def _in_place_of_sdpa(attention: Callable[..., Any]) -> Callable[..., Any]:
    """Adapt a translation to the signature of scaled_dot_product_attention; a mask must be an additive bias."""

    def translated(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        assert (dropout_p, is_causal, enable_gqa) == (0.0, False, False)
        assert attn_mask is None or attn_mask.dtype == query.dtype
        return attention(query, key, value, attn_mask, scale or 1 / math.sqrt(query.shape[-1]))

    return translated


SDPA: Callable[..., Any] = torch.ops.aten.scaled_dot_product_attention.default

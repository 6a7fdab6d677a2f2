"""What stands in graphs for torch's scaled_dot_product_attention.

Queries, keys and values are (B, h, L, D/h) each. `bias` is None, or what is added to the scores.
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
    """softmax(q · kᵀ / √d + bias) · v in six nodes, or seven.

    The exporter's own form takes k apart and together again through its runtime shape, which
    keeps backends from recognising attention.
    """
    scaled = op.Mul(query, op.Constant(value_float=scale))
    scores = op.MatMul(scaled, op.Transpose(key, perm=[0, 1, 3, 2]))
    return op.MatMul(op.Softmax(_biased(scores, bias), axis=-1), value)


def _biased(scores: Any, bias: Any) -> Any:
    return scores if bias is None else op.Add(scores, bias)


def _native(query: Any, key: Any, value: Any, bias: Any, scale: float) -> Any:
    """ONNX's Attention: nothing stands between scale, softmax and the two products."""
    attended, *_ = opset23.Attention(query, key, value, _for_each_query(query, bias), scale=scale)
    return attended


def _for_each_query(query: Any, bias: Any) -> Any:
    """(B, 1, L, L) from (B, 1, 1, L): ONNX Runtime 1.24 does not broadcast it itself, though the operator should."""
    if bias is None:
        return None
    queries: Any = opset23.Shape(query, start=2, end=3)
    one: Any = opset23.Constant(value_ints=[1])
    shape: Any = opset23.Concat(one, one, queries, one, axis=0)
    return opset23.Expand(bias, shape)


def _half_decomposed(query: Any, key: Any, value: Any, bias: Any, scale: float) -> Any:
    """As _decomposed, with both products in half precision; scale, bias and softmax are float32."""
    half, exact = query.dtype, ir.DataType.FLOAT
    query_exact: Any = op.Cast(query, to=exact)
    scaled: Any = op.Mul(query_exact, op.Constant(value_float=scale))
    scores: Any = op.MatMul(op.Cast(scaled, to=half), op.Transpose(key, perm=[0, 1, 3, 2]))
    scores_exact: Any = op.Cast(scores, to=exact)
    bias_exact: Any = None if bias is None else op.Cast(bias, to=exact)
    weights: Any = op.Softmax(_biased(scores_exact, bias_exact), axis=-1)
    return op.MatMul(op.Cast(weights, to=half), value)


def attention_table(graph: GraphSpec, precision: Precision) -> dict[Callable[..., Any], Callable[..., Any]]:
    """What the exporter puts in its place.

    TensorRT has no native attention in fp32, and (TensorRT for RTX 1.7) none inside an If.
    """
    if not precision.native_attention:
        return {SDPA: _in_place_of_sdpa(_decomposed)}
    return {SDPA: _in_place_of_sdpa(_half_decomposed if graph.has_if else _native)}


def _in_place_of_sdpa(attention: Callable[..., Any]) -> Callable[..., Any]:
    """What the exporter calls for scaled_dot_product_attention; a mask must be an additive bias."""

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

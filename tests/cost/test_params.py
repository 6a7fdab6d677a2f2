"""Sizes from the spec, held against the models themselves, which are made without weights."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from elit_export.checkpoints.weights import meta_model
from elit_export.cost.params import GPUS_GB, activation_bytes, expected_ms, fitting, parameters
from elit_export.graphs.rounding import in_precision
from elit_export.models.registry import NAMES, named_spec
from elit_export.spec import PIXELS, ModelSpec, Precision
from tests.helpers import tiny_model
from tests.text_models import text_spec

SPECS = [named_spec(name) for name in NAMES if name.endswith(("S/2", "S/4", "Qwen-Image"))]


@pytest.mark.parametrize("spec", [*SPECS, text_spec(), tiny_model(qk_norm=True).spec], ids=lambda spec: spec.backbone)
def test_parameters_are_those_of_the_model(spec: ModelSpec) -> None:
    model = meta_model(spec, PIXELS)
    rounded = in_precision(model, Precision.BF16)
    found = parameters(spec)
    assert found.total == sum(parameter.numel() for parameter in model.parameters())
    assert found.rounded == sum(p.numel() for p in rounded.parameters() if p.dtype is torch.bfloat16)
    assert found.size_bytes(Precision.FP32) == 4 * found.total
    assert found.size_bytes(Precision.BF16) == sum(p.numel() * p.element_size() for p in rounded.parameters())


def test_twenty_billion_parameters() -> None:
    """The published 20 billion, and Read and Write."""
    found = parameters(named_spec("ELIT-Qwen-Image", resolution=1024))
    assert found.total / 1e9 == pytest.approx(20.6, abs=0.05)
    assert found.exact / found.total == pytest.approx(1 / 3, abs=0.01)
    assert found.size_bytes(Precision.BF16) / 1e9 == pytest.approx(55, abs=0.5)
    assert found.size_bytes(Precision.FP8) < found.size_bytes(Precision.BF16) < found.size_bytes(Precision.FP32)


def test_what_fits_is_no_larger_than_the_gpu() -> None:
    assert list(GPUS_GB.values()) == sorted(GPUS_GB.values())
    assert fitting(24 * 10**9) == tuple(GPUS_GB)
    assert fitting(24 * 10**9 + 1) == tuple(GPUS_GB)[1:]
    assert fitting(181 * 10**9) == ()


def test_activations_grow_with_rows_and_tokens_and_times_with_the_budget() -> None:
    spec = named_spec("ELIT-Qwen-Image", resolution=1024)
    bf16, fp32 = (partial(activation_bytes, spec, precision) for precision in (Precision.BF16, Precision.FP32))
    assert bf16(2, 128) == 2 * bf16(1, 128)
    assert bf16(1, 128 + 4224) == 2 * bf16(1, 128)
    assert bf16(2, 128) / 1e9 == pytest.approx(1.04, abs=0.01)
    assert fp32(2, 128) > 2 * 2 * 4 * 24 * 4224**2  # the scores of two rows, before and after softmax
    times = [expected_ms(spec, kept, 128) for kept in (16, 64, 128, 256)]
    assert times == sorted(times)
    assert times[0] > 0.25 * times[-1]

"""Which weights half precision rounds, and that it leaves the model it is given alone."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from elit_export.graphs.rounding import in_precision
from elit_export.models.sit import ElitSiT
from elit_export.spec import Precision
from elit_export.verify.metrics import difference
from tests.helpers import tiny_model

DTYPES = {Precision.FP16: torch.float16, Precision.BF16: torch.bfloat16}
HALVES = tuple(DTYPES)
ROUNDED = re.compile(
    r"(head|core|tail)\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])\.(weight|bias)"
    r"|read\.attn\.(kv_proj|proj)\.(weight|bias)|write\.attn\.(q_proj|kv_proj|proj)\.(weight|bias)"
    r"|(read|write)\.mlp\.fc[12]\.weight"
)


@pytest.fixture(scope="module")
def model() -> ElitSiT:
    return tiny_model(qk_norm=True)


def stepped(model: ElitSiT, kept: int) -> tuple[Tensor, Tensor]:
    """Velocity and residual of two images, the same for every model."""
    x = torch.randn(2, *model.spec.sample_shape, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        velocity, residual = model.step(x, torch.tensor([0.2, 0.9]), torch.tensor([0, 3]), torch.arange(kept))
    return velocity, residual


def test_fp32_is_the_model_itself(model: ElitSiT) -> None:
    assert in_precision(model, Precision.FP32) is model


@pytest.mark.parametrize("precision", HALVES)
def test_exactly_the_linear_layers_of_attention_and_mlp_are_rounded(model: ElitSiT, precision: Precision) -> None:
    """But not the query projection of Read, whose result is a constant."""
    dtypes = {name: tensor.dtype for name, tensor in in_precision(model, precision).state_dict().items()}
    assert dtypes == {name: DTYPES[precision] if ROUNDED.fullmatch(name) else torch.float32 for name in dtypes}
    rounded = {name.rsplit(".", 1)[0] for name, dtype in dtypes.items() if dtype != torch.float32}
    assert len(rounded) == 4 * model.spec.depth + 4 + 5  # four a block, four in Read, five in Write


@pytest.mark.parametrize("precision", HALVES)
def test_rounded_weights_are_the_nearest(model: ElitSiT, precision: Precision) -> None:
    exact = model.state_dict()
    for name, tensor in in_precision(model, precision).state_dict().items():
        assert torch.equal(tensor, exact[name].to(tensor.dtype)), name


@pytest.mark.parametrize("precision", HALVES)
def test_what_is_not_rounded_is_shared(model: ElitSiT, precision: Precision) -> None:
    rounded = in_precision(model, precision)
    theirs = dict([*rounded.named_parameters(), *rounded.named_buffers()])
    for name, mine in [*model.named_parameters(), *model.named_buffers()]:
        assert (theirs[name] is mine) is not bool(ROUNDED.fullmatch(name)), name


@pytest.mark.parametrize("precision", HALVES)
def test_the_model_given_stays_as_it_is(precision: Precision) -> None:
    given = tiny_model().train()
    parameters = dict(given.named_parameters())
    values = {name: tensor.clone() for name, tensor in given.state_dict().items()}
    in_precision(given, precision)
    assert given.training
    for name, parameter in given.named_parameters():
        assert parameter is parameters[name]
        assert parameter.requires_grad
    for name, tensor in given.state_dict().items():
        assert torch.equal(tensor, values[name]), name


@pytest.mark.parametrize(("precision", "low_db", "high_db"), [(Precision.FP16, 55, 90), (Precision.BF16, 38, 70)])
def test_outputs_are_float32_and_near_but_rounded(
    model: ElitSiT, precision: Precision, low_db: float, high_db: float
) -> None:
    rounded = in_precision(model, precision)
    for kept in (1, 3, 4):
        for found, expected in zip(stepped(rounded, kept), stepped(model, kept), strict=True):
            assert found.dtype == torch.float32
            assert low_db <= difference(found.numpy(), expected.numpy()).sqnr_db <= high_db

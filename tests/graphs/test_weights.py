"""Graphs take their weights one by one: whatever they are stored in, none is copied, turned or rounded before it is
written, and what is written is what the rounded model holds, bit for bit."""

from __future__ import annotations

import math
import re
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from elit_export.checkpoints.native import load_checkpoint, save_checkpoint, stored_checkpoint
from elit_export.errors import ExportError
from elit_export.graphs.export import export_graph, graph_model
from elit_export.graphs.rounding import in_precision
from elit_export.graphs.weights import weightless
from elit_export.models.elit import Elit
from elit_export.spec import STEP, Precision
from tests.conftest import unremembered_export
from tests.helpers import tiny_model
from tests.text_models import text_model

# What only Read's queries and the places of latents are made of, which are folded into constants.
FOLDED = {"read.query", "read.attn.q_proj.weight", "read.attn.q_proj.bias", "read.attn.q_norm.scale"}
FOLDED |= {"read.latent_pos_embed"}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In bf16, where every matrix is larger than what the exporter folds by itself."""
    path = tmp_path_factory.mktemp("stored") / "half.safetensors"
    save_checkpoint(path, tiny_model(hidden_size=128, num_heads=4, core_depth=1, tail_depth=0), dtype=torch.bfloat16)
    return path


@pytest.fixture(scope="module", params=[Precision.FP32, Precision.BF16, Precision.FP16], ids=str)
def precision(request: pytest.FixtureRequest) -> Precision:
    given: Precision = request.param
    return given


@pytest.fixture(scope="module")
def made(stored: Path, precision: Precision) -> ir.Model:
    return graph_model(stored_checkpoint(stored), STEP, precision)


def weights_in(made: ir.Model) -> dict[str, ir.TensorProtocol]:
    """What comes from the model as it is, or transposed, by its name there."""
    return {
        name.removeprefix("model."): value.const_value
        for name, value in made.graph.initializers.items()
        if name.startswith("model.") and value.const_value is not None
    }


def test_every_weight_is_that_of_the_rounded_model(made: ir.Model, stored: Path, precision: Precision) -> None:
    expected = in_precision(load_checkpoint(stored), precision).state_dict()
    found = weights_in(made)
    missing = {name for name in expected if name not in found and f"{name}.transposed" not in found}
    assert missing <= FOLDED
    for name, tensor in found.items():
        theirs = expected[name.removesuffix(".transposed")]
        wanted = TorchTensor(theirs.t() if name.endswith(".transposed") else theirs)
        assert (tensor.dtype, tensor.tobytes()) == (wanted.dtype, wanted.tobytes()), name


def test_a_graph_is_the_same_whatever_its_weights_are_stored_in(
    stored: Path, made: ir.Model, precision: Precision, tmp_path: Path
) -> None:
    ir.save(made, tmp_path / "step.onnx", external_data="step.onnx.data")
    widened = unremembered_export(load_checkpoint(stored), STEP, tmp_path / "widened", precision)
    for suffix in ("", ".data"):
        assert Path(f"{tmp_path / 'step.onnx'}{suffix}").read_bytes() == Path(f"{widened}{suffix}").read_bytes()


def test_no_weight_is_in_memory_before_it_is_written(made: ir.Model) -> None:
    tensors = [value.const_value for value in made.graph.initializers.values() if value.const_value is not None]
    waiting = sum(tensor.nbytes for tensor in tensors if isinstance(tensor, ir.LazyTensor))
    assert sum(tensor.nbytes for tensor in tensors) - waiting < 0.05 * waiting


def test_what_became_a_constant_is_not_written_too(made: ir.Model) -> None:
    assert "read.attn.q_proj.weight" not in {name.removesuffix(".transposed") for name in weights_in(made)}


@pytest.mark.parametrize("model", [tiny_model(), text_model()], ids=["classes", "text"])
def test_a_twin_has_shapes_alone_and_leaves_its_model(model: Elit) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    twin = weightless(model, FakeTensorMode())
    assert all(isinstance(tensor.data, FakeTensor) for tensor in (*twin.parameters(), *twin.buffers()))
    assert {name: tensor.shape for name, tensor in twin.state_dict().items()} == {
        name: tensor.shape for name, tensor in before.items()
    }
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(isinstance(tensor.data, FakeTensor) for tensor in model.parameters())


@pytest.mark.parametrize(("name", "value"), [("core.0.mlp.fc1.weight", math.nan), ("core.0.mlp.fc1.weight", 1e6)])
def test_weights_that_are_not_finite_are_no_graph(name: str, value: float, tmp_path: Path) -> None:
    model = tiny_model(core_depth=1, tail_depth=0)
    with torch.no_grad():
        model.get_parameter(name)[1, 2] = value
    with pytest.raises(ExportError, match=f"{re.escape(name)}.* has values that are not finite in torch.float16"):
        export_graph(model, STEP, tmp_path, Precision.FP16)
    assert not list(tmp_path.iterdir())

"""A decoder of videos for a single frame: equal to the whole one, with a third of its multiplications."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from elit_export.checkpoints.vae import read_decoder
from elit_export.checkpoints.vae_decoder import VaeDecoder, load_decoder
from elit_export.graphs.export import export_decoder
from elit_export.graphs.vae_frames import of_one_frame
from tests.helpers import max_relative
from tests.vae import load_vae, pixels_of, save_vae

SHAPE = {"dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "temperal_downsample": [False, True, True]}


def saved(folder: Path, **changes: Any) -> tuple[VaeDecoder, Any]:
    """A decoder, and the autoencoder of diffusers that it is of."""
    save_vae("qwen8", folder / "qwen8", **changes)
    return load_decoder(read_decoder(folder / "qwen8")), load_vae(folder / "qwen8")


def z_of(*size: int) -> torch.Tensor:
    values = np.random.default_rng(size).standard_normal((2, 8, *size))
    return torch.from_numpy(values.astype(np.float32))


def off_by(decoder: VaeDecoder, vae: Any, z: torch.Tensor) -> float:
    """Of the largest value. diffusers cuts off what is beyond 1, as pictures do."""
    return max_relative(of_one_frame(decoder)(z).clamp(-1, 1).numpy(), pixels_of(vae, z).numpy())


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[VaeDecoder, Any]:
    return saved(tmp_path_factory.mktemp("small"))


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (5, 8), (16, 9)])
def test_one_frame_is_what_diffusers_decodes(small: tuple[VaeDecoder, Any], size: tuple[int, int]) -> None:
    decoder, vae = small
    assert off_by(decoder, vae, z_of(*size)) <= 1e-5


@pytest.mark.parametrize(
    "changes", [{"base_dim": 48}, {**SHAPE, "base_dim": 12}, {"dim_mult": [2], "temperal_downsample": []}]
)
def test_other_shapes_are_what_diffusers_decodes(tmp_path: Path, changes: dict[str, Any]) -> None:
    decoder, vae = saved(tmp_path, **changes)
    assert off_by(decoder, vae, z_of(6, 4)) <= 1e-5


def test_a_third_of_the_multiplications_is_left(tmp_path: Path) -> None:
    """Nearly: convolutions of one point, after upsampling and in the attention have no frames to leave out."""
    decoder, _ = saved(tmp_path, **SHAPE, base_dim=12)

    def flops(module: nn.Module) -> int:
        with FlopCounterMode(display=False) as counter:
            module(z_of(4, 4))
        return int(counter.get_total_flops())

    assert 1 / 3 < flops(of_one_frame(decoder)) / flops(decoder) < 0.4


def test_the_decoder_itself_stays_and_its_other_weights_are_shared(small: tuple[VaeDecoder, Any]) -> None:
    decoder, vae = small
    copied = of_one_frame(decoder)
    assert not any(isinstance(module, nn.Conv3d) for module in copied.modules())
    assert torch.equal(decoder(z_of(4, 4)), pixels_of(vae, z_of(4, 4)))
    assert {module.mode for module in decoder.modules() if isinstance(module, nn.Upsample)} == {"nearest-exact"}
    own, shared = dict(decoder.named_parameters()), dict(copied.named_parameters())
    flat = [name for name, tensor in own.items() if tensor.dim() < 5 and name in shared]
    assert len(flat) > 10
    assert all(shared[name] is own[name] for name in flat)


@pytest.mark.parametrize("factor", [2, 3.0, 1.5, (2.0, 2.5)])
@pytest.mark.parametrize("size", [(4, 6), (5, 7)])
def test_upsampling_says_the_same(factor: Any, size: tuple[int, int]) -> None:
    upsample = nn.Sequential(nn.Upsample(scale_factor=factor, mode="nearest-exact"))
    x = z_of(*size)
    assert torch.equal(of_one_frame(upsample)(x), upsample(x))


@pytest.mark.parametrize("size", [None, (7, 9)])
def test_upsampling_to_a_size_stays(size: Any) -> None:
    upsample = nn.Sequential(nn.Upsample(size=size or (8, 8), mode="nearest-exact"))
    assert torch.equal(of_one_frame(upsample)(z_of(4, 6)), upsample(z_of(4, 6)))


def test_where_nothing_is_left_to_normalise_the_graph_says_what_diffusers_says(tmp_path: Path) -> None:
    """The first norm is of zeros alone in one image, and of a value near the least that counts in the other.

    Nor does the graph add an axis of time only to drop it.
    """
    decoder, _ = saved(tmp_path)
    z = z_of(8, 8)
    z[0], z[1] = 0, z[1] * 3e-13
    with torch.no_grad():
        for conv in (decoder.post_quant_conv, decoder.decoder.conv_in):
            conv.bias.zero_()
        expected = decoder(z)
    graph = export_decoder(decoder, read_decoder(tmp_path / "qwen8").spec(8), tmp_path / "graph")
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    (found,) = session.run(["pixels"], {"z": z.numpy()})
    nodes = onnx.load(graph, load_external_data=False).graph.node
    added = {name for node in nodes if node.op_type == "Unsqueeze" for name in node.output}
    assert added
    assert not [node for node in nodes if node.op_type == "Squeeze" and node.input[0] in added]
    assert expected.isfinite().all()
    assert (expected[0] - expected[1]).abs().max() > 1e-3  # the second is not cut off
    assert max_relative(found, expected.numpy()) <= 1e-5

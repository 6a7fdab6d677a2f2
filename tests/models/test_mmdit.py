"""ELIT-MM-DiT against diffusers' Qwen-Image, and what must hold for any weights."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from elit_export.checkpoints.diffusers import diffusers_name, own_tensor, save_interface
from elit_export.checkpoints.native import load_checkpoint
from elit_export.cost.flops import Cost, flops, flops_without_interface, guided_shares, layer_flops
from elit_export.errors import InputError
from elit_export.graphs.rounding import in_precision
from elit_export.models.elit import initialise
from elit_export.models.interface import group
from elit_export.models.mmdit import ElitMMDiT, run_joint
from elit_export.models.registry import named_spec, new_model
from elit_export.models.rope import MASKED, joint_rope_tables
from elit_export.spec import STEP, Budget, ModelSpec, Precision
from tests.helpers import GOLDEN, max_relative, weights_by_name
from tests.text_models import base_model, base_velocity, inputs_of, mask_of, text_model, text_spec, without_interface


def relative(found: Tensor, expected: Tensor) -> float:
    return max_relative(found.numpy(), expected.numpy())


# ---------------------------------------------------------------- the base model

SIZES: dict[str, dict[str, Any]] = {
    "even grid": {},
    "odd grid": {"input_size": 10, "group_size": 5, "head_depth": 2, "core_depth": 1},
    "larger heads, other channels": {"hidden_size": 192, "num_heads": 3, "in_channels": 16, "text_width": 20},
}
MASKS = {
    "all tokens": mask_of([7, 7, 7], 7),
    "three lengths": mask_of([7, 4, 1], 7),
    "holes": torch.tensor([[1, 0, 1, 0, 1, 1, 0], [0, 1, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1, 0]]),
    "no text": mask_of([0, 7, 3], 7),
}


@torch.inference_mode()
@pytest.mark.parametrize("size", list(SIZES))
def test_without_read_and_write_it_is_what_diffusers_computes(size: str, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    spec = text_spec(**SIZES[size])
    base = base_model(spec)
    base.save_pretrained(tmp_path / "base")
    save_interface(tmp_path / "interface.safetensors", text_model(**SIZES[size]))
    model = load_checkpoint(tmp_path / "base", interface=tmp_path / "interface.safetensors")
    assert isinstance(model, ElitMMDiT)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, *spec.sample_shape, generator=generator)
    text = torch.randn(3, 7, spec.text_width, generator=generator)
    errors = {
        name: relative(without_interface(model, x, t, text, mask), base_velocity(base, spec, x, t, text, mask))
        for name, mask in MASKS.items()
        for t in (torch.tensor([0.0, 0.37, 1.0]), torch.tensor([0.999, 0.5, 0.02]))
    }
    assert max(errors.values()) <= 1e-5, errors  # measured 3e-7


@torch.inference_mode()
def test_without_read_and_write_it_gives_the_numbers_of_diffusers() -> None:
    """As above where diffusers is not installed: what version 0.42.1 computed is kept."""
    model = text_model()
    own = {name: value for name, value in model.state_dict().items() if not name.startswith(("read.", "write."))}
    published = weights_by_name({diffusers_name(name, model.spec): tuple(own[name].shape) for name in own}, seed=6)
    for name, tensor in own.items():
        theirs = diffusers_name(name, model.spec)
        tensor.copy_(own_tensor(theirs, published[theirs]))
    with np.load(GOLDEN / "qwen_image_tiny.npz") as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file}
    expected = arrays.pop("velocity")
    assert relative(without_interface(model, **arrays), expected) <= 1e-5  # measured 3e-7


@torch.inference_mode()
def test_the_kept_numbers_are_those_of_diffusers() -> None:
    pytest.importorskip("diffusers")
    with np.load(GOLDEN / "qwen_image_tiny.npz") as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file}
    expected = arrays.pop("velocity")
    spec = text_spec()
    assert relative(base_velocity(base_model(spec), spec, **arrays), expected) <= 1e-5


# ---------------------------------------------------------------- text


@torch.inference_mode()
def test_what_padding_holds_changes_no_bit() -> None:
    model = text_model()
    inputs = inputs_of(model.spec, STEP, rows=3, text=6, kept=5)
    plain = model.step(*inputs.values())
    for rubbish in (1e6, math.nan, math.inf):
        text = torch.where(inputs["text_mask"][:, :, None] != 0, inputs["text"], rubbish)
        found = model.step(*(inputs | {"text": text}).values())
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, plain, strict=True))


@torch.inference_mode()
def test_prompts_of_different_lengths_in_a_batch_equal_each_alone() -> None:
    model = text_model()
    inputs = inputs_of(model.spec, STEP, rows=3, text=9, kept=5)
    together = model.step(*inputs.values())
    for row, length in enumerate((1, 2, 9)):
        one = {name: tensor if name == "latents" else tensor[row : row + 1] for name, tensor in inputs.items()}
        one |= {name: one[name][:, :length] for name in ("text", "text_mask")}
        for found, expected in zip(model.step(*one.values()), together, strict=True):
            assert relative(found, expected[row : row + 1]) <= 2e-6


@torch.inference_mode()
@pytest.mark.parametrize("changed", ["text", "text_mask", "t", "x"])
def test_every_input_matters(changed: str) -> None:
    model = text_model()
    inputs = inputs_of(model.spec, STEP, rows=2, text=4, kept=5)
    other = 1 - inputs[changed] if changed == "text_mask" else inputs[changed] + 0.5
    assert relative(model(*(inputs | {changed: other}).values()), model(*inputs.values())) > 1e-3


def test_the_bias_of_padding_is_nothing_in_every_precision() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        scores = torch.tensor([3.0, -80.0]) + torch.tensor([0.0, MASKED]).to(dtype).float()
        assert scores.softmax(0).tolist() == [1.0, 0.0]


# ---------------------------------------------------------------- positions


def test_positions_are_counted_from_the_middle_and_go_on_in_the_text() -> None:
    spec = text_spec(input_size=10, group_size=5)
    on_image, on_text = joint_rope_tables(spec, torch.device("cpu"))

    def angles(frame: int, row: int, column: int) -> list[float]:
        omegas = [[10_000 ** (-2 * i / size) for i in range(size // 2)] for size in (4, 14, 14)]
        return [at * w for at, axis in zip((frame, row, column), omegas, strict=True) for w in axis]

    for token in range(25):
        expected = torch.tensor(angles(0, token // 5 - 3, token % 5 - 3))
        torch.testing.assert_close(on_image[:, token], torch.stack([expected.cos(), expected.sin()]))
    for token in (0, 1, 40, 1023):
        expected = torch.tensor(angles(*3 * [2 + token]))
        torch.testing.assert_close(on_text[:, token], torch.stack([expected.cos(), expected.sin()]), atol=2e-4, rtol=0)


def test_a_latent_stands_where_the_token_at_its_slot_does() -> None:
    model = text_model()
    spatial, latent = model.positions(mask_of([3], 3), torch.arange(2))
    raster = group(torch.arange(64.0)[None, :, None], 8, 4)[0, :, :2].flatten().long()
    for mine, theirs in ((latent.cos, spatial.cos), (latent.sin, spatial.sin)):
        assert torch.equal(mine[:3], theirs[:3])  # text
        assert torch.equal(mine[3:], theirs[3:][raster])
    assert latent.bias.shape == (1, 1, 1, 3 + 4 * 2)


# ---------------------------------------------------------------- budgets


@torch.inference_mode()
def test_full_budget_equals_a_forward_that_never_drops() -> None:
    model = text_model()
    inputs = inputs_of(model.spec, STEP, rows=2, text=5, kept=16)
    x, t, text, mask, everything = inputs.values()
    c = model.t_embedder(t)
    spatial, latent = model.positions(mask, everything)
    words, tokens = run_joint(model.head, model.embed_text(text, mask), model.embed(x), c, spatial)
    latents, patches = model.read(tokens, c)
    words, core_out = run_joint(model.core, words, latents.flatten(1, 2), c, latent)
    tokens = model.write(patches, core_out.unflatten(1, latents.shape[1:3]))
    _, tokens = run_joint(model.tail, words, tokens, c, spatial)
    assert torch.equal(model(*inputs.values()), model.unpatchify(model.final(tokens, c)))


@torch.inference_mode()
@pytest.mark.parametrize("kept", [1, 5, 15])
def test_the_core_sees_the_first_latents_and_nothing_of_the_rest(kept: int) -> None:
    model = text_model()
    seen: list[Tensor] = []
    model.core[0].register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    inputs = inputs_of(model.spec, STEP, rows=2, text=3, kept=kept)
    plain = model(*inputs.values())

    def disturb_dropped(_: object, __: object, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        latents = output[0].clone()
        latents[:, :, kept:] += 1
        return latents, output[1]

    model.read.register_forward_hook(disturb_dropped)
    disturbed = model(*inputs.values())
    assert seen[0].shape == (2, model.spec.groups * kept, model.spec.hidden_size)
    assert torch.equal(seen[0], seen[1])
    assert not torch.allclose(plain, disturbed)  # Write attends to the dropped ones too


@pytest.mark.parametrize(
    ("text", "mask", "told"),
    [
        ((2, 3, 23), (2, 3), r"text has shape \(2, 3, 23\), must be \(B, 1 to 1024, 24\)"),
        ((2, 1025, 24), (2, 1025), r"text has shape \(2, 1025, 24\)"),
        ((2, 3), (2, 3), r"text has shape \(2, 3\)"),
        ((2, 3, 24), (2, 4), r"text_mask has shape \(2, 4\), the text \(2, 3\) tokens"),
        ((2, 3, 24), (1, 3), r"text_mask has shape \(1, 3\)"),
    ],
)
def test_text_that_does_not_fit_is_refused(text: tuple[int, ...], mask: tuple[int, ...], told: str) -> None:
    x, t, kept = torch.zeros(2, 4, 16, 16), torch.zeros(2), torch.arange(4)
    with pytest.raises(InputError, match=told):
        text_model()(x, t, torch.zeros(text), torch.ones(mask, dtype=torch.int64), kept)


# ---------------------------------------------------------------- step caching


@torch.inference_mode()
def test_reusing_the_residual_of_the_same_step_gives_its_velocity() -> None:
    model = text_model()
    inputs = inputs_of(model.spec, STEP, rows=2, text=3, kept=4)
    velocity, residual = model.step(*inputs.values())
    reused = model.reuse(inputs["x"], inputs["t"], residual, torch.zeros_like(residual), torch.zeros(2))
    torch.testing.assert_close(reused, velocity, rtol=1e-5, atol=1e-5)
    ahead = model.reuse(inputs["x"], inputs["t"], residual, residual / 2, torch.tensor([0.5, 0.0]))
    assert not torch.allclose(ahead[0], velocity[0])
    torch.testing.assert_close(ahead[1], velocity[1], rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_the_signal_is_what_the_image_stream_of_the_first_block_attends_with() -> None:
    model = text_model()
    inputs = inputs_of(model.spec, STEP, rows=2, text=3, kept=4)
    seen: list[Tensor] = []
    model.head[0].image.attn.q.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(*inputs.values())
    signal, distance = model.probe(inputs["x"], inputs["t"], 2 * seen[0])
    torch.testing.assert_close(signal, seen[0])
    torch.testing.assert_close(distance, torch.tensor([0.5, 0.5]))


# ---------------------------------------------------------------- new models, half precision


def test_a_new_model_is_filled_from_the_generator_alone_and_starts_at_zero() -> None:
    one, other = (initialise(new_model(text_spec()), torch.Generator().manual_seed(3)) for _ in range(2))
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
        assert tensor.isfinite().all(), name
    inputs = inputs_of(one.spec, STEP, rows=2, text=3, kept=4)
    assert not one(*inputs.values()).any()
    assert {name.rsplit(".", 1)[0] for name, tensor in one.state_dict().items() if not tensor.any()} >= {
        *("final.linear", "read.modulation.linear", "write.attn.proj", "write.mlp.fc2"),
        *(f"core.1.{stream}.modulation.linear" for stream in ("text", "image")),
    }


@torch.inference_mode()
@pytest.mark.parametrize("precision", [Precision.FP16, Precision.BF16])
def test_half_precision_rounds_attention_and_mlp_of_both_streams(precision: Precision) -> None:
    model = text_model()
    rounded = in_precision(model, precision)
    halves = {name.rsplit(".", 1)[0] for name, tensor in rounded.state_dict().items() if tensor.dtype != torch.float32}
    layers = ("attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc1", "mlp.fc2")
    wanted = {f"head.0.{stream}.{layer}" for stream in ("text", "image") for layer in layers}
    assert {name for name in halves if name.startswith("head")} == wanted
    assert not {name for name in halves if name.startswith(("img_in", "txt_in", "t_embedder", "final"))}
    inputs = inputs_of(model.spec, STEP, rows=2, text=3, kept=4)
    for found, expected in zip(rounded.step(*inputs.values()), model.step(*inputs.values()), strict=True):
        assert found.dtype == torch.float32
        assert 0 < relative(found, expected) < 0.05


# ---------------------------------------------------------------- specs that cannot be


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"text_width": 0, "num_classes": 3}, "text_width is 0, but it takes text"),
        ({"hidden_size": 48}, "heads of 24 channels .*; use a multiple of 32"),
        ({"rope": False}, "needs rope, qk_norm and qk_norm_kind 'rms', not False"),
        ({"qk_norm_kind": "layer"}, "not True, True and 'layer'"),
        ({"merge": 4, "coarse_depth": 2}, "coarse_depth is 2"),
        ({"backbone": "ELIT-SiT"}, "text_width is 24, but it takes classes"),
        ({"backbone": "ELIT-U-ViT"}, "text_width is 24, but it takes classes"),
        ({"backbone": "ELIT-HDiT"}, "text_width is 24, but it takes classes"),
    ],
)
def test_a_spec_that_cannot_be_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        new_model(text_spec(**changes))


# ---------------------------------------------------------------- cost

QWEN = named_spec("ELIT-Qwen-Image", resolution=1024)
# Of the base model with guidance, by the share of latents: 1024 pixels, a weak branch at 12.5 %.
PUBLISHED = {"full": 0.688, "half": 0.494, "quarter": 0.409, "eighth": 0.369}


def test_the_named_model_is_the_published_one() -> None:
    assert (QWEN.head_depth, QWEN.core_depth, QWEN.tail_depth) == (8, 44, 8)
    assert (QWEN.hidden_size, QWEN.num_heads, QWEN.text_width, QWEN.tokens) == (3072, 24, 3584, 4096)
    with torch.device("meta"):
        model = new_model(QWEN)
    base = sum(tensor.numel() for name, tensor in model.named_parameters() if not name.startswith(("read", "write")))
    assert base == pytest.approx(20.43e9, rel=1e-3)


@pytest.mark.parametrize(
    ("text", "weak", "least", "most"),
    [
        (128, "eighth", 0.006, 0.011),  # within 5 %, as our assumption makes it
        (512, "eighth", 0.037, 0.128),
        (1024, "eighth", 0.07, 0.26),
        (256, "sixteenth", -0.01, 0.001),
    ],
)
def test_published_costs_come_out_for_short_prompts(text: int, weak: str, least: float, most: float) -> None:
    found = guided_shares(QWEN, weak, text)
    excess = [found[name] / share - 1 for name, share in PUBLISHED.items()]
    assert least <= min(excess)
    assert max(excess) <= most
    strong, cheap = (flops(QWEN, QWEN.budget(name), text=text).total for name in ("half", weak))
    assert found["half"] == (strong + cheap) / (2 * flops_without_interface(QWEN, text=text))


@pytest.mark.parametrize(
    ("spec", "kept", "text"),
    [(text_spec(), 16, 3), (text_spec(), 5, 40), (text_spec(mlp_ratio=2.0, in_channels=3), 1, 1), (QWEN, 32, 128)],
)
def test_every_part_equals_what_torch_counts(spec: ModelSpec, kept: int, text: int) -> None:
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        shapes = torch.empty(1, text, spec.text_width), torch.ones(1, text, dtype=torch.int64), torch.arange(kept)
        ElitMMDiT(spec)(torch.empty(1, *spec.sample_shape), torch.empty(1), *shapes)
    by_module = {name.removeprefix("ElitMMDiT."): sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    parts = {
        part: sum(count for name, count in by_module.items() if name.startswith(part) and name.count(".") == 1)
        for part in ("head", "core", "tail")
    }
    parts |= {"read": by_module["read"], "write": by_module["write"]}
    parts["head"] += by_module["txt_in"]
    expected = Cost(other=counter.get_total_flops() - sum(parts.values()), **parts)
    budget = Budget(kept, spec.latents)
    assert asdict(flops(spec, budget, text=text)) == pytest.approx(asdict(expected), rel=0.01)
    attention = layer_flops(spec, budget, text=text)["core attention"]
    assert attention == sum(count for name, count in by_module.items() if is_projection_in_core(name))


def is_projection_in_core(name: str) -> bool:
    return name.startswith("core.") and name.endswith((".attn.q", ".attn.k", ".attn.v", ".attn.proj"))


@pytest.mark.parametrize(
    ("spec", "text", "told"), [(text_spec(), 0, "1 to 1024"), (text_spec(), 1025, "1 to 1024"), (None, 3, "must be 0")]
)
def test_the_cost_needs_the_length_of_the_text(spec: ModelSpec | None, text: int, told: str) -> None:
    spec = spec or named_spec("ELIT-SiT-S/2")
    for cost in (lambda: flops(spec, spec.full, text=text), lambda: flops_without_interface(spec, text=text)):
        with pytest.raises(InputError, match=told):
            cost()

"""ELIT-SiT against the reference implementation's numbers, and what must hold for any weights."""

from __future__ import annotations

from math import sqrt

import pytest
import torch
from torch import Tensor

from elit_export.errors import InputError
from elit_export.models.elit import initialise
from elit_export.models.interface import group, keep, ungroup
from elit_export.models.layers import run_blocks, sincos_position_embedding
from elit_export.models.sit import ElitSiT
from elit_export.spec import ModelSpec
from tests.helpers import Golden, max_relative, tiny_model, tiny_spec

Inputs = tuple[Tensor, Tensor, Tensor]


def inputs_of(spec: ModelSpec, rows: int = 2) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, *spec.sample_shape, generator=generator)
    return x, torch.linspace(0.2, 0.9, rows), torch.arange(rows) % spec.num_classes


def fresh_model(**changes: object) -> ElitSiT:
    return initialise(ElitSiT(tiny_spec(**changes)), torch.Generator().manual_seed(0))


# ---------------------------------------------------------------- golden numbers


@torch.inference_mode()
def test_forward_equals_the_reference_at_every_budget(
    any_golden: Golden, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = any_golden.load(tmp_path_factory.mktemp("golden"))
    arrays = any_golden.arrays("forward")
    x, t, y = (torch.from_numpy(arrays[name]) for name in "xty")
    errors = {
        kept: max_relative(model(x, t, y, torch.arange(kept)).numpy(), arrays[f"v_k{kept}"])
        for kept in any_golden.budgets
    }
    assert max(errors.values()) <= 1e-6, errors


def test_budgets_of_the_reference_differ(any_golden: Golden) -> None:
    arrays = any_golden.arrays("forward")
    full = arrays[f"v_k{any_golden.budgets[-1]}"]
    assert all(max_relative(arrays[f"v_k{kept}"], full) > 1e-3 for kept in any_golden.budgets[:-1])


# ---------------------------------------------------------------- budgets


@torch.inference_mode()
def test_full_budget_equals_a_forward_that_never_drops() -> None:
    model = tiny_model()
    x, t, y = inputs_of(model.spec)
    c = model.t_embedder(t) + model.y_embedder(y)
    tokens = run_blocks(model.head, model.patch_embed(x) + model.pos_embed, c)
    latents, patches = model.read(tokens, c)
    core_out = run_blocks(model.core, latents.flatten(1, 2), c).unflatten(1, latents.shape[1:3])
    tokens = run_blocks(model.tail, model.write(patches, core_out), c)
    assert torch.equal(model(x, t, y, torch.arange(model.spec.latents)), model.unpatchify(model.final(tokens, c)))


@torch.inference_mode()
@pytest.mark.parametrize("kept", [1, 2, 3])
def test_the_core_sees_the_first_latents_and_nothing_of_the_rest(kept: int) -> None:
    model = tiny_model()
    seen: list[Tensor] = []
    model.core[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    plain = model(*inputs_of(model.spec), torch.arange(kept))

    def disturb_dropped(_: object, __: object, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        latents = output[0].clone()
        latents[:, :, kept:] += 1
        return latents, output[1]

    model.read.register_forward_hook(disturb_dropped)
    disturbed = model(*inputs_of(model.spec), torch.arange(kept))
    assert seen[0].shape == (2, model.spec.groups * kept, model.spec.hidden_size)
    assert torch.equal(seen[0], seen[1])
    assert not torch.allclose(plain, disturbed)  # Write attends to the dropped ones too


@torch.inference_mode()
def test_without_a_core_every_budget_gives_the_same() -> None:
    model = tiny_model(core_depth=0)
    inputs = inputs_of(model.spec)
    full = model(*inputs, torch.arange(4))
    assert all(torch.equal(model(*inputs, torch.arange(kept)), full) for kept in (1, 2, 3))


@torch.inference_mode()
def test_the_order_of_groups_in_the_core_does_not_matter() -> None:
    model = tiny_model().double()
    latents = torch.randn(2, 4, 4, 32, generator=torch.Generator().manual_seed(1)).double()
    c, order = torch.ones(2, 32).double(), [2, 0, 3, 1]
    straight = run_blocks(model.core, keep(latents, torch.arange(3)), c).unflatten(1, (4, 3))
    shuffled = run_blocks(model.core, keep(latents[:, order], torch.arange(3)), c).unflatten(1, (4, 3))
    torch.testing.assert_close(shuffled, straight[:, order])


# ---------------------------------------------------------------- rows, residual, pixels


@torch.inference_mode()
def test_rows_do_not_mix() -> None:
    model = tiny_model()
    x, t, y = inputs_of(model.spec, rows=3)
    together = model(x, t, y, torch.arange(2))
    alone = torch.cat([model(x[i : i + 1], t[i : i + 1], y[i : i + 1], torch.arange(2)) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_the_residual_leads_from_the_embedder_to_the_final_layer() -> None:
    model = tiny_model()
    x, t, y = inputs_of(model.spec)
    velocity, residual = model.step(x, t, y, torch.arange(2))
    assert torch.equal(velocity, model(x, t, y, torch.arange(2)))
    assert residual.shape == (2, model.spec.tokens, model.spec.hidden_size)
    c = model.t_embedder(t) + model.y_embedder(y)
    again = model.unpatchify(model.final(model.patch_embed(x) + model.pos_embed + residual, c))
    torch.testing.assert_close(again, velocity, rtol=1e-4, atol=1e-4)


def test_unpatchify_puts_channel_last_patches_back() -> None:
    model = ElitSiT(tiny_spec(in_channels=3))
    values = torch.randn(1, 16, 12, generator=torch.Generator().manual_seed(0))
    image = model.unpatchify(values)
    assert image.shape == (1, 3, 8, 8)
    for row in range(8):
        for column in range(8):
            token, place = (row // 2) * 4 + column // 2, (row % 2) * 2 + column % 2
            assert torch.equal(image[0, :, row, column], values[0, token, 3 * place : 3 * place + 3])


# ---------------------------------------------------------------- a fresh model


@torch.inference_mode()
def test_a_fresh_model_says_nothing_so_it_would_hide_every_mistake() -> None:
    model = fresh_model()
    x, t, y = inputs_of(model.spec)
    assert not model(x, t, y, torch.arange(4)).any()
    assert tiny_model()(x, t, y, torch.arange(4)).all()


def test_adaln_the_final_layer_and_what_write_adds_start_at_zero() -> None:
    model = fresh_model()
    blocks = [*model.head, *model.core, *model.tail, model.read, model.final]
    layers = [block.modulation.linear for block in blocks]
    layers += [model.final.linear, model.write.attn.proj, model.write.mlp.fc2]
    assert len(blocks) == model.spec.depth + 2
    assert not any(parameter.any() for layer in layers for parameter in layer.parameters())


def test_a_fresh_write_hands_the_patches_on() -> None:
    model = fresh_model()
    patches, latents = torch.randn(2, 1, 4, 4, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.write(patches, latents), ungroup(patches + model.write.pos_embed, 4, 2))


@pytest.mark.parametrize(
    "name", ["read.query", "read.pos_embed", "read.latent_pos_embed", "write.pos_embed", "y_embedder.weight"]
)
def test_tables_start_normal_with_deviation_0_02(name: str) -> None:
    table = fresh_model(hidden_size=256, num_classes=15).get_parameter(name)
    assert table.std().item() == pytest.approx(0.02, rel=0.15)
    assert abs(table.mean().item()) < 0.004


@pytest.mark.parametrize("name", ["head.0.attn.qkv", "core.1.mlp.fc1", "tail.0.attn.proj", "read.attn.kv_proj"])
def test_linears_start_xavier_uniform_without_bias(name: str) -> None:
    layer = fresh_model(hidden_size=64).get_submodule(name)
    bound = sqrt(6 / (layer.in_features + layer.out_features))
    assert 0.97 * bound < layer.weight.abs().max().item() <= bound
    assert not layer.bias.any()


def test_the_patch_embedding_starts_xavier_uniform_over_its_flattened_kernel() -> None:
    weight = fresh_model(hidden_size=64, in_channels=4).patch_embed.proj.weight
    bound = sqrt(6 / (4 * 2 * 2 + 64))
    assert 0.97 * bound < weight.abs().max().item() <= bound


def test_initialisation_depends_on_the_generator_alone() -> None:
    one, same = fresh_model().state_dict(), fresh_model().state_dict()
    other = initialise(ElitSiT(tiny_spec()), torch.Generator().manual_seed(1)).state_dict()
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["read.query"], other["read.query"])


def test_the_position_code_is_fixed_and_stored() -> None:
    model = fresh_model()
    assert torch.equal(model.pos_embed, sincos_position_embedding(4, 32))
    assert "pos_embed" in model.state_dict()
    assert "pos_embed" not in dict(model.named_parameters())


# ---------------------------------------------------------------- groups


def test_a_group_that_does_not_divide_the_grid_is_refused() -> None:
    with pytest.raises(InputError, match="token grid 4 is not divisible by group_size 3"):
        tiny_spec(group_size=3)


def test_windows_of_one_token_are_allowed() -> None:
    tokens = torch.arange(16.0).reshape(1, 16, 1)
    assert group(tokens, 4, 1).shape == (1, 16, 1, 1)
    assert tiny_model(group_size=1)(*inputs_of(tiny_spec()), torch.arange(1)).all()

"""The latent interface: windows, keep and restore, the norm of its attention, Read and Write."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from elit_export.models.interface import RMS_EPS, CrossAttention, Read, RmsScale, Write, group, keep, restore, ungroup

GRIDS = [(4, 2), (6, 2), (6, 3), (5, 5), (4, 1)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(module: nn.Module) -> nn.Module:
    """Nothing in it is zero or uninitialised."""
    for seed, parameter in enumerate(module.parameters()):
        parameter.data = 0.3 * random(*parameter.shape, seed=seed)
    return module


# ---------------------------------------------------------------- group and ungroup


@pytest.mark.parametrize(("grid", "side"), GRIDS)
def test_groups_are_windows_in_row_major_order(grid: int, side: int) -> None:
    x = random(2, grid * grid, 3)
    grouped = group(x, grid, side)
    windows = grid // side
    assert grouped.shape == (2, windows**2, side**2, 3)
    for row in range(grid):
        for column in range(grid):
            window = (row // side) * windows + column // side
            place = (row % side) * side + column % side
            assert torch.equal(grouped[:, window, place], x[:, row * grid + column])


@pytest.mark.parametrize(("grid", "side"), GRIDS)
def test_ungroup_undoes_group_and_group_undoes_ungroup(grid: int, side: int) -> None:
    x = random(2, grid * grid, 3)
    grouped = group(x, grid, side)
    assert torch.equal(ungroup(grouped, grid, side), x)
    assert torch.equal(group(ungroup(grouped, grid, side), grid, side), grouped)


# ---------------------------------------------------------------- keep and restore


@pytest.mark.parametrize("kept", [1, 2, 4])
def test_keep_takes_the_first_latents_of_every_group(kept: int) -> None:
    latents = random(2, 3, 4, 5)
    sequence = keep(latents, torch.arange(kept))
    assert sequence.shape == (2, 3 * kept, 5)
    for index in range(3):
        assert torch.equal(sequence[:, index * kept : (index + 1) * kept], latents[:, index, :kept])


def test_full_budget_keeps_and_restores_bit_for_bit() -> None:
    latents = random(2, 3, 4, 5)
    everything = torch.arange(4)
    assert torch.equal(restore(keep(latents, everything), latents, everything), latents)


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_dropped_latents_keep_their_read_value(kept: int) -> None:
    latents, core_out = random(2, 3, 4, 5), random(2, 3 * kept, 5, seed=1)
    restored = restore(core_out, latents, torch.arange(kept))
    assert restored.shape == latents.shape
    assert torch.equal(restored[:, :, kept:], latents[:, :, kept:])
    assert torch.equal(restored[:, :, :kept].flatten(1, 2), core_out)


# ---------------------------------------------------------------- the norm of queries and keys


def test_rms_scale_has_its_eps_outside_the_root() -> None:
    x = 1e-3 * random(4, 64).double()
    norm = RmsScale(64).double()
    norm.scale.data = random(64, seed=1).double()
    mean_square = x.square().mean(-1, keepdim=True)
    outside = norm.scale * x / (mean_square.sqrt() + 1e-5)
    inside = norm.scale * x / (mean_square + 1e-5).sqrt()
    torch.testing.assert_close(norm(x), outside, rtol=1e-12, atol=1e-12)
    assert (norm(x) - inside).abs().max() > 0.1 * outside.abs().max()


def test_the_place_of_the_eps_shows_even_on_ordinary_values() -> None:
    x = random(4, 64).double()
    mean_square = x.square().mean(-1, keepdim=True)
    inside = x / (mean_square + RMS_EPS).sqrt()
    difference = (RmsScale(64).double()(x) - inside).abs().max() / inside.abs().max()
    assert 2e-6 < difference < 1e-5


def test_queries_are_normalised_over_the_full_width_before_the_head_split() -> None:
    attention = filled(CrossAttention(8, 2))
    projected = attention.q_proj(random(5, 8))
    queries = attention.queries(random(5, 8))
    whole = projected / (projected.square().mean(-1, keepdim=True).sqrt() + 1e-5) * attention.q_norm.scale
    torch.testing.assert_close(queries, torch.stack([whole[:, :4], whole[:, 4:]]))


# ---------------------------------------------------------------- Read and Write


def test_read_projects_its_queries_once_for_all_rows_and_groups() -> None:
    read = filled(Read(8, 2, grid=6, side=2))
    shapes: list[tuple[int, ...]] = []
    read.attn.q_proj.register_forward_hook(lambda _, inputs, __: shapes.append(tuple(inputs[0].shape)))
    read(random(3, 36, 8), random(3, 8))
    assert shapes == [(4, 8)]


def test_read_of_a_group_depends_on_that_group_alone() -> None:
    read = filled(Read(8, 2, grid=4, side=2))
    tokens, c = random(1, 16, 8), random(1, 8)
    changed = tokens.clone()
    changed[:, 5, 0] += 3  # row 1, column 1: group 0
    before, after = read(tokens, c)[0], read(changed, c)[0]
    assert torch.equal(before[:, 1:], after[:, 1:])
    assert not torch.allclose(before[:, 0], after[:, 0])


def test_latent_positions_lie_in_raster_order() -> None:
    read = filled(Read(8, 2, grid=4, side=2))
    tokens, c = random(1, 16, 8), random(1, 8)
    before = read(tokens, c)[0]
    read.latent_pos_embed.data[6] += 1  # row 1, column 2: second group, third latent
    moved = (read(tokens, c)[0] - before).abs().amax(dim=(0, 3)) > 0.5
    assert moved.nonzero().tolist() == [[1, 2]]


def test_read_passes_on_the_patches_with_its_position() -> None:
    read = filled(Read(8, 2, grid=4, side=2))
    tokens = random(1, 16, 8)
    assert torch.equal(read(tokens, random(1, 8))[1], group(tokens, 4, 2) + read.pos_embed)


@pytest.mark.parametrize("latent", range(4))
def test_write_attends_to_every_latent_of_the_group(latent: int) -> None:
    write = filled(Write(8, 2, grid=4, side=2))
    patches, latents = random(1, 4, 4, 8), random(1, 4, 4, 8, seed=1)
    changed = latents.clone()
    changed[:, 3, latent] += 1  # last group: rows 2 and 3, columns 2 and 3
    moved = (write(patches, changed) - write(patches, latents)).abs().amax(dim=(0, 2)) > 1e-6
    assert moved.nonzero().flatten().tolist() == [10, 11, 14, 15]

"""The parts of a transformer against the same maths written as loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from elit_export.models.layers import (
    Block,
    Mlp,
    Modulation,
    PatchEmbed,
    SelfAttention,
    SkipProjection,
    TimestepEmbedder,
    TokenMerge,
    TokenSplit,
    merge_heads,
    modulate,
    over_tokens,
    qk_norm_of,
    sincos_position_embedding,
    split_heads,
)
from elit_export.models.rope import rope_angles, rope_from_angles
from tests.helpers import tiny_spec


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------- embedders


def test_position_code_is_sine_then_cosine_of_the_column_then_of_the_row() -> None:
    grid, width = 3, 16
    code = sincos_position_embedding(grid, width)
    quarter = width // 4
    omega = [10_000 ** (-i / quarter) for i in range(quarter)]
    for row in range(grid):
        for column in range(grid):
            expected = [f(p * w) for p in (column, row) for f in (math.sin, math.cos) for w in omega]
            torch.testing.assert_close(code[0, row * grid + column], torch.tensor(expected), rtol=0, atol=1e-7)


def test_time_enters_as_it_is_cosines_first() -> None:
    embedder = TimestepEmbedder(8)
    embedder.mlp = nn.Sequential()
    t = torch.tensor([0.0, 0.3, 1.0])
    features = embedder(t)
    for row, time in enumerate(t.tolist()):
        angles = [time * math.exp(-math.log(10_000) * i / 128) for i in range(128)]
        expected = [math.cos(angle) for angle in angles] + [math.sin(angle) for angle in angles]
        torch.testing.assert_close(features[row], torch.tensor(expected), rtol=0, atol=1e-6)


def test_patches_become_tokens_in_raster_order() -> None:
    embed = PatchEmbed(in_channels=2, patch_size=2, width=5).double()
    x = random(1, 2, 6, 6)
    tokens = embed(x)
    for row in range(3):
        for column in range(3):
            patch = x[0, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            expected = (embed.proj.weight * patch).sum(dim=(1, 2, 3)) + embed.proj.bias
            torch.testing.assert_close(tokens[0, 3 * row + column], expected)


# ---------------------------------------------------------------- attention and MLP


def test_a_head_is_a_run_of_channels() -> None:
    x = random(2, 5, 12)
    heads = split_heads(x, 3)
    assert heads.shape == (2, 3, 5, 4)
    for head in range(3):
        assert torch.equal(heads[:, head], x[..., 4 * head : 4 * head + 4])


@pytest.mark.parametrize("shape", [(2, 5, 12), (2, 3, 5, 12)])
def test_merging_heads_undoes_splitting(shape: tuple[int, ...]) -> None:
    x = random(*shape)
    assert torch.equal(merge_heads(split_heads(x, 4)), x)


NORMS = {
    "none": qk_norm_of(tiny_spec()),
    "layer": qk_norm_of(tiny_spec(qk_norm=True)),
    "rms": qk_norm_of(tiny_spec(qk_norm=True, qk_norm_kind="rms")),
}


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("kind", list(NORMS))
def test_self_attention_is_the_textbook_formula(kind: str, rotated: bool) -> None:
    heads, size = 2, 8
    attention = SelfAttention(heads * size, heads, NORMS[kind]).double()
    x = random(1, 4, heads * size)
    angles = rope_angles(2, size, torch.device("cpu")).double()
    rotation = rope_from_angles(angles if rotated else torch.zeros_like(angles))
    q, k, v = attention.qkv(x)[0].chunk(3, dim=-1)
    mixed = []
    for head in range(heads):
        own = slice(size * head, size * (head + 1))
        turned_q, turned_k = (
            rotation(norm(part[:, None, own]))[:, 0] for norm, part in ((attention.q_norm, q), (attention.k_norm, k))
        )
        weights = turned_q @ turned_k.T / math.sqrt(size)
        mixed.append(weights.softmax(dim=-1) @ v[:, own])
    found = attention(x, rotation) if rotated else attention(x)
    torch.testing.assert_close(found[0], attention.proj(torch.cat(mixed, dim=-1)))


def test_norms_of_queries_and_keys() -> None:
    layer, rms = (SelfAttention(8, 2, NORMS[kind]).double() for kind in ("layer", "rms"))
    assert layer.q_norm.eps == layer.k_norm.eps == 1e-5
    x = random(3, 4)
    torch.testing.assert_close(rms.q_norm(x), x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt())


# ---------------------------------------------------------------- rotations


def test_angles_are_of_the_column_then_of_the_row() -> None:
    angles = rope_angles(3, 8, torch.device("cpu"))
    for row in range(3):
        for column in range(3):
            expected = [place * 10_000 ** (-i / 2) for place in (column, row) for i in range(2)]
            torch.testing.assert_close(angles[3 * row + column], torch.tensor(expected))


def test_a_rotation_turns_pairs_in_the_plane() -> None:
    angles = rope_angles(2, 8, torch.device("cpu")).double()
    x = random(1, 4, 3, 8)
    turned = rope_from_angles(angles)(x)
    as_complex = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    torch.testing.assert_close(turned, torch.cat([as_complex.real, as_complex.imag], dim=-1))


def test_what_attention_sees_depends_on_distances_alone() -> None:
    """q · k of two places is that of two others as far from each other."""
    grid = 4
    rotation = rope_from_angles(rope_angles(grid, 8, torch.device("cpu")).double())
    q, k = (random(8, seed=seed).expand(grid * grid, -1) for seed in (1, 2))
    scores = rotation(q[:, None])[:, 0] @ rotation(k[:, None])[:, 0].T
    torch.testing.assert_close(scores[0, grid + 2], scores[grid + 1, 2 * grid + 3])
    assert not torch.isclose(scores[0, grid + 2], scores[0, 2 * grid + 1])


# ---------------------------------------------------------------- joining, merging, splitting


def test_a_join_takes_the_tokens_first() -> None:
    join, x, skip = SkipProjection(3).double(), random(2, 4, 3), random(2, 4, 3, seed=1)
    weight = join.linear.weight
    torch.testing.assert_close(join(x, skip), x @ weight[:, :3].T + skip @ weight[:, 3:].T + join.linear.bias)


def test_merging_takes_tokens_that_follow_each_other() -> None:
    merge, x = TokenMerge(3, 5, 2).double(), random(2, 6, 3)
    merged = merge(x)
    assert merged.shape == (2, 3, 5)
    torch.testing.assert_close(merged[1, 2], merge.linear(torch.cat([x[1, 4], x[1, 5]])))


def test_splitting_puts_tokens_where_merging_took_them() -> None:
    merge, split, x = TokenMerge(3, 6, 2).double(), TokenSplit(6, 3, 2).double(), random(2, 6, 3)
    for layer in (merge.linear, split.linear):
        layer.weight.data = torch.eye(6, dtype=torch.float64)
        layer.bias.data.zero_()
    assert torch.equal(split(merge(x)), x)


def test_mlp_uses_the_tanh_form_of_gelu() -> None:
    mlp = Mlp(4, 7, bias=True).double()
    x = random(3, 4)
    h = mlp.fc1(x)
    gelu = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    torch.testing.assert_close(mlp(x), mlp.fc2(gelu), rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- adaLN-Zero


@pytest.mark.parametrize(("shape", "expected"), [((2, 5, 4), (2, 1, 4)), ((2, 3, 5, 4), (2, 1, 1, 4))])
def test_a_condition_is_spread_over_the_token_axes(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert over_tokens(random(2, 4), random(*shape)).shape == expected


def test_modulate_scales_then_shifts_each_sample_by_its_own_condition() -> None:
    x, shift, scale = random(2, 3, 5, 4), random(2, 4, seed=1), random(2, 4, seed=2)
    found = modulate(x, shift, scale)
    for sample in range(2):
        torch.testing.assert_close(found[sample], x[sample] * (1 + scale[sample]) + shift[sample])


def test_modulation_gives_its_chunks_in_order() -> None:
    modulation = Modulation(4, chunks=3).double()
    c = random(2, 4)
    whole = modulation.linear(c * torch.sigmoid(c))
    assert torch.equal(torch.cat(modulation(c), dim=-1), modulation.linear(torch.nn.functional.silu(c)))
    torch.testing.assert_close(modulation(c)[1], whole[:, 4:8])


@pytest.mark.parametrize("width_factor", [1, 2])
def test_block_reads_its_six_chunks_as_shift_scale_gate_twice(width_factor: int) -> None:
    block = Block(tiny_spec(hidden_size=8), width_factor=width_factor).double()
    x, c = random(2, 5, 8 * width_factor), random(2, 8, seed=1)
    shift1, scale1, gate1, shift2, scale2, gate2 = (part[:, None] for part in block.modulation(c))

    def norm(h: Tensor) -> Tensor:
        return (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()

    h = x + gate1 * block.attn(norm(x) * (1 + scale1) + shift1)
    h = h + gate2 * block.mlp(norm(h) * (1 + scale2) + shift2)
    torch.testing.assert_close(block(x, c), h, rtol=1e-12, atol=1e-12)

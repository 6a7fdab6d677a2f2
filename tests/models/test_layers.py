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
    TimestepEmbedder,
    merge_heads,
    modulate,
    over_tokens,
    position_code,
    split_heads,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------- embedders


def test_position_code_is_sine_then_cosine_of_the_column_then_of_the_row() -> None:
    grid, width = 3, 16
    code = position_code(grid, width)
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


@pytest.mark.parametrize("qk_norm", [False, True])
def test_self_attention_is_the_textbook_formula(qk_norm: bool) -> None:
    heads, size = 2, 6
    attention = SelfAttention(heads * size, heads, qk_norm=qk_norm).double()
    x = random(1, 5, heads * size)
    q, k, v = attention.qkv(x)[0].chunk(3, dim=-1)
    mixed = []
    for head in range(heads):
        own = slice(size * head, size * (head + 1))
        weights = attention.q_norm(q[:, own]) @ attention.k_norm(k[:, own]).T / math.sqrt(size)
        mixed.append(weights.softmax(dim=-1) @ v[:, own])
    torch.testing.assert_close(attention(x)[0], attention.proj(torch.cat(mixed, dim=-1)))


def test_norm_of_queries_and_keys_has_eps_1e_5() -> None:
    attention = SelfAttention(8, 2, qk_norm=True)
    assert attention.q_norm.eps == attention.k_norm.eps == 1e-5


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


def test_block_reads_its_six_chunks_as_shift_scale_gate_twice() -> None:
    block = Block(8, 2, 16, qk_norm=False).double()
    x, c = random(2, 5, 8), random(2, 8, seed=1)
    shift1, scale1, gate1, shift2, scale2, gate2 = (part[:, None] for part in block.modulation(c))

    def norm(h: Tensor) -> Tensor:
        return (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()

    h = x + gate1 * block.attn(norm(x) * (1 + scale1) + shift1)
    h = h + gate2 * block.mlp(norm(h) * (1 + scale2) + shift2)
    torch.testing.assert_close(block(x, c), h, rtol=1e-12, atol=1e-12)

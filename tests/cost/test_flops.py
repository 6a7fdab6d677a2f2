"""The cost model against torch's own counter and against published numbers."""

from __future__ import annotations

import functools
import re
from collections import Counter
from dataclasses import asdict
from itertools import pairwise

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from elit_export.cost.flops import Cost, flops, layer_flops
from elit_export.models.registry import named_spec
from elit_export.models.sit import ElitSiT
from elit_export.spec import Budget, ModelSpec
from tests.helpers import tiny_spec

XL_256 = named_spec("ELIT-SiT-XL/2")
XL_512 = named_spec("ELIT-SiT-XL/2", resolution=512)
XL_PAPER = named_spec("ELIT-SiT-XL/2", head_depth=4)
COUNTED = {
    "XL/2 at 256": (XL_256, (1, 16)),
    "B/4 at 512": (named_spec("ELIT-SiT-B/4", resolution=512), (3, 64)),
    "S/8 at 256": (named_spec("ELIT-SiT-S/8"), (1, 7, 16)),
    "tiny": (tiny_spec(), (1, 2, 3, 4)),
    "wide MLP, one group": (tiny_spec(mlp_ratio=6.0, input_size=4, in_channels=3), (1, 4)),
}
each_counted = pytest.mark.parametrize(("spec", "each_kept"), COUNTED.values(), ids=COUNTED.keys())
# Giga-FLOPs of one forward pass of one image, by kept latents.
PUBLISHED = [
    (XL_256, {1: 118.3, 2: 126.5, 4: 143.1, 8: 176.6, 16: 245.4}),
    (XL_512, {4: 516, 8: 550, 16: 618, 32: 763, 64: 1082}),
    (XL_PAPER, {1: 86.5, 2: 96.8, 4: 117.5, 8: 159.4, 16: 245.4}),
]


def budget(spec: ModelSpec, kept: int) -> Budget:
    return Budget(kept, spec.latents)


@functools.cache
def counted_by_torch(spec: ModelSpec, kept: int) -> dict[str, int]:
    """FLOPs by the name of modules; `Global` is all of them."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        x, t, y = torch.empty(1, *spec.sample_shape), torch.empty(1), torch.empty(1, dtype=torch.int64)
        ElitSiT(spec)(x, t, y, torch.arange(kept))
    return {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}


def parts_by_torch(spec: ModelSpec, kept: int) -> Cost:
    by_module = counted_by_torch(spec, kept)

    def blocks(part: str) -> int:
        depth = {"head": spec.head_depth, "core": spec.core_depth, "tail": spec.tail_depth}[part]
        return sum(by_module[f"ElitSiT.{part}.{index}"] for index in range(depth))

    parts = {name: blocks(name) for name in ("head", "core", "tail")}
    parts |= {name: by_module[f"ElitSiT.{name}"] for name in ("read", "write")}
    return Cost(other=by_module["Global"] - sum(parts.values()), **parts)


@each_counted
def test_every_part_equals_what_torch_counts(spec: ModelSpec, each_kept: tuple[int, ...]) -> None:
    for kept in each_kept:
        found, expected = asdict(flops(spec, budget(spec, kept))), asdict(parts_by_torch(spec, kept))
        assert found == pytest.approx(expected, rel=0.01), f"K={kept}"


def test_published_costs_are_met_within_one_percent() -> None:
    for spec, by_kept in PUBLISHED:
        found = {kept: flops(spec, budget(spec, kept)).total / 1e9 for kept in by_kept}
        name = f"{spec.head_depth}-{spec.core_depth}, {spec.latents} latents"
        assert found == pytest.approx(by_kept, rel=0.01), name


@pytest.mark.parametrize("spec", [XL_256, XL_512, tiny_spec()])
def test_only_the_core_depends_on_the_budget(spec: ModelSpec) -> None:
    costs = [asdict(flops(spec, one)) for one in spec.budgets]
    core = [cost.pop("core") for cost in costs]
    assert all(cost == costs[0] for cost in costs)
    assert all(low < high for low, high in pairwise(core))


@each_counted
def test_groups_of_layers_are_what_torch_counts_of_them(spec: ModelSpec, each_kept: tuple[int, ...]) -> None:
    for kept in each_kept:
        expected = groups_by_torch(spec, kept)
        found = layer_flops(spec, budget(spec, kept))
        assert found == pytest.approx(dict.fromkeys(found, 0) | expected, rel=0.01), f"K={kept}"


def groups_by_torch(spec: ModelSpec, kept: int) -> Counter[str]:
    counted = counted_by_torch(spec, kept)
    inner = {name.rpartition(".")[0] for name in counted}
    leaves = {name.removeprefix("ElitSiT."): count for name, count in counted.items() if name not in inner | {"Global"}}
    expected = Counter({"attention products": counted["Global"] - sum(leaves.values())})
    for name, count in leaves.items():
        part, _, module = name.partition(".")
        if kind := re.match(r"\d+\.(attn|mlp)\.", module):
            expected[f"{part} attention" if kind[1] == "attn" else f"{part} MLP"] += count
        elif part in ("read", "write") and re.match(r"attn|mlp", module):
            expected[part.title()] += 0 if name == "read.attn.q_proj" else count
    return expected


def test_parts_sum_to_the_total() -> None:
    cost = Cost(head=1, read=20, core=300, write=4_000, tail=50_000, other=600_000)
    assert cost.total == 654_321


@pytest.mark.parametrize(("spec", "saved"), [(XL_256, 0.259), (XL_PAPER, 0.324)])
def test_a_weak_branch_of_a_sixteenth_saves_the_published_share(spec: ModelSpec, saved: float) -> None:
    full, least = (flops(spec, one).total for one in (spec.full, budget(spec, 1)))
    assert 1 - (full + least) / (2 * full) == pytest.approx(saved, abs=0.003)

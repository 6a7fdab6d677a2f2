"""Budgets, profiles and model shapes: what is read, what is refused, and with which words."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elit_export.errors import InputError
from elit_export.models.registry import RELEASED_NAMES, named_spec
from elit_export.spec import (
    CACHE_GRAPHS,
    DECODE,
    FUSED,
    PIXELS,
    SD_VAE,
    STEP,
    Budget,
    DataFacts,
    DecoderSpec,
    ModelSpec,
    Range,
    Role,
    by_channel_text,
    default_profiles,
    listed,
)
from tests.helpers import tiny_spec
from tests.spec.refusals import wrong_refusals

ROWS = Range(1, 2, 8)
MODEL_GRAPHS = (STEP, *CACHE_GRAPHS, FUSED)


@st.composite
def kept_of(draw: st.DrawFn) -> tuple[int, int]:
    """(K, J) for any group side up to 32."""
    of = draw(st.integers(1, 32)) ** 2
    return draw(st.integers(1, of)), of


# ---------------------------------------------------------------- budgets


FORMS: list[tuple[str | int | Budget, int]] = [
    ("full", 16),
    ("half", 8),
    ("quarter", 4),
    ("eighth", 2),
    ("sixteenth", 1),
    ("1", 1),
    ("16", 16),
    (5, 5),
    ("4of16", 4),
    (" 4of16 ", 4),
    ("0.25", 4),
    (".25", 4),
    ("1.0", 16),
    ("1.", 16),
    (Budget(7, 16), 7),
]


def test_every_form_of_a_budget_is_read() -> None:
    found = [(text, Budget.parse(text, 16)) for text, _ in FORMS]
    assert found == [(text, Budget(kept, 16)) for text, kept in FORMS]


def test_a_whole_number_counts_latents_and_a_point_makes_a_share() -> None:
    assert Budget.parse("1", 16) == Budget(1, 16)
    assert Budget.parse("1.0", 16) == Budget(16, 16)


@given(kept_of())
def test_every_share_reads_back(pair: tuple[int, int]) -> None:
    kept, of = pair
    assert Budget.parse(str(kept / of), of) == Budget(kept, of)


@given(kept_of())
def test_the_written_form_reads_back(pair: tuple[int, int]) -> None:
    kept, of = pair
    assert Budget.parse(str(Budget(kept, of)), of) == Budget(kept, of)


@given(kept_of(), st.floats(0.0011, 0.9989))
def test_a_share_between_two_budgets_is_refused(pair: tuple[int, int], excess: float) -> None:
    kept, of = pair
    with pytest.raises(InputError, match="not a whole number of latents"):
        Budget.parse(f"{(kept - 1 + excess) / of:.15f}", of)


def test_a_share_may_miss_by_a_thousandth_of_a_latent() -> None:
    assert Budget.parse("0.33333", 144) == Budget(48, 144)  # 47.9995 latents
    with pytest.raises(InputError, match=r"0\.333 of 144 .*47of144 .*48of144"):
        Budget.parse("0.333", 144)  # 47.952 latents


NO_BUDGETS: list[tuple[tuple[str | Budget, int], str]] = [
    (("0", 16), "0of16.* keeps 1 to 16"),
    (("17of16", 16), "17of16.* keeps 1 to 16"),
    (("17", 16), "17of16.* keeps 1 to 16"),
    (("4of64", 16), "4of64 does not fit a model with 16 latents"),
    ((Budget(4, 64), 16), "4of64 does not fit a model with 16 latents"),
    (("eighth", 4), "'eighth'.* 4 latents per group have no whole eighth; give a number of latents, 1 to 4"),
    (("half", 9), "9 latents per group have no whole half"),
    (("2.0", 16), r"2 of 16 .*use 16of16 \(1\)$"),
    (("-4", 16), r"'-4' is not .*4of16, 0\.25.*sixteenth"),
    (("third", 16), "'third' is not .*full, half, quarter, eighth, sixteenth"),
    (("4of", 16), "'4of' is not"),
    (("", 16), "'' is not"),
    ((".", 16), r"'\.' is not"),
    (("nan", 16), "'nan' is not"),
]


def test_what_is_no_budget_is_refused_with_what_would_be() -> None:
    assert wrong_refusals(lambda case: Budget.parse(*case), NO_BUDGETS) == {}


@pytest.mark.parametrize(
    ("text", "of", "neighbours"),
    [
        ("0.3", 16, "4of16 (0.25) or 5of16 (0.3125)"),
        # The reference cuts this to 4 latents without a word, where 5 were meant.
        ("0.0781", 64, "4of64 (0.0625) or 5of64 (0.078125)"),
        ("0.99", 16, "15of16 (0.9375) or 16of16 (1)"),
        ("0.1", 16, "1of16 (0.0625) or 2of16 (0.125)"),
    ],
)
def test_a_share_that_is_not_whole_names_both_neighbours(text: str, of: int, neighbours: str) -> None:
    with pytest.raises(InputError, match=re.escape(f"use {neighbours}") + "$"):
        Budget.parse(text, of)


@pytest.mark.parametrize("text", ["0.0", "0.03"])
def test_a_share_below_one_latent_names_one_latent_alone(text: str) -> None:
    with pytest.raises(InputError, match=r"use 1of16 \(0\.0625\)$"):
        Budget.parse(text, 16)


def test_an_input_error_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="0of16"):
        Budget(0, 16)


def test_budgets_are_in_order_and_show_their_share() -> None:
    assert sorted([Budget(16, 16), Budget(1, 16), Budget(4, 16)]) == [Budget(1, 16), Budget(4, 16), Budget(16, 16)]
    assert Budget(4, 16).share == 0.25


@pytest.mark.parametrize(
    ("kept", "text"),
    [
        ((), "none"),
        ((3,), "3of16"),
        ((2, 1), "1of16, 2of16"),
        ((3, 1, 2), "1of16 to 3of16"),
        ((1, 2, 4), "1of16, 2of16, 4of16"),
    ],
)
def test_budgets_are_listed_short(kept: tuple[int, ...], text: str) -> None:
    assert listed(Budget(k, 16) for k in kept) == text


# ---------------------------------------------------------------- ranges and profiles


def test_a_range_holds_its_ends_and_nothing_beyond() -> None:
    range_ = Range(2, 3, 5)
    assert [value for value in range(8) if value in range_] == [2, 3, 4, 5]
    assert range_.corners() == (2, 3, 5)
    assert str(range_) == "2..3..5"


@pytest.mark.parametrize("numbers", [(0, 1, 2), (2, 1, 3), (1, 4, 3), (3, 3, 2)])
def test_a_range_out_of_order_is_refused(numbers: tuple[int, int, int]) -> None:
    told = "..".join(map(str, numbers))
    with pytest.raises(InputError, match=re.escape(told) + ".* 1 <= min <= opt <= max"):
        Range(*numbers)


@pytest.mark.parametrize(
    ("of", "expected"),
    [
        (64, {"full": (49, 64, 64), "half": (17, 32, 48), "quarter": (9, 16, 16), "sixteenth": (1, 4, 8)}),
        (16, {"full": (13, 16, 16), "half": (5, 8, 12), "quarter": (3, 4, 4), "sixteenth": (1, 1, 2)}),
        (4, {"full": (4, 4, 4), "half": (2, 2, 3), "quarter": (1, 1, 1)}),
        (1, {"full": (1, 1, 1)}),
    ],
)
def test_default_profiles(of: int, expected: dict[str, tuple[int, int, int]]) -> None:
    profiles = default_profiles(of, ROWS)
    assert {profile.name: profile.latents.corners() for profile in profiles} == expected
    assert all(profile.rows == ROWS for profile in profiles)


@given(st.integers(1, 4096))
def test_default_profiles_cover_every_budget_once(of: int) -> None:
    profiles = default_profiles(of, ROWS)
    served = sorted(k for profile in profiles for k in range(profile.latents.min, profile.latents.max + 1))
    assert served == list(range(1, of + 1))


# ---------------------------------------------------------------- named models


def test_the_names_are_sizes_by_patches() -> None:
    assert len(RELEASED_NAMES) == 12
    assert {"ELIT-SiT-S/8", "ELIT-SiT-XL/2"} <= set(RELEASED_NAMES)


def test_xl_2_at_256_is_the_released_model() -> None:
    assert named_spec("ELIT-SiT-XL/2", resolution=256).to_dict() == {
        "in_channels": 4,
        "input_size": 32,
        "patch_size": 2,
        "hidden_size": 1152,
        "num_heads": 16,
        "head_depth": 8,
        "core_depth": 16,
        "tail_depth": 4,
        "group_size": 4,
        "qk_norm": False,
        "mlp_ratio": 4.0,
        "num_classes": 1000,
        "backbone": "ELIT-SiT",
        "rope": False,
        "qk_norm_kind": "layer",
        "merge": 1,
        "coarse_depth": 0,
        "text_width": 0,
    }


@pytest.mark.parametrize(("resolution", "latents", "tokens"), [(256, 16, 256), (512, 64, 1024)])
def test_xl_2_has_16_groups_at_both_resolutions(resolution: int, latents: int, tokens: int) -> None:
    spec = named_spec("ELIT-SiT-XL/2", resolution=resolution)
    assert (spec.groups, spec.latents, spec.tokens) == (16, latents, tokens)
    assert (spec.null_class, spec.mlp_size) == (1000, 4608)
    assert spec.full == Budget(latents, latents)


def test_the_split_of_the_paper() -> None:
    spec = named_spec("ELIT-SiT-XL/2", head_depth=4)
    assert (spec.head_depth, spec.core_depth, spec.tail_depth) == (4, 20, 4)


@pytest.mark.parametrize("name", ["ELIT-SiT-XXL/2", "ELIT-SiT-XL/3", "XL/2", "elit-sit-xl/2", ""])
def test_an_unknown_name_lists_the_known_ones(name: str) -> None:
    with pytest.raises(
        InputError, match=re.escape(repr(name)) + ".*known: ELIT-SiT-S/2, .*ELIT-HDiT-XL/8, ELIT-Qwen-Image$"
    ):
        named_spec(name)


@pytest.mark.parametrize("resolution", [0, -64, 32, 250])
def test_a_resolution_that_does_not_divide_is_refused(resolution: int) -> None:
    with pytest.raises(InputError, match=f"resolution {resolution} is not a multiple of 64"):
        named_spec("ELIT-SiT-XL/2", resolution=resolution)


def test_a_head_deeper_than_the_model_is_refused() -> None:
    with pytest.raises(InputError, match="core_depth is -1"):
        named_spec("ELIT-SiT-S/2", head_depth=11)


# ---------------------------------------------------------------- shapes


def test_shapes_of_a_small_model() -> None:
    spec = tiny_spec()
    assert (spec.grid, spec.tokens, spec.groups, spec.latents, spec.depth, spec.mlp_size) == (4, 16, 4, 4, 4, 64)
    assert spec.sample_shape == (1, 8, 8)
    assert spec.budgets == tuple(Budget(kept, 4) for kept in (1, 2, 3, 4))


NO_SHAPES: list[tuple[dict[str, Any], str]] = [
    ({"input_size": 9}, "input_size 9 is not divisible by patch_size 2"),
    ({"group_size": 3}, "token grid 4 is not divisible by group_size 3"),
    ({"num_heads": 3}, "hidden_size 32 is not divisible by num_heads 3"),
    ({"hidden_size": 18}, "hidden_size 18 is not divisible by .* sin-cos embedding 4"),
    ({"patch_size": 0}, "patch_size is 0, must be at least 1"),
    ({"num_classes": 0}, "num_classes is 0, must be at least 1"),
    ({"in_channels": -1}, "in_channels is -1, must be at least 1"),
    ({"head_depth": -1}, "head_depth is -1, must not be negative"),
    ({"text_width": -1, "num_classes": 0}, "text_width is -1, must not be negative"),
    ({"text_width": 8}, "num_classes is 3 and text_width 8: a model takes classes or text; set the other to 0"),
]


def test_a_shape_that_cannot_be_is_refused() -> None:
    assert wrong_refusals(lambda changes: tiny_spec(**changes), NO_SHAPES) == {}


def test_a_model_reads_its_own_budgets() -> None:
    assert tiny_spec().budget("quarter") == Budget(1, 4)
    with pytest.raises(InputError, match="4of16 does not fit a model with 4 latents"):
        tiny_spec().budget("4of16")


@pytest.mark.parametrize(
    ("group_size", "names"),
    [
        (4, {"full": 16, "half": 8, "quarter": 4, "eighth": 2, "sixteenth": 1}),
        (2, {"full": 4, "half": 2, "quarter": 1}),
        (1, {"full": 1}),
    ],
)
def test_named_budgets_are_the_whole_ones_largest_first(group_size: int, names: dict[str, int]) -> None:
    found = tiny_spec(group_size=group_size).named_budgets
    assert [(name, budget.kept) for name, budget in found.items()] == list(names.items())


def test_graph_tensors_do_not_depend_on_the_budget() -> None:
    spec = tiny_spec()
    assert [(t.name, t.dtype, t.dims) for t in spec.graph(STEP).inputs] == [
        ("x", "float32", ("rows", 1, 8, 8)),
        ("t", "float32", ("rows",)),
        ("y", "int64", ("rows",)),
        ("latents", "int64", ("latents",)),
    ]
    assert [(t.name, t.dtype, t.dims) for t in spec.graph(STEP).outputs] == [
        ("velocity", "float32", ("rows", 1, 8, 8)),
        ("residual", "float32", ("rows", 16, 32)),
    ]


def test_graph_tensors_of_the_cache() -> None:
    spec = tiny_spec()
    common = ["x", "t", "y"]
    names = {
        graph: ([t.name for t in spec.graph(graph).inputs], [t.name for t in spec.graph(graph).outputs])
        for graph in CACHE_GRAPHS
    }
    assert names == {
        "probe": ([*common, "signal_prev"], ["signal", "distance"]),
        "reuse": ([*common, "residual", "residual_prev", "forecast"], ["velocity"]),
        "time": (["t"], ["embedding"]),
    }
    every = [t for graph in CACHE_GRAPHS for t in (*spec.graph(graph).inputs, *spec.graph(graph).outputs)]
    assert {(t.name, t.dtype, t.dims) for t in every if t.name not in (*common, "velocity")} == {
        *((name, "float32", ("rows", 16, 32)) for name in ("signal_prev", "signal", "residual", "residual_prev")),
        *((name, "float32", ("rows",)) for name in ("distance", "forecast")),
        ("embedding", "float32", ("rows", 32)),
    }


def test_text_is_an_input_of_the_graphs_that_run_blocks() -> None:
    spec = tiny_spec(text_width=8, num_classes=0)
    text = [("text", "float32", ("rows", "text", 8)), ("text_mask", "int64", ("rows", "text"))]
    assert [(t.name, t.dtype, t.dims) for t in spec.conditioning] == text
    assert [t.name for t in spec.graph(STEP).inputs] == ["x", "t", "text", "text_mask", "latents"]
    assert [t.name for t in spec.graph("probe").inputs] == ["x", "t", "signal_prev"]
    assert [t.name for t in spec.graph("reuse").inputs] == ["x", "t", "residual", "residual_prev", "forecast"]
    assert [t.name for t in spec.graph("time").inputs] == ["t"]
    assert [graph for graph in MODEL_GRAPHS if spec.graph(graph).takes_text] == [STEP, FUSED]


def test_what_holds_of_each_graph() -> None:
    spec = tiny_spec()
    decoder = DecoderSpec(channels=1, image_channels=3, scale=(1.0,), shift=(0.0,), factor=2, side=8)
    graphs = [*(spec.graph(name) for name in MODEL_GRAPHS), decoder.graph]
    assert [graph.name for graph in graphs] == [*MODEL_GRAPHS, DECODE]
    assert {graph.name for graph in graphs if graph.exact} == {*CACHE_GRAPHS, DECODE}
    assert {graph.name for graph in graphs if graph.light} == set(CACHE_GRAPHS)
    assert {graph.name for graph in graphs if graph.elastic} == {STEP, FUSED}
    assert {graph.name for graph in graphs if graph.has_if} == {FUSED}
    host = {"velocity", "distance", "embedding", "computed", "pixels"}
    assert {graph.name: graph.on_host for graph in graphs} == {
        graph.name: host & {tensor.name for tensor in graph.outputs} for graph in graphs
    }
    assert not any(tensor.on_host for graph in graphs for tensor in graph.inputs)


def test_tensors_have_roles() -> None:
    step = tiny_spec().graph(STEP)
    assert [tensor.role for tensor in step.inputs] == [Role.SAMPLE, Role.TIME, Role.LABEL, Role.LATENTS]
    assert step.input(Role.LATENTS).name == "latents"
    prompted = tiny_spec(text_width=8, num_classes=0).graph(STEP)
    assert [tensor.role for tensor in prompted.inputs][2:4] == [Role.TEXT, Role.TEXT_MASK]


def test_a_graph_that_a_model_does_not_have_is_named() -> None:
    with pytest.raises(InputError, match="no graph 'decode'; it has step, probe, reuse, time, fused"):
        tiny_spec().graph(DECODE)


# ---------------------------------------------------------------- storage


@pytest.mark.parametrize("spec", [tiny_spec(qk_norm=True), named_spec("ELIT-SiT-L/4", resolution=512)])
def test_a_spec_survives_json(spec: ModelSpec) -> None:
    assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_a_stored_spec_names_what_is_missing_and_what_is_unknown() -> None:
    values = tiny_spec().to_dict()
    del values["qk_norm"], values["core_depth"]
    del values["text_width"]  # has a default
    with pytest.raises(InputError, match="missing core_depth, missing qk_norm, unknown depth"):
        ModelSpec.from_dict(values | {"depth": 4})


def test_a_stored_spec_is_checked_again() -> None:
    with pytest.raises(InputError, match="token grid 4 is not divisible by group_size 3"):
        ModelSpec.from_dict(tiny_spec().to_dict() | {"group_size": 3})


BY_CHANNEL = DataFacts(kind="vae", scale=(0.5, 0.25), shift=(-1.0, 0.1), vae="small")


@pytest.mark.parametrize(
    "facts", [PIXELS, SD_VAE, BY_CHANNEL, dataclasses.replace(PIXELS, class_names=("shirt", "bag"))]
)
def test_data_facts_survive_json(facts: DataFacts) -> None:
    assert DataFacts.from_dict(json.loads(json.dumps(facts.to_dict()))) == facts


def test_data_facts_of_older_files_are_read() -> None:
    stored = '{"kind": "vae", "low": -1.0, "high": 1.0, "scale": 0.18215, "shift": 0.0, "vae": "x", "class_names": []}'
    assert DataFacts.from_dict(json.loads(stored)) == dataclasses.replace(SD_VAE, vae="x")
    assert DataFacts.from_dict({"kind": "pixels"}) == PIXELS


def test_one_number_is_that_of_every_channel() -> None:
    assert SD_VAE.of_channels(4) == ((0.18215,) * 4, (0.0,) * 4)
    assert BY_CHANNEL.of_channels(2) == ((0.5, 0.25), (-1.0, 0.1))
    assert dataclasses.replace(BY_CHANNEL, shift=0.5).of_channels(2) == ((0.5, 0.25), (0.5, 0.5))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_numbers_of_other_channels_are_refused(channels: int) -> None:
    with pytest.raises(InputError, match=f"data scale has 2 numbers, samples have {channels} channels"):
        BY_CHANNEL.of_channels(channels)
    with pytest.raises(InputError, match=f"data shift has 2 numbers, samples have {channels} channels"):
        dataclasses.replace(BY_CHANNEL, scale=1.0).of_channels(channels)


NO_SCALES: list[tuple[dict[str, Any], str]] = [
    ({"scale": 0.0}, r"data scale 0\.0 is not positive; give positive numbers"),
    ({"scale": (1.0, -1.0)}, r"data scale \(1\.0, -1\.0\) is not positive"),
    ({"scale": ()}, r"data scale \(\) is not positive"),
    ({"scale": math.nan}, "data scale nan is not a finite number, nor one for each channel"),
    ({"shift": (0.0, math.inf)}, r"data shift \(0\.0, inf\) is not a finite number"),
    ({"shift": "0"}, "data shift '0' is not a finite number"),
    ({"shift": None}, "data shift None is not a finite number"),
    ({"scale": True}, "data scale True is not a finite number"),
]


def test_numbers_that_scale_nothing_are_refused() -> None:
    assert wrong_refusals(lambda changes: DataFacts(kind="vae", **changes), NO_SCALES) == {}


NO_FACTS: list[tuple[dict[str, Any], str]] = [
    ({"low": "-1"}, "data low '-1' is not a finite number"),
    ({"high": None}, "data high None is not a finite number"),
    ({"high": math.nan}, "data high nan is not a finite number"),
    ({"low": 1.0, "high": 1.0}, r"data low 1\.0 is not below high 1\.0"),
    ({"class_names": (1, 2)}, r"class_names \(1, 2\) are not a list of texts; write numbers in quotes"),
    ({"class_names": "cat"}, "class_names 'cat' are not a list of texts"),
    ({"class_names": None}, "class_names None are not a list of texts"),
    ({"vae": 3}, "data vae 3 is not text; write it in quotes"),
]


def test_facts_of_another_type_are_refused_also_as_json_gives_them() -> None:
    assert wrong_refusals(lambda changes: DataFacts(kind="pixels", **changes), NO_FACTS) == {}
    lists = [
        ({name: [*value] if isinstance(value, tuple) else value for name, value in changes.items()}, told)
        for changes, told in NO_FACTS
    ]
    assert wrong_refusals(lambda changes: DataFacts.from_dict({"kind": "pixels", **changes}), lists) == {}


def test_numbers_of_channels_are_told_once_where_they_are_the_same() -> None:
    assert [by_channel_text(value) for value in (0.18215, (0.5, 0.5), (0.5, 0.25))] == ["0.18215", "0.5", "[0.5, 0.25]"]

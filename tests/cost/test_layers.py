"""The list of layers, which needs no torch, against the real modules of every backbone."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from elit_export.cost.layers import GROUPS, layers_of, modules_kept_exact
from elit_export.models.elit import Elit
from elit_export.spec import STEP, LayerKind
from tests.helpers import VARIANTS, tiny_model
from tests.text_models import inputs_of, text_model

CLASS_BACKBONES: dict[str, dict[str, Any]] = VARIANTS | {
    "norms of queries and keys, layer": {"qk_norm": True},
    "norms of queries and keys, RMS": {"qk_norm": True, "qk_norm_kind": "rms"},
    "no tail": {"tail_depth": 0},
    "no core": {"core_depth": 0},
    "U-ViT without ends": {"backbone": "ELIT-U-ViT", "core_depth": 4, "head_depth": 0, "tail_depth": 0},
    "HDiT without tail": VARIANTS["ELIT-HDiT"] | {"tail_depth": 0},
}
OF_TEXT: dict[str, dict[str, Any]] = {
    "ELIT-MM-DiT": {},
    "MM-DiT without tail": {"tail_depth": 0},
    "MM-DiT without head": {"head_depth": 0},
}
each_model = pytest.mark.parametrize("name", [*CLASS_BACKBONES, *OF_TEXT])


def model_of(name: str) -> Elit:
    return tiny_model(**CLASS_BACKBONES[name]) if name in CLASS_BACKBONES else text_model(**OF_TEXT[name])


# ---------------------------------------------------------------- paths and parameters


@each_model
def test_parameters_are_those_of_the_modules(name: str) -> None:
    model = model_of(name)
    own = {path: list(module.parameters(recurse=False)) for path, module in model.named_modules()}
    found = summed((layer.path, layer.parameters) for layer in layers_of(model.spec))
    assert found == {path: sum(each.numel() for each in parameters) for path, parameters in own.items() if parameters}


def test_no_module_is_listed_twice() -> None:
    """Products share a path with the parameters of Read and Write."""
    for name in (*CLASS_BACKBONES, *OF_TEXT):
        listed = Counter((layer.path, layer.kind is LayerKind.PRODUCTS) for layer in layers_of(model_of(name).spec))
        assert [layer for layer, times in listed.items() if times > 1] == [], name


def summed(values: Iterable[tuple[str, int]]) -> dict[str, int]:
    """By path, without those that are 0."""
    found: Counter[str] = Counter()
    for path, value in values:
        found[path] += value
    return {path: value for path, value in found.items() if value}


# ---------------------------------------------------------------- FLOPs


@each_model
def test_flops_are_what_torch_counts_in_each_module(name: str) -> None:
    """Read projects its queries once for all groups; products count where the attention of torch is called."""
    model = model_of(name)
    spec = model.spec
    middle = spec.budgets[len(spec.budgets) // 2]
    for budget in (spec.budgets[0], middle, spec.full):
        for text in (1, 5) if spec.text_width else (0,):
            found = layers_of(spec, budget.kept * spec.groups, text)
            counted = counted_by_torch(model, forward_inputs(model, budget.kept, text))
            assert summed((layer.path, layer.flops) for layer in found) == counted, (budget, text)


def test_without_a_number_of_tokens_the_core_runs_on_all_latents() -> None:
    spec = tiny_model().spec
    assert layers_of(spec) == layers_of(spec, spec.latents * spec.groups)


def forward_inputs(model: Elit, kept: int, text: int) -> list[Tensor]:
    """One row."""
    spec = model.spec
    if spec.text_width:
        return list(inputs_of(spec, STEP, rows=1, text=text, kept=kept).values())
    return [torch.zeros(1, *spec.sample_shape), torch.ones(1), torch.zeros(1, dtype=torch.int64), torch.arange(kept)]


def counted_by_torch(model: Elit, inputs: list[Tensor]) -> dict[str, int]:
    """FLOPs of each module without those of the modules in it, by path."""
    # The counter does not see the fused attention of CPUs.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*inputs)
    root = type(model).__name__
    whole = {name: sum(by_operator.values()) for name, by_operator in counter.get_flop_counts().items()}
    total = whole.pop("Global")
    own = Counter(whole)
    for name, value in whole.items():
        parents = [other for other in whole if name.startswith(f"{other}.")]
        if parents:
            own[max(parents, key=len)] -= value
    assert sum(own.values()) == total
    return {name.removeprefix(root).removeprefix("."): value for name, value in own.items() if value}


# ---------------------------------------------------------------- kinds


@each_model
def test_modules_state_the_kind_that_is_listed(name: str) -> None:
    """The nearest module at or above the path that states one."""
    model = model_of(name)
    listed = {layer.path: layer.kind for layer in layers_of(model.spec) if layer.parameters}
    assert {path: stated_kind(model, path) for path in listed} == listed


def stated_kind(model: nn.Module, path: str) -> LayerKind | None:
    while path:
        kind: LayerKind | None = getattr(model.get_submodule(path), "kind", None)
        if kind is not None:
            return kind
        path = path.rpartition(".")[0]
    return None


def test_every_group_is_of_some_model_and_every_model_has_no_other() -> None:
    found = {layer.group for name in (*CLASS_BACKBONES, *OF_TEXT) for layer in layers_of(model_of(name).spec)}
    assert found == {*GROUPS, ""}
    assert len(set(GROUPS)) == len(GROUPS)


def test_what_stays_exact_is_a_module() -> None:
    for name in (*CLASS_BACKBONES, *OF_TEXT):
        model = model_of(name)
        paths = set(modules_kept_exact(model.spec))
        assert {"read.attn.q_proj", "final.linear", "t_embedder.mlp.0"} <= paths, name
        assert paths <= {path for path, _ in model.named_modules()}, name


# ---------------------------------------------------------------- without torch


def test_the_list_needs_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None;"
        "from elit_export.cost.layers import layers_of; from elit_export.models.registry import NAMES, named_spec;"
        "print(sum(len(layers_of(named_spec(name))) > 0 for name in NAMES) == len(NAMES))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "True", done.stderr

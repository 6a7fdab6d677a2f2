"""What a forward pass costs, from the spec alone, and what a sampling's calls cost together.

Takes: a ModelSpec and a budget.  Gives: FLOPs by part.  May touch: nothing; needs no torch.

FLOPs are 2 per multiply-add of matrix products, convolutions and attention; norms, activations and
sums are not counted. They are for one image; multiply by the rows. L is a number of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

from elit_export.spec import Budget, ModelSpec

TIME_FEATURES = 256  # as in `layers`, which needs torch


@dataclass(frozen=True)
class Cost:
    """FLOPs of one image at one budget. Only `core` depends on the budget."""

    head: int
    read: int
    core: int
    write: int
    tail: int
    other: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def flops(spec: ModelSpec, budget: Budget) -> Cost:
    """FLOPs of one forward pass of one image, Read's query projection included (graphs fold it)."""
    return Cost(
        head=spec.head_depth * _block(spec, spec.tokens),
        read=_cross_attention(spec, spec.latents) + _interface_mlp(spec) + _modulation(spec, 7),
        core=spec.core_depth * _block(spec, spec.groups * budget.kept),
        write=_cross_attention(spec, spec.tokens) + _interface_mlp(spec),
        tail=spec.tail_depth * _block(spec, spec.tokens),
        other=_embedders(spec) + _final(spec),
    )


def layer_flops(spec: ModelSpec, budget: Budget) -> dict[str, int]:
    """FLOPs of one forward pass of one image by kind of layer: all but embedders, adaLN, final layer.

    Read's query projection, which graphs fold, is not in it.
    """
    width, tokens = spec.hidden_size, spec.tokens
    found = {}
    lengths = {"head": tokens, "core": spec.groups * budget.kept, "tail": tokens}
    depths = {"head": spec.head_depth, "core": spec.core_depth, "tail": spec.tail_depth}
    for part, length in lengths.items():
        found[f"{part} attention"] = depths[part] * (_linear(length, width, 3 * width) + _linear(length, width, width))
        found[f"{part} MLP"] = depths[part] * 2 * _linear(length, width, spec.mlp_size)
    inside_groups = spec.groups * _attention(spec.latents, spec.latents, width)
    found["Read"] = _cross_attention(spec, 0) - inside_groups + _interface_mlp(spec)
    found["Write"] = _cross_attention(spec, tokens) - inside_groups + _interface_mlp(spec)
    blocks = sum(depths[part] * _attention(length, length, width) for part, length in lengths.items())
    found["attention products"] = blocks + 2 * inside_groups
    return found


# ---------------------------------------------------------------- whole samplings


class Call(Protocol):
    """An engine call, as the runtime records it."""

    @property
    def budget(self) -> Budget: ...
    @property
    def rows(self) -> int: ...
    @property
    def reused(self) -> bool: ...


class Step(Protocol):
    @property
    def calls(self) -> Sequence[Call]: ...


class Sampling(Protocol):
    """A finished sampling: one label per image."""

    @property
    def labels(self) -> Sequence[int]: ...
    @property
    def records(self) -> Sequence[Step]: ...


def flops_per_image(sampling: Sampling, spec: ModelSpec) -> float:
    """FLOPs of every engine call of a sampling, per image."""
    calls = [call for step in sampling.records for call in step.calls]
    return sum(call.rows * _of_call(call, spec) for call in calls) / len(sampling.labels)


def _of_call(call: Call, spec: ModelSpec) -> int:
    """A call that reuses a residual runs the embedders and the final layer only."""
    cost = flops(spec, call.budget)
    return cost.other if call.reused else cost.total


# ---------------------------------------------------------------- parts


def _linear(tokens: int, inputs: int, outputs: int) -> int:
    return 2 * tokens * inputs * outputs


def _modulation(spec: ModelSpec, chunks: int) -> int:
    return _linear(1, spec.hidden_size, chunks * spec.hidden_size)


def _attention(queries: int, keys: int, width: int) -> int:
    """q · kᵀ and the weighted sum of v, over all heads."""
    return 2 * 2 * queries * keys * width


def _block(spec: ModelSpec, tokens: int) -> int:
    width = spec.hidden_size
    projections = _linear(tokens, width, 3 * width) + _linear(tokens, width, width)
    mlp = 2 * _linear(tokens, width, spec.mlp_size)
    return projections + _attention(tokens, tokens, width) + mlp + _modulation(spec, 6)


def _cross_attention(spec: ModelSpec, projected_queries: int) -> int:
    """Inside every group J queries meet J keys; in Read only the J shared queries are projected."""
    width, tokens = spec.hidden_size, spec.tokens
    queries = _linear(projected_queries, width, width)
    projections = _linear(tokens, width, 2 * width) + _linear(tokens, width, width)
    return queries + projections + spec.groups * _attention(spec.latents, spec.latents, width)


def _interface_mlp(spec: ModelSpec) -> int:
    return 2 * _linear(spec.tokens, spec.hidden_size, spec.hidden_size)


def _patch_size(spec: ModelSpec) -> int:
    return spec.patch_size**2 * spec.in_channels


def _embedders(spec: ModelSpec) -> int:
    width = spec.hidden_size
    time = _linear(1, TIME_FEATURES, width) + _linear(1, width, width)
    return _linear(spec.tokens, _patch_size(spec), width) + time


def _final(spec: ModelSpec) -> int:
    return _linear(spec.tokens, spec.hidden_size, _patch_size(spec)) + _modulation(spec, 2)

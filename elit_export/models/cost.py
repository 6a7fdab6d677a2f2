"""What a forward pass costs, from the spec alone, and what a sampling's calls cost together.

Takes: a ModelSpec and a budget.  Gives: FLOPs by part.  May touch: nothing; needs no torch.

FLOPs are 2 per multiply-add of matrix products, convolutions and attention; norms, activations and
sums are not counted. They are for one image; multiply by the rows. L is a number of tokens. A model with text takes
`text`, the tokens of its prompt with their padding.

The published costs of ELIT-Qwen-Image (1 for the base model with guidance; 0.688, 0.494, 0.409 and 0.369 at 100, 50, 25
and 12.5 % of the latents with a cheap weak branch) come out within 1.1 % for 1024 pixels, prompts of 128 tokens in both
branches and a weak branch at 12.5 %. Weak budget and prompts are our assumption: with 512 tokens the costs are 4 to
13 % higher, with 1024 up to 26 %; with 256 tokens and a weak branch at 6.25 % they are within 1 % again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from dataclasses import asdict, dataclass
from typing import Protocol

from elit_export.errors import InputError
from elit_export.models.backbones import Stage, backbone_of
from elit_export.spec import LONGEST_TEXT, Budget, ModelSpec

PARTS = ("head", "core", "tail")
USUAL_TEXT = 128  # the tokens that reports count where no prompt is there
TIME_FEATURES = 256  # as in `layers`, which needs torch


@dataclass(frozen=True)
class Cost:
    """FLOPs of one image at one budget. Only `core` depends on the budget; the embedder of text counts as `head`."""

    head: int
    read: int
    core: int
    write: int
    tail: int
    other: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def flops(spec: ModelSpec, budget: Budget, *, text: int = 0) -> Cost:
    """FLOPs of one forward pass of one image, Read's query projection included (graphs fold it)."""
    _check_text(spec, text)
    blocks = _blocks_by_part(spec, _lengths(spec, budget.kept * spec.groups, text))
    return Cost(
        head=blocks["head"] + _text_embedder(spec, text),
        read=_cross_attention(spec, spec.latents) + _interface_mlp(spec) + _modulation(spec, 7),
        core=blocks["core"],
        write=_cross_attention(spec, spec.tokens) + _interface_mlp(spec),
        tail=blocks["tail"],
        other=_embedders(spec) + _final(spec),
    )


def flops_without_interface(spec: ModelSpec, *, text: int = 0) -> int:
    """FLOPs of the backbone alone: no Read, no Write, every block on all spatial tokens."""
    _check_text(spec, text)
    blocks = _blocks_by_part(spec, _lengths(spec, spec.tokens, text))
    return sum(blocks.values()) + _text_embedder(spec, text) + _embedders(spec) + _final(spec)


def guided_shares(spec: ModelSpec, weak: str, text: int) -> dict[str, float]:
    """FLOPs of a step guided by the budget named `weak`, over those of the backbone alone, guided by itself.

    For each named strong budget. Raises KeyError if the model does not run `weak`.
    """
    base = 2 * flops_without_interface(spec, text=text)
    named = spec.named_budgets
    cheap = flops(spec, named[weak], text=text).total
    return {name: (flops(spec, strong, text=text).total + cheap) / base for name, strong in named.items()}


def layer_flops(spec: ModelSpec, budget: Budget, *, text: int = 0) -> dict[str, int]:
    """FLOPs of one forward pass of one image by kind of layer: all but embedders, adaLN, final layer.

    Read's query projection, which graphs fold, is not in it.
    """
    _check_text(spec, text)
    lengths = _lengths(spec, budget.kept * spec.groups, text)
    stages = [(stage, lengths[stage.part]) for stage in backbone_of(spec).stages(spec)]
    found = {}
    for part in PARTS:
        here = [(stage, length) for stage, length in stages if stage.part == part]
        found[f"{part} attention"] = sum(_projections(spec, stage, length) for stage, length in here)
        found[f"{part} MLP"] = sum(_mlps(spec, stage, length) for stage, length in here)
    found["joins"] = sum(_joins(spec, stage, length) for stage, length in stages)
    found["merging"] = sum(_merging(spec, stage, length) for stage, length in stages)
    inside_groups = spec.groups * _attention(spec.latents, spec.latents, spec.hidden_size)
    found["Read"] = _cross_attention(spec, 0) - inside_groups + _interface_mlp(spec)
    found["Write"] = _cross_attention(spec, spec.tokens) - inside_groups + _interface_mlp(spec)
    found["attention products"] = sum(_products(spec, *each) for each in stages) + 2 * inside_groups
    return found


# ---------------------------------------------------------------- whole samplings


class Call(Protocol):
    """An engine call, as the runtime records it."""

    @property
    def budget(self) -> Budget: ...
    @property
    def rows(self) -> int: ...
    @property
    def text(self) -> int: ...
    @property
    def reused(self) -> bool: ...


class Step(Protocol):
    @property
    def calls(self) -> Sequence[Call]: ...


class Sampling(Protocol):
    """A finished sampling of so many images."""

    @property
    def latents(self) -> Sized: ...
    @property
    def records(self) -> Sequence[Step]: ...


def flops_per_image(sampling: Sampling, spec: ModelSpec) -> float:
    """FLOPs of every engine call of a sampling, per image."""
    calls = [call for step in sampling.records for call in step.calls]
    return sum(call.rows * _of_call(call, spec) for call in calls) / len(sampling.latents)


def _of_call(call: Call, spec: ModelSpec) -> int:
    """A call that reuses a residual runs the embedders of image and time and the final layer only."""
    cost = flops(spec, call.budget, text=call.text)
    return cost.other if call.reused else cost.total


# ---------------------------------------------------------------- parts


def _linear(tokens: int, inputs: int, outputs: int) -> int:
    return 2 * tokens * inputs * outputs


def _modulation(spec: ModelSpec, chunks: int) -> int:
    return _linear(1, spec.hidden_size, chunks * spec.hidden_size)


def _attention(queries: int, keys: int, width: int) -> int:
    """q · kᵀ and the weighted sum of v, over all heads."""
    return 2 * 2 * queries * keys * width


def _check_text(spec: ModelSpec, text: int) -> None:
    if (text > 0) != (spec.text_width > 0) or text > LONGEST_TEXT:
        wanted = f"1 to {LONGEST_TEXT}: say how many there are" if spec.text_width else "0, as it takes none"
        raise InputError(f"the cost of this model with {text} text tokens: must be {wanted}")


def _lengths(spec: ModelSpec, in_core: int, text: int) -> dict[str, int]:
    """Tokens that the blocks of each part run on, before any are merged; text runs through all of them."""
    return {"head": spec.tokens + text, "core": in_core + text, "tail": spec.tokens + text}


def _blocks_by_part(spec: ModelSpec, lengths: Mapping[str, int]) -> dict[str, int]:
    found = dict.fromkeys(PARTS, 0)
    for stage in backbone_of(spec).stages(spec):
        found[stage.part] += sum(cost(spec, stage, lengths[stage.part]) for cost in STAGE_COSTS)
    return found


def _projections(spec: ModelSpec, stage: Stage, tokens: int) -> int:
    width, length = stage.widened * spec.hidden_size, tokens // stage.merged
    return stage.depth * (_linear(length, width, 3 * width) + _linear(length, width, width))


def _products(spec: ModelSpec, stage: Stage, tokens: int) -> int:
    length = tokens // stage.merged
    return stage.depth * _attention(length, length, stage.widened * spec.hidden_size)


def _mlps(spec: ModelSpec, stage: Stage, tokens: int) -> int:
    width, hidden = stage.widened * spec.hidden_size, stage.widened * spec.mlp_size
    return stage.depth * 2 * _linear(tokens // stage.merged, width, hidden)


def _modulations(spec: ModelSpec, stage: Stage, _tokens: int) -> int:
    return stage.streams * stage.depth * _modulation(spec, 6 * stage.widened)


def _joins(spec: ModelSpec, stage: Stage, tokens: int) -> int:
    return stage.joins * _linear(tokens // stage.merged, 2 * spec.hidden_size, spec.hidden_size)


def _merging(spec: ModelSpec, stage: Stage, tokens: int) -> int:
    """There and back."""
    if stage.merged == 1:
        return 0
    width, merged = stage.merged * spec.hidden_size, stage.widened * spec.hidden_size
    return 2 * _linear(tokens // stage.merged, width, merged)


STAGE_COSTS = (_projections, _products, _mlps, _modulations, _joins, _merging)


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


def _text_embedder(spec: ModelSpec, text: int) -> int:
    return _linear(text, spec.text_width, spec.hidden_size)


def _final(spec: ModelSpec) -> int:
    return _linear(spec.tokens, spec.hidden_size, _patch_size(spec)) + _modulation(spec, 2)

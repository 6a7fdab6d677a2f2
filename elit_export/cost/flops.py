"""Computes the FLOPs of a forward pass from the spec alone, and those of a whole sampling's calls.

FLOPs are counted as in `cost.layers`, for one image: multiply by the rows. A model with text takes `text`, the number
of tokens of its prompt with padding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence, Sized
from dataclasses import asdict, dataclass, fields
from typing import Protocol

from elit_export.cost.layers import GROUPS, READ, WRITE, layers_of
from elit_export.errors import InputError
from elit_export.spec import MAX_TEXT_TOKENS, Budget, ModelSpec

USUAL_TEXT = 128  # tokens that reports assume where there is no prompt


@dataclass(frozen=True)
class Cost:
    """The FLOPs of one image at one budget. Only `core` depends on the budget; the text embedder counts as `head`."""

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
    """Count the FLOPs of one forward pass of one image, with Read's query projection, which graphs fold."""
    _check_text(spec, text)
    parts: Counter[str] = Counter()
    for layer in layers_of(spec, budget.kept * spec.groups, text):
        parts[layer.part] += layer.flops
    return Cost(**{field.name: parts[field.name] for field in fields(Cost)})


def flops_without_interface(spec: ModelSpec, *, text: int = 0) -> int:
    """Count the FLOPs of the backbone alone: no Read, no Write, every block on all spatial tokens."""
    _check_text(spec, text)
    return sum(layer.flops for layer in layers_of(spec, spec.tokens, text) if layer.part not in (READ, WRITE))


def guided_shares(spec: ModelSpec, weak: str, text: int) -> dict[str, float]:
    """Compare a guided step, whose weak branch runs the budget `weak`, with a guided step of the backbone alone.

    Returns the ratio of FLOPs for each named strong budget. Raises KeyError if the model does not run `weak`.
    """
    base = 2 * flops_without_interface(spec, text=text)
    named = spec.named_budgets
    weak_flops = flops(spec, named[weak], text=text).total
    return {name: (flops(spec, strong, text=text).total + weak_flops) / base for name, strong in named.items()}


def layer_flops(spec: ModelSpec, budget: Budget, *, text: int = 0) -> dict[str, int]:
    """Count the FLOPs of one forward pass of one image by GROUPS of layers: all but embedders, adaLN, final layer.

    Read's query projection is left out, as graphs fold it.
    """
    _check_text(spec, text)
    by_group = dict.fromkeys(GROUPS, 0)
    for layer in layers_of(spec, budget.kept * spec.groups, text):
        if layer.group:
            by_group[layer.group] += layer.flops
    return by_group


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
    """A step of a sampling, as the runtime records it."""

    @property
    def calls(self) -> Sequence[Call]: ...


class Sampling(Protocol):
    """A finished sampling; the length of `latents` is the number of images."""

    @property
    def latents(self) -> Sized: ...
    @property
    def records(self) -> Sequence[Step]: ...


def flops_per_image(sampling: Sampling, spec: ModelSpec) -> float:
    """Count the FLOPs of all engine calls of a sampling, per image."""
    calls = [call for step in sampling.records for call in step.calls]
    return sum(call.rows * _call_flops(call, spec) for call in calls) / len(sampling.latents)


def _call_flops(call: Call, spec: ModelSpec) -> int:
    """Count one call; a call that reuses a residual runs only the embedders of image and time and the final layer."""
    cost = flops(spec, call.budget, text=call.text)
    return cost.other if call.reused else cost.total


def _check_text(spec: ModelSpec, text: int) -> None:
    if (text > 0) != spec.takes_text or text > MAX_TEXT_TOKENS:
        required = f"1 to {MAX_TEXT_TOKENS}: say how many there are" if spec.takes_text else "0, as it takes none"
        raise InputError(f"the cost of this model with {text} text tokens: must be {required}")

"""What a forward pass costs, from the spec alone, and what a sampling's calls cost together. FLOPs as in `cost.layers`.

They are for one image; multiply by the rows. A model with text takes `text`, the tokens of its prompt with padding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence, Sized
from dataclasses import asdict, dataclass, fields
from typing import Protocol

from elit_export.cost.layers import GROUPS, READ, WRITE, layers_of
from elit_export.errors import InputError
from elit_export.spec import LONGEST_TEXT, Budget, ModelSpec

USUAL_TEXT = 128  # the tokens that reports count where no prompt is there


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
    parts: Counter[str] = Counter()
    for layer in layers_of(spec, budget.kept * spec.groups, text):
        parts[layer.part] += layer.flops
    return Cost(**{field.name: parts[field.name] for field in fields(Cost)})


def flops_without_interface(spec: ModelSpec, *, text: int = 0) -> int:
    """FLOPs of the backbone alone: no Read, no Write, every block on all spatial tokens."""
    _check_text(spec, text)
    return sum(layer.flops for layer in layers_of(spec, spec.tokens, text) if layer.part not in (READ, WRITE))


def guided_shares(spec: ModelSpec, weak: str, text: int) -> dict[str, float]:
    """FLOPs of a step guided by the budget named `weak`, over those of the backbone alone, guided by itself.

    For each named strong budget. Raises KeyError if the model does not run `weak`.
    """
    base = 2 * flops_without_interface(spec, text=text)
    named = spec.named_budgets
    cheap = flops(spec, named[weak], text=text).total
    return {name: (flops(spec, strong, text=text).total + cheap) / base for name, strong in named.items()}


def layer_flops(spec: ModelSpec, budget: Budget, *, text: int = 0) -> dict[str, int]:
    """FLOPs of one forward pass of one image by GROUPS of layers: all but embedders, adaLN, final layer.

    Read's query projection, which graphs fold, is not in it.
    """
    _check_text(spec, text)
    found = dict.fromkeys(GROUPS, 0)
    for layer in layers_of(spec, budget.kept * spec.groups, text):
        if layer.group:
            found[layer.group] += layer.flops
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


def _check_text(spec: ModelSpec, text: int) -> None:
    if (text > 0) != spec.takes_text or text > LONGEST_TEXT:
        wanted = f"1 to {LONGEST_TEXT}: say how many there are" if spec.takes_text else "0, as it takes none"
        raise InputError(f"the cost of this model with {text} text tokens: must be {wanted}")

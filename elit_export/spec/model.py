"""The shape of a model, from which everything else follows: its budgets, the tensors of its graphs.

Legend: B batch, C channels, H=W input size, p patch, n=H/p, N=n² spatial tokens, g group side,
J=g² latents per group, G=(n/g)² groups, K kept latents per group, D width, T text tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cache
from typing import Any, Self, get_type_hints

from elit_export.errors import InputError
from elit_export.spec import limits
from elit_export.spec.budgets import BUDGET_NAMES, Budget, Range, listed
from elit_export.spec.graphs import MAX_TEXT_TOKENS, GraphSpec, TensorSpec, conditioning_tensors, graph_of

RELEASED_BACKBONE = "ELIT-SiT"  # the default of a spec: all released checkpoints have this backbone
QK_NORM_KINDS = ("layer", "rms")
FIELD_LIMITS = {
    "in_channels": limits.CHANNELS,
    "input_size": limits.SIDE,
    "patch_size": limits.SIDE,
    "hidden_size": limits.WIDTH,
    "num_heads": limits.HEADS,
    "head_depth": limits.BLOCKS,
    "core_depth": limits.BLOCKS,
    "tail_depth": limits.BLOCKS,
    "group_size": limits.GROUP_SIDE,
    "mlp_ratio": limits.MLP_RATIO,
    "num_classes": limits.CLASSES,
    "text_width": limits.WIDTH,
}


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The numbers that fix the graph of a model, whatever its weights.

    The fields without a default are those of the released checkpoints; depths count blocks before Read (head),
    between Read and Write (core) and after Write (tail). `backbone` names a row of `models.registry`. `rope` applies
    2-D RoPE to queries and keys of self-attention; `qk_norm_kind` is the norm that `qk_norm` puts on them. The
    `coarse_depth` blocks in the middle of the core run on latents merged by `merge` into one, so that the model keeps
    only multiples of `merge`. A model takes classes, or text embeddings of `text_width` numbers a token.
    """

    in_channels: int
    input_size: int
    patch_size: int
    hidden_size: int
    num_heads: int
    head_depth: int
    core_depth: int
    tail_depth: int
    group_size: int
    qk_norm: bool
    mlp_ratio: float
    num_classes: int
    backbone: str = RELEASED_BACKBONE
    rope: bool = False
    qk_norm_kind: str = "layer"
    merge: int = 1
    coarse_depth: int = 0
    text_width: int = 0

    def __post_init__(self) -> None:
        self._check_types()
        for name in ("in_channels", "input_size", "patch_size", "hidden_size", "num_heads", "group_size", "merge"):
            if getattr(self, name) < 1:
                raise InputError(f"model spec: {name} is {getattr(self, name)}, must be at least 1")
        for name in ("head_depth", "core_depth", "tail_depth", "coarse_depth", "text_width"):
            if getattr(self, name) < 0:
                raise InputError(f"model spec: {name} is {getattr(self, name)}, must not be negative")
        if not 0 < self.mlp_ratio < math.inf:
            raise InputError(f"model spec: mlp_ratio is {self.mlp_ratio}, must be positive and finite")
        for name, limit in FIELD_LIMITS.items():
            limit.check(getattr(self, name), f"model spec: {name}", limits.OF_FILES)
        blocks = self.head_depth + self.core_depth + self.tail_depth
        limits.BLOCKS.check(blocks, "model spec: the sum of head_depth, core_depth and tail_depth", limits.OF_FILES)
        limits.TOKENS.check(self.tokens, "model spec: the square of input_size over patch_size", limits.OF_FILES)
        if self.qk_norm_kind != QK_NORM_KINDS[0] and not self.qk_norm:
            raise InputError(f"model spec: qk_norm_kind is {self.qk_norm_kind!r}, but qk_norm is off")
        if self.qk_norm_kind not in QK_NORM_KINDS:
            raise InputError(f"model spec: qk_norm_kind {self.qk_norm_kind!r} is not one of {', '.join(QK_NORM_KINDS)}")
        self._check_divides("input_size", self.input_size, "patch_size", self.patch_size)
        self._check_divides("token grid", self.input_size // self.patch_size, "group_size", self.group_size)
        self._check_divides("hidden_size", self.hidden_size, "num_heads", self.num_heads)
        self._check_divides("hidden_size", self.hidden_size, "the 4 parts of the sin-cos embedding", 4)
        if self.rope:
            self._check_divides("head size", self.hidden_size // self.num_heads, "the 4 parts of 2-D RoPE", 4)
        self._check_merging()
        self._check_conditioning()

    def _check_types(self) -> None:
        for name, kind in _field_types().items():
            value, accepted = getattr(self, name), (int, float) if kind is float else kind
            if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
                raise InputError(f"model spec: {name} is {value!r}, must be of type {kind.__name__}")

    def _check_merging(self) -> None:
        self._check_divides("latents per group", self.latents, "merge", self.merge)
        if (self.merge > 1) != (self.coarse_depth > 0):
            raise InputError(
                f"model spec: merge {self.merge} and coarse_depth {self.coarse_depth}: one needs the other"
            )
        fine_depth = self.core_depth - self.coarse_depth
        if self.coarse_depth and (fine_depth < 0 or fine_depth % 2):
            raise InputError(
                f"model spec: coarse_depth {self.coarse_depth} must leave an even number of the {self.core_depth} "
                f"core blocks, half before and half after it"
            )

    def _check_conditioning(self) -> None:
        if self.num_classes < 1 and not self.text_width:
            raise InputError(
                f"model spec: num_classes is {self.num_classes}, must be at least 1 in a model without text"
            )
        if self.num_classes and self.text_width:
            raise InputError(
                f"model spec: num_classes is {self.num_classes} and text_width {self.text_width}: a model takes "
                f"classes or text",
                "set the other to 0",
            )

    @staticmethod
    def _check_divides(what: str, value: int, by: str, divisor: int) -> None:
        if value % divisor:
            raise InputError(f"model spec: {what} {value} is not divisible by {by} {divisor}")

    # shapes

    @property
    def grid(self) -> int:
        """The number n of spatial tokens along one side."""
        return self.input_size // self.patch_size

    @property
    def tokens(self) -> int:
        """The number N of spatial tokens."""
        return self.grid**2

    @property
    def latents(self) -> int:
        """The number J of latents per group."""
        return self.group_size**2

    @property
    def groups(self) -> int:
        """The number G of groups."""
        return (self.grid // self.group_size) ** 2

    @property
    def depth(self) -> int:
        return self.head_depth + self.core_depth + self.tail_depth

    @property
    def mlp_size(self) -> int:
        return round(self.hidden_size * self.mlp_ratio)

    @property
    def null_class(self) -> int:
        """The label that means "no class"."""
        return self.num_classes

    @property
    def takes_text(self) -> bool:
        """Whether the model takes prompts in place of classes."""
        return self.text_width > 0

    @property
    def any_text(self) -> Range | None:
        """The range of all lengths of text; None in class-conditional models."""
        return Range(1, 1, MAX_TEXT_TOKENS) if self.takes_text else None

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of one sample."""
        return self.in_channels, self.input_size, self.input_size

    # budgets

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """All budgets that the model can run, smallest first."""
        return tuple(Budget(kept, self.latents) for kept in range(self.merge, self.latents + 1, self.merge))

    @property
    def budget_step(self) -> int:
        """The minimum of K; all others are multiples of it."""
        return self.budgets[0].kept

    @property
    def full(self) -> Budget:
        return self.budgets[-1]

    def budget(self, text: str | int | Budget) -> Budget:
        """Parse a budget and check that the model runs it."""
        budget = Budget.parse(text, self.latents)
        if budget not in self.budgets:
            raise InputError(f"this model cannot run budget {budget}; it runs {listed(self.budgets)}")
        return budget

    @property
    def named_budgets(self) -> dict[str, Budget]:
        """The budgets with names (`full`, `half`, …) that the model can run, largest first."""
        whole = {name: self.latents // part for name, part in BUDGET_NAMES.items() if self.latents % part == 0}
        named = {name: Budget(kept, self.latents) for name, kept in whole.items()}
        return {name: budget for name, budget in named.items() if budget in self.budgets}

    # graphs

    def graph(self, name: str) -> GraphSpec:
        """Return the graph of a name: `step`, `probe`, `reuse`, `time` or `fused`."""
        return graph_of(self, name)

    @property
    def conditioning(self) -> tuple[TensorSpec, ...]:
        """The inputs of `step` beside x, t and latents."""
        return conditioning_tensors(self)

    # storage

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read what to_dict wrote; raises InputError naming what is missing or unknown."""
        known = {field.name for field in fields(cls)}
        required = {field.name for field in fields(cls) if field.default is MISSING}
        problems = [f"missing {name}" for name in sorted(required - set(values))]
        problems += [f"unknown {name}" for name in sorted(set(values) - known)]
        if problems:
            raise InputError(f"model spec: {', '.join(problems)}")
        return cls(**values)


@cache
def _field_types() -> dict[str, type]:
    return get_type_hints(ModelSpec)

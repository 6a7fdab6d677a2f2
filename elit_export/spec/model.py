"""The shape of a model, from which everything else follows: its budgets, the tensors of its graphs.

Takes: numbers and names.  Gives: ModelSpec.  May touch: nothing.  Knows nothing of: weights, files, backends.

Legend: B batch, C channels, H=W input size, p patch, n=H/p, N=n² spatial tokens, g group side,
J=g² latents per group, G=(n/g)² groups, K kept latents per group, D width, T text tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any, Self

from elit_export.errors import InputError
from elit_export.spec.budgets import BUDGET_NAMES, Budget, listed
from elit_export.spec.tensors import FUSED, FUSED_CHOICES, LATENTS, ROWS, STEP, TEXT, TEXT_MASK, TensorSpec

RELEASED_BACKBONE = "ELIT-SiT"  # what a spec that names no backbone is: released checkpoints know no other
QK_NORM_KINDS = ("layer", "rms")


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Everything that fixes the graph of a model, and nothing that its weights decide.

    The fields without a default are those of the released checkpoints; depths count blocks before Read (head),
    between Read and Write (core) and after Write (tail). `backbone` names a row of `models.backbones`. `rope` turns
    queries and keys of self-attention by their 2-D positions; `qk_norm_kind` is the norm that `qk_norm` puts on them.
    The `coarse_depth` blocks in the middle of the core run on latents of which `merge` became one, so that the model
    keeps only multiples of `merge`. A model takes classes, or text embeddings of `text_width` numbers a token.
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
        if self.qk_norm_kind != QK_NORM_KINDS[0] and not self.qk_norm:
            raise InputError(f"model spec: qk_norm_kind is {self.qk_norm_kind!r}, but qk_norm is off")
        if self.qk_norm_kind not in QK_NORM_KINDS:
            raise InputError(f"model spec: qk_norm_kind {self.qk_norm_kind!r} is none of {', '.join(QK_NORM_KINDS)}")
        self._check_divides("input_size", self.input_size, "patch_size", self.patch_size)
        self._check_divides("token grid", self.input_size // self.patch_size, "group_size", self.group_size)
        self._check_divides("hidden_size", self.hidden_size, "num_heads", self.num_heads)
        self._check_divides("hidden_size", self.hidden_size, "the 4 parts of the position code", 4)
        if self.rope:
            self._check_divides("head size", self.hidden_size // self.num_heads, "the 4 parts of a 2-D rotation", 4)
        self._check_merging()
        self._check_conditioning()

    def _check_types(self) -> None:
        others: dict[str, tuple[type, ...]] = {"float": (int, float), "bool": (bool,), "str": (str,)}
        for field in fields(self):
            value, kinds = getattr(self, field.name), others.get(str(field.type), (int,))
            if not isinstance(value, kinds) or (isinstance(value, bool) and kinds != (bool,)):
                raise InputError(f"model spec: {field.name} is {value!r}, must be of type {kinds[-1].__name__}")

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
                f"classes or text; set the other to 0"
            )

    @staticmethod
    def _check_divides(what: str, value: int, by: str, divisor: int) -> None:
        if value % divisor:
            raise InputError(f"model spec: {what} {value} is not divisible by {by} {divisor}")

    @classmethod
    def named(cls, name: str, *, resolution: int = 256, head_depth: int | None = None) -> ModelSpec:
        """As `models.backbones.named_spec`."""
        from elit_export.models.backbones import named_spec

        return named_spec(name, resolution=resolution, head_depth=head_depth)

    # shapes

    @property
    def grid(self) -> int:
        """n, spatial tokens along one side."""
        return self.input_size // self.patch_size

    @property
    def tokens(self) -> int:
        """N, spatial tokens."""
        return self.grid**2

    @property
    def latents(self) -> int:
        """J, latents per group."""
        return self.group_size**2

    @property
    def groups(self) -> int:
        """G, groups."""
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
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one sample."""
        return self.in_channels, self.input_size, self.input_size

    # budgets

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """Every budget the model can run, smallest first."""
        return tuple(Budget(kept, self.latents) for kept in range(self.merge, self.latents + 1, self.merge))

    @property
    def budget_step(self) -> int:
        """The least K; every other is a multiple of it."""
        return self.budgets[0].kept

    @property
    def full(self) -> Budget:
        return self.budgets[-1]

    def budget(self, text: str | int | Budget) -> Budget:
        """Read a budget and check that the model runs it."""
        budget = Budget.parse(text, self.latents)
        if budget not in self.budgets:
            raise InputError(f"this model cannot run budget {budget}; it runs {listed(self.budgets)}")
        return budget

    @property
    def named_budgets(self) -> dict[str, Budget]:
        """The names (`full`, `half`, …) that are whole and runnable, largest first."""
        whole = {name: self.latents // part for name, part in BUDGET_NAMES.items() if self.latents % part == 0}
        named = {name: Budget(kept, self.latents) for name, kept in whole.items()}
        return {name: budget for name, budget in named.items() if budget in self.budgets}

    # graphs

    @property
    def modulating(self) -> tuple[TensorSpec, ...]:
        """The conditioning that modulates all tokens together with t."""
        return () if self.text_width else (TensorSpec("y", "int64", (ROWS,)),)

    @property
    def attended(self) -> tuple[TensorSpec, ...]:
        """The conditioning that runs through the blocks beside the tokens: text; 1 for its tokens, 0 for padding."""
        if not self.text_width:
            return ()
        return TensorSpec(TEXT, "float32", (ROWS, TEXT, self.text_width)), TensorSpec(TEXT_MASK, "int64", (ROWS, TEXT))

    @property
    def conditioning(self) -> tuple[TensorSpec, ...]:
        """The inputs beside x, t and latents."""
        return (*self.modulating, *self.attended)

    @property
    def common_inputs(self) -> tuple[TensorSpec, ...]:
        """What a graph that runs the blocks takes first: x, t and the conditioning."""
        return (*self._moment, *self.conditioning)

    @property
    def _moment(self) -> tuple[TensorSpec, ...]:
        return TensorSpec("x", "float32", (ROWS, *self.sample_shape)), TensorSpec("t", "float32", (ROWS,))

    def on_tokens(self, name: str) -> TensorSpec:
        """A float32 tensor with a vector per spatial token."""
        return TensorSpec(name, "float32", (ROWS, self.tokens, self.hidden_size))

    @property
    def fused_state(self) -> tuple[TensorSpec, ...]:
        """What `fused` remembers from step to step: zeros at first, but for `reused`, which is −1."""
        on_rows = [TensorSpec(name, "float32", (ROWS,)) for name in ("t_computed", "t_computed_prev", "accumulated")]
        on_tokens = [self.on_tokens(name) for name in ("residual", "residual_prev", "signal")]
        return (*on_tokens, *on_rows, TensorSpec("reused", "int64", ()))

    def inputs_of(self, graph: str) -> tuple[TensorSpec, ...]:
        """Inputs of the graph `step`, `probe`, `reuse`, `time` or `fused`, in their order.

        Those of `probe` and `reuse` leave out what only the blocks attend to: these graphs run none.
        """
        latents = TensorSpec(LATENTS, "int64", (LATENTS,))
        residuals = self.on_tokens("residual"), self.on_tokens("residual_prev")
        return {
            STEP: (*self.common_inputs, latents),
            "probe": (*self._moment, *self.modulating, self.on_tokens("signal_prev")),
            "reuse": (*self._moment, *self.modulating, *residuals, TensorSpec("forecast", "float32", (ROWS,))),
            "time": self._moment[1:],
            FUSED: (*self.common_inputs, latents, *self.fused_state, *FUSED_CHOICES),
        }[graph]

    def outputs_of(self, graph: str) -> tuple[TensorSpec, ...]:
        """Outputs of the same graphs; those of `fused` after `velocity` and `computed` are its next inputs."""
        velocity = TensorSpec("velocity", "float32", (ROWS, *self.sample_shape))
        state = [replace(tensor, name=f"{tensor.name}_next") for tensor in self.fused_state]
        return {
            STEP: (velocity, self.on_tokens("residual")),
            "probe": (self.on_tokens("signal"), TensorSpec("distance", "float32", (ROWS,))),
            "reuse": (velocity,),
            "time": (TensorSpec("embedding", "float32", (ROWS, self.hidden_size)),),
            FUSED: (velocity, TensorSpec("computed", "bool", ()), *state),
        }[graph]

    # storage

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of to_dict; raises InputError naming what is missing or unknown."""
        known = {field.name for field in fields(cls)}
        needed = {field.name for field in fields(cls) if field.default is MISSING}
        wrong = [f"missing {name}" for name in sorted(needed - set(values))]
        wrong += [f"unknown {name}" for name in sorted(set(values) - known)]
        if wrong:
            raise InputError(f"model spec: {', '.join(wrong)}")
        return cls(**values)

"""The facts of a model: its shape, the budgets it can run, the tensors its graphs take and give.

Takes: numbers and names.  Gives: Budget, Profile, ModelSpec, DataFacts, Precision, TensorSpec.
May touch: nothing.  Knows nothing of: weights, files, backends.

Legend: B batch, C channels, H=W input size, p patch, n=H/p, N=n² spatial tokens, g group side,
J=g² latents per group, G=(n/g)² groups, K kept latents per group, D width, T text tokens.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from enum import StrEnum
from typing import Any, Self

from elit_export.errors import InputError

BUDGET_NAMES = {"full": 1, "half": 2, "quarter": 4, "eighth": 8, "sixteenth": 16}
NAME_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9._-]*$"  # names that become folders: not hidden, no way out
FRACTION_TOLERANCE = 1e-3  # of a latent; a trained fraction like 0.0781 for 5/64 misses by 1.6e-3


class Precision(StrEnum):
    """The arithmetic of the large products; what surrounds them stays in a higher precision."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"
    FP8 = "fp8"


QUANTIZED = (Precision.INT8, Precision.FP8)  # these need samples of real inputs


# ---------------------------------------------------------------- budgets


@dataclass(frozen=True, order=True)
class Budget:
    """`kept` of `of` latents per group run through the core, written `4of16`."""

    kept: int
    of: int

    def __post_init__(self) -> None:
        if not 1 <= self.kept <= self.of:
            raise InputError(
                f"budget {self.kept}of{self.of}: a model with {self.of} latents per group keeps 1 to {self.of} of them"
            )

    @classmethod
    def parse(cls, text: str | int | Budget, of: int) -> Budget:
        """Read `4`, `4of16`, `quarter` or a fraction with a point (`0.25`) for a model with `of` latents.

        Raises InputError for anything that is not a whole number of latents.
        """
        if isinstance(text, Budget):
            return text._of(of)
        word = str(text).strip()
        if word in BUDGET_NAMES:
            return cls._named(word, of)
        if match := re.fullmatch(r"(\d{1,9})(?:of(\d{1,9}))?", word):
            return cls(int(match[1]), int(match[2] or of))._of(of)
        if re.fullmatch(r"\d{0,9}\.\d+|\d{1,9}\.", word):
            return cls._from_fraction(float(word), of)
        raise InputError(
            f"budget {word!r} is not a number of latents (4), a share (4of16, 0.25) "
            f"or a name ({', '.join(BUDGET_NAMES)})"
        )

    @classmethod
    def _named(cls, name: str, of: int) -> Budget:
        if of % BUDGET_NAMES[name]:
            raise InputError(f"budget {name!r}: {of} latents per group have no whole {name}; say how many, 1 to {of}")
        return cls(of // BUDGET_NAMES[name], of)

    @classmethod
    def _from_fraction(cls, fraction: float, of: int) -> Budget:
        kept = round(of * fraction)
        if abs(of * fraction - kept) <= FRACTION_TOLERANCE and 1 <= kept <= of:
            return cls(kept, of)
        below = int(of * fraction)
        neighbours = {min(max(kept, 1), of) for kept in (below, below + 1)}
        near = " or ".join(f"{kept}of{of} ({kept / of:g})" for kept in sorted(neighbours))
        raise InputError(f"budget {fraction:g} of {of} latents is not a whole number of latents; use {near}")

    def _of(self, of: int) -> Budget:
        if self.of != of:
            raise InputError(f"budget {self} does not fit a model with {of} latents per group")
        return self

    @property
    def share(self) -> float:
        """Kept over all, for display only."""
        return self.kept / self.of

    def __str__(self) -> str:
        return f"{self.kept}of{self.of}"


@dataclass(frozen=True)
class Range:
    """A dimension an engine accepts: min ≤ opt ≤ max, all at least 1."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise InputError(f"range {self}: needs 1 <= min <= opt <= max")

    def __contains__(self, value: int) -> bool:
        return self.min <= value <= self.max

    def __str__(self) -> str:
        return f"{self.min}..{self.opt}..{self.max}"

    def corners(self) -> tuple[int, int, int]:
        """(min, opt, max), the points where an engine is checked."""
        return self.min, self.opt, self.max


@dataclass(frozen=True)
class Profile:
    """A named range of kept latents K and of engine rows that one engine serves; with text, of its tokens too."""

    name: str
    latents: Range
    rows: Range
    text: Range | None = None


def covering(ranges: Sequence[Range]) -> Range:
    """The range from the least to the most of several; its opt is the largest."""
    return Range(min(each.min for each in ranges), max(each.opt for each in ranges), max(each.max for each in ranges))


def covered_text(profiles: Sequence[Profile]) -> Range | None:
    """The tokens of text that some profile takes; None in models without."""
    texts = [profile.text for profile in profiles if profile.text]
    return covering(texts) if texts else None


def default_profiles(of: int, rows: Range, *, step: int = 1, text: Range | None = None) -> tuple[Profile, ...]:
    """Profiles over (¾J, J], (¼J, ¾J], (⅛J, ¼J] and [1, ⅛J], tuned for J, J/2, J/4 and J/16.

    Of a model that keeps multiples of `step` alone their ends and middles are such; ranges without one are left out.
    """
    bounds = {"full": (3 * of // 4, of), "half": (of // 4, 3 * of // 4), "quarter": (of // 8, of // 4)}
    bounds["sixteenth"] = (0, of // 8)
    ranges = {name: _multiples(low, high, of // BUDGET_NAMES[name], step) for name, (low, high) in bounds.items()}
    return tuple(Profile(name, latents, rows, text) for name, latents in ranges.items() if latents)


def _multiples(low: int, high: int, tuned: int, step: int) -> Range | None:
    """The multiples of `step` in (low, high], tuned for the one next to `tuned`; None if there is none."""
    least, most = (low // step + 1) * step, high // step * step
    return Range(least, min(max(tuned // step * step, least), most), most) if least <= most else None


# ---------------------------------------------------------------- graph tensors


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph; a string in `shape` is a dynamic dimension."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


ROWS = "rows"
LATENTS = "latents"
TEXT = "text"
TEXT_MASK = "text_mask"
LONGEST_TEXT = 1024  # tokens
STEP = "step"
CACHE_GRAPHS = ("probe", "reuse", "time")  # beside `step`: what step caching calls
FUSED = "fused"  # all of them in one graph, for hosts without this runtime
DECODE = "decode"  # latents of a VAE → pixels
EXACT_GRAPHS = (*CACHE_GRAPHS, DECODE)  # fp32 whatever the precision of the target
COEFFICIENTS = 5  # of the polynomial that `fused` takes, lowest power first


# What a host of `fused` decides: to compute whatever the signal says, when to, and how residuals are forecast.
FUSED_CHOICES = (
    TensorSpec("force", "bool", ()),
    TensorSpec("threshold", "float32", ()),
    TensorSpec("coefficients", "float32", (COEFFICIENTS,)),
    TensorSpec("low", "float32", ()),
    TensorSpec("high", "float32", ()),
    TensorSpec("most", "int64", ()),
    TensorSpec("order", "int64", ()),
)


# ---------------------------------------------------------------- data

ByChannel = float | tuple[float, ...]  # one number that all channels share, or one of each


@dataclass(frozen=True)
class DataFacts:
    """What the numbers in a model's samples mean.

    `kind` is "pixels" (values in [low, high]) or "vae" (latents of a VAE: decoder input =
    sample / scale + shift, channel by channel). `class_names` may be empty.
    """

    kind: str
    low: float = -1.0
    high: float = 1.0
    scale: ByChannel = 1.0
    shift: ByChannel = 0.0
    vae: str = ""
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ("pixels", "vae"):
            raise InputError(f"data kind {self.kind!r} is neither 'pixels' nor 'vae'")
        for name, value in (("scale", self.scale), ("shift", self.shift)):
            if not all(map(_is_finite, _numbers(value))):
                raise InputError(f"data {name} {value!r} is no finite number, nor one of each channel")
        if min(_numbers(self.scale), default=0.0) <= 0:
            raise InputError(f"data scale {self.scale!r} is not positive; latents are divided by it")

    def of_channels(self, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Scale and shift of each channel; raises InputError if they are of another number of channels."""
        scale, shift = (_numbers(value) for value in (self.scale, self.shift))
        for name, numbers in (("scale", scale), ("shift", shift)):
            if len(numbers) not in (1, channels):
                raise InputError(f"data {name} has {len(numbers)} numbers, samples have {channels} channels")
        return scale * (channels // len(scale)), shift * (channels // len(shift))

    def to_dict(self) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of to_dict, as JSON gives it back."""
        told: dict[str, Any] = {**values, "class_names": tuple(values.get("class_names", ()))}
        lists = {name: tuple(value) for name, value in told.items() if isinstance(value, list)}
        return cls(**(told | lists))


def _numbers(value: ByChannel) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def by_channel_text(value: ByChannel) -> str:
    """One number where all are the same, else all of them in brackets."""
    numbers = [f"{number:g}" for number in _numbers(value)]
    return numbers[0] if len(set(numbers)) == 1 else f"[{', '.join(numbers)}]"


PIXELS = DataFacts(kind="pixels")
SD_VAE = DataFacts(kind="vae", scale=0.18215, vae="stabilityai/sd-vae-ft-ema")


@dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """How a VAE decoder is fed: z = latents / scale + shift, in squares of `side` latents.

    Each becomes a square of side · `factor` pixels with values in [−1, 1]. Scale and shift have one number a channel.
    """

    channels: int
    image_channels: int
    scale: tuple[float, ...]
    shift: tuple[float, ...]
    factor: int
    side: int

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec("z", "float32", (ROWS, self.channels, self.side, self.side)),)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        pixels = self.side * self.factor
        return (TensorSpec("pixels", "float32", (ROWS, self.image_channels, pixels, pixels)),)


# ---------------------------------------------------------------- models

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


def listed(budgets: Iterable[Budget]) -> str:
    """`1of16 to 16of16` for a run without gaps, else the members one by one."""
    ordered = sorted(budgets)
    if not ordered:
        return "none"
    first, last = ordered[0], ordered[-1]
    if len(ordered) > 2 and len(ordered) == last.kept - first.kept + 1:
        return f"{first} to {last}"
    return ", ".join(str(budget) for budget in ordered)

"""The graphs of a model: their names, inputs, outputs and properties.

Shapes as in `spec.model`. Dimensions with a name are dynamic: ROWS, LATENTS (K), TEXT (tokens).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING

from elit_export.errors import InputError
from elit_export.spec.limits import TEXT as TEXT_LIMIT

if TYPE_CHECKING:
    from elit_export.spec.budgets import Profile
    from elit_export.spec.data import DecoderSpec
    from elit_export.spec.model import ModelSpec

# Dynamic dimensions; LATENTS and TEXT are names of inputs too.
ROWS = "rows"
LATENTS = "latents"
TEXT = "text"
TEXT_MASK = "text_mask"
MAX_TEXT_TOKENS = int(TEXT_LIMIT.maximum)  # tokens

# Graphs, by name.
STEP = "step"
PROBE = "probe"
REUSE = "reuse"
TIME = "time"
FUSED = "fused"
DECODE = "decode"
CACHE_GRAPHS = (PROBE, REUSE, TIME)  # beside `step`: what step caching calls
COEFFICIENTS = 5  # of the polynomial that `fused` takes, lowest power first

Shape = tuple[int, ...]


class Role(StrEnum):
    """The role of a tensor for code that feeds a graph or reads its outputs."""

    SAMPLE = "sample"  # the noisy samples x
    TIME = "time"
    LABEL = "label"
    TEXT = "text"
    TEXT_MASK = "text mask"  # 1 for a token, 0 for padding
    LATENTS = "latents"  # always 0..K−1: its length is the budget
    STATE = "state"  # an output of an earlier step
    SETTING = "setting"  # set by the caller of `fused`
    RESULT = "result"


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph; a string in `dims` is a dynamic dimension.

    An output with `on_host` is returned as a NumPy array, any other as the backend's own array, which may be fed back.
    """

    name: str
    dtype: str
    dims: tuple[int | str, ...]
    role: Role
    on_host: bool = False

    @property
    def signature(self) -> tuple[str, str, tuple[int | str, ...]]:
        """The tensor as a graph file describes it."""
        return self.name, self.dtype, self.dims


@dataclass(frozen=True)
class GraphSpec:
    """One graph: its inputs, outputs and properties.

    `exact`: fp32 whatever the precision of the target. `elastic`: the length of its input LATENTS is the budget.
    `has_if`: it holds an `If` with two branches. `light`: it runs no block, and takes a small part of a step's time.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    exact: bool = False
    elastic: bool = False
    has_if: bool = False
    light: bool = False

    @property
    def on_host(self) -> frozenset[str]:
        """The outputs that are returned as NumPy arrays."""
        return frozenset(tensor.name for tensor in self.outputs if tensor.on_host)

    @property
    def takes_text(self) -> bool:
        return any(tensor.role is Role.TEXT for tensor in self.inputs)

    def input(self, role: Role) -> TensorSpec:
        """Return the first input of a role; there must be one."""
        return next(tensor for tensor in self.inputs if tensor.role is role)

    def corner_shapes(self, profile: Profile) -> dict[str, tuple[Shape, Shape, Shape]]:
        """The shapes that a profile gives each input: at the least, the usual and the most of all its ranges."""
        ranges = {ROWS: profile.rows.corners(), LATENTS: profile.latents.corners()}
        if profile.text:
            ranges[TEXT] = profile.text.corners()

        def shape(tensor: TensorSpec, corner: int) -> Shape:
            return tuple(ranges[size][corner] if isinstance(size, str) else size for size in tensor.dims)

        return {tensor.name: (shape(tensor, 0), shape(tensor, 1), shape(tensor, 2)) for tensor in self.inputs}


# ---------------------------------------------------------------- graphs of a model

# Whether to compute in any case, when to compute, and how residuals are forecast.
FUSED_SETTINGS = (
    TensorSpec("force", "bool", (), Role.SETTING),
    TensorSpec("threshold", "float32", (), Role.SETTING),
    TensorSpec("coefficients", "float32", (COEFFICIENTS,), Role.SETTING),
    TensorSpec("low", "float32", (), Role.SETTING),
    TensorSpec("high", "float32", (), Role.SETTING),
    TensorSpec("most", "int64", (), Role.SETTING),
    TensorSpec("order", "int64", (), Role.SETTING),
)


def conditioning_tensors(spec: ModelSpec) -> tuple[TensorSpec, ...]:
    """Return the inputs of `step` beside x, t and latents."""
    if not spec.takes_text:
        return (TensorSpec("y", "int64", (ROWS,), Role.LABEL),)
    return (
        TensorSpec(TEXT, "float32", (ROWS, TEXT, spec.text_width), Role.TEXT),
        TensorSpec(TEXT_MASK, "int64", (ROWS, TEXT), Role.TEXT_MASK),
    )


def graph_of(spec: ModelSpec, name: str) -> GraphSpec:
    """Return the graph `step`, `probe`, `reuse`, `time` or `fused` of a model; raises InputError for another name.

    `probe` and `reuse` take no text: they run no block, and only blocks attend to text.
    """
    if name not in MODEL_GRAPHS:
        raise InputError(f"a model has no graph {name!r}; it has {', '.join(MODEL_GRAPHS)}")
    return MODEL_GRAPHS[name](spec)


def _sample(spec: ModelSpec) -> TensorSpec:
    return TensorSpec("x", "float32", (ROWS, *spec.sample_shape), Role.SAMPLE)


def _time() -> TensorSpec:
    return TensorSpec("t", "float32", (ROWS,), Role.TIME)


def _velocity(spec: ModelSpec) -> TensorSpec:
    return TensorSpec("velocity", "float32", (ROWS, *spec.sample_shape), Role.RESULT, on_host=True)


def _on_tokens(spec: ModelSpec, name: str) -> TensorSpec:
    """Return a tensor with a float32 vector per spatial token."""
    return TensorSpec(name, "float32", (ROWS, spec.tokens, spec.hidden_size), Role.STATE)


def _without_blocks(spec: ModelSpec) -> tuple[TensorSpec, ...]:
    """Return the first inputs of a graph that runs no block."""
    labels = [tensor for tensor in conditioning_tensors(spec) if tensor.role is Role.LABEL]
    return (_sample(spec), _time(), *labels)


def _step_inputs(spec: ModelSpec) -> tuple[TensorSpec, ...]:
    latents = TensorSpec(LATENTS, "int64", (LATENTS,), Role.LATENTS)
    return (_sample(spec), _time(), *conditioning_tensors(spec), latents)


def _step(spec: ModelSpec) -> GraphSpec:
    return GraphSpec(STEP, _step_inputs(spec), (_velocity(spec), _on_tokens(spec, "residual")), elastic=True)


def _probe(spec: ModelSpec) -> GraphSpec:
    distance = TensorSpec("distance", "float32", (ROWS,), Role.RESULT, on_host=True)
    inputs = (*_without_blocks(spec), _on_tokens(spec, "signal_prev"))
    return GraphSpec(PROBE, inputs, (_on_tokens(spec, "signal"), distance), exact=True, light=True)


def _reuse(spec: ModelSpec) -> GraphSpec:
    forecast = TensorSpec("forecast", "float32", (ROWS,), Role.STATE)
    residuals = _on_tokens(spec, "residual"), _on_tokens(spec, "residual_prev")
    return GraphSpec(REUSE, (*_without_blocks(spec), *residuals, forecast), (_velocity(spec),), exact=True, light=True)


def _time_graph(spec: ModelSpec) -> GraphSpec:
    embedding = TensorSpec("embedding", "float32", (ROWS, spec.hidden_size), Role.RESULT, on_host=True)
    return GraphSpec(TIME, (_time(),), (embedding,), exact=True, light=True)


def _fused(spec: ModelSpec) -> GraphSpec:
    """Return the graph of a whole cached step. Its outputs after `velocity` and `computed` are its next inputs."""
    computed = TensorSpec("computed", "bool", (), Role.RESULT, on_host=True)
    state = fused_state(spec)
    following = [replace(tensor, name=f"{tensor.name}_next") for tensor in state]
    inputs = (*_step_inputs(spec), *state, *FUSED_SETTINGS)
    return GraphSpec(FUSED, inputs, (_velocity(spec), computed, *following), elastic=True, has_if=True)


def fused_state(spec: ModelSpec) -> tuple[TensorSpec, ...]:
    """Return the state of `fused` between steps: zeros at first, except `reused`, which is −1."""
    on_tokens = [_on_tokens(spec, name) for name in ("residual", "residual_prev", "signal")]
    on_rows = [
        TensorSpec(name, "float32", (ROWS,), Role.STATE) for name in ("t_computed", "t_computed_prev", "accumulated")
    ]
    return (*on_tokens, *on_rows, TensorSpec("reused", "int64", (), Role.STATE))


MODEL_GRAPHS = {STEP: _step, PROBE: _probe, REUSE: _reuse, TIME: _time_graph, FUSED: _fused}


# ---------------------------------------------------------------- the graph of a decoder


def decoder_graph(spec: DecoderSpec) -> GraphSpec:
    """Return the graph `decode`: latents of a VAE → pixels, in fp32."""
    pixels = spec.side * spec.factor
    z = TensorSpec("z", "float32", (ROWS, spec.channels, spec.side, spec.side), Role.SAMPLE)
    image = TensorSpec("pixels", "float32", (ROWS, spec.image_channels, pixels, pixels), Role.RESULT, on_host=True)
    return GraphSpec(DECODE, (z,), (image,), exact=True)

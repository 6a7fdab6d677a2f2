"""Lists every layer of a model from its spec alone: path, kind, parameters, FLOPs.

Half precision, quantization, model sizes and costs are derived from this list.

FLOPs are 2 per multiply-add of matrix products, convolutions and attention, for one image and one forward pass; norms,
activations and sums are not counted. A test holds the list against the real modules, and FLOPs against torch's counter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from elit_export.models.registry import Stage, backbone_of
from elit_export.spec import LayerKind, ModelSpec

TIME_FEATURES = 256  # as in `models.layers`, which needs torch
HEAD, READ, CORE, WRITE, TAIL, OTHER = "head", "read", "core", "write", "tail", "other"
BLOCKS = (HEAD, CORE, TAIL)
STREAMS = {1: ("",), 2: ("text.", "image.")}  # prefixes of the streams with separate weights in a block
# Groups of layers that are quantized separately, in the order of reports.
PRODUCTS = LayerKind.PRODUCTS.value
GROUPS = (
    *(f"{part} {LayerKind.ATTENTION.value}" for part in BLOCKS),
    *(f"{part} {LayerKind.MLP.value}" for part in BLOCKS),
    *(LayerKind.SKIP.value, LayerKind.MERGE.value, "Read", "Write", PRODUCTS),
)


@dataclass(frozen=True)
class Layer:
    """A module with parameters, or a matrix product without parameters, in one `part` of the model."""

    path: str
    kind: LayerKind
    part: str
    parameters: int
    flops: int

    @property
    def group(self) -> str:
        """The group in which the layer is quantized, one of GROUPS; empty for kinds that never are."""
        if not self.kind.quantizes:
            return ""
        if self.kind in (LayerKind.PRODUCTS, LayerKind.SKIP, LayerKind.MERGE):
            return self.kind.value
        return self.part.title() if self.part in (READ, WRITE) else f"{self.part} {self.kind.value}"


def layers_of(spec: ModelSpec, core_tokens: int | None = None, text: int = 0) -> tuple[Layer, ...]:
    """List every layer; FLOPs are for `core_tokens` tokens in the core (by default all latents) and `text` of text."""
    core_length = spec.latents * spec.groups if core_tokens is None else core_tokens
    tokens = {HEAD: spec.tokens, CORE: core_length, TAIL: spec.tokens}
    return (*_around(spec, text), *_blocks(spec, tokens, text), *_read(spec), *_write(spec))


def modules_kept_exact(spec: ModelSpec) -> tuple[str, ...]:
    """List paths of modules without a quantizable product, for backends that quantize a whole graph."""
    layers = layers_of(spec)
    quantized = {layer.path for layer in layers if layer.kind.quantizes}
    return tuple(layer.path for layer in layers if layer.path not in quantized)


# ---------------------------------------------------------------- counting


def _linear(
    path: str, kind: LayerKind, part: str, tokens: int, inputs: int, outputs: int, *, bias: bool = True
) -> Layer:
    parameters = inputs * outputs + (outputs if bias else 0)
    return Layer(path, kind, part, parameters, 2 * tokens * inputs * outputs)


def _norm(path: str, part: str, parameters: int) -> Layer:
    return Layer(path, LayerKind.NORM, part, parameters, 0)


def _attention(path: str, part: str, queries: int, keys: int, width: int, times: int = 1) -> Layer:
    """Count q · kᵀ and the weighted sum of v, over all heads."""
    return Layer(path, LayerKind.PRODUCTS, part, 0, times * 2 * 2 * queries * keys * width)


# ---------------------------------------------------------------- around the blocks


def _around(spec: ModelSpec, text: int) -> Iterator[Layer]:
    width, patch = spec.hidden_size, spec.patch_size**2 * spec.in_channels
    if spec.takes_text:
        yield _linear("img_in", LayerKind.EMBEDDER, OTHER, spec.tokens, patch, width)
        yield _norm("txt_norm", HEAD, spec.text_width)
        yield _linear("txt_in", LayerKind.EMBEDDER, HEAD, text, spec.text_width, width)
    else:
        yield _linear("patch_embed.proj", LayerKind.EMBEDDER, OTHER, spec.tokens, patch, width)
        yield Layer("y_embedder", LayerKind.TABLE, OTHER, (spec.num_classes + 1) * width, 0)
    yield _linear("t_embedder.mlp.0", LayerKind.EMBEDDER, OTHER, 1, TIME_FEATURES, width)
    yield _linear("t_embedder.mlp.2", LayerKind.EMBEDDER, OTHER, 1, width, width)
    yield _linear("final.modulation.linear", LayerKind.MODULATION, OTHER, 1, width, 2 * width)
    yield _linear("final.linear", LayerKind.FINAL, OTHER, spec.tokens, width, patch)


# ---------------------------------------------------------------- blocks


def _blocks(spec: ModelSpec, tokens: dict[str, int], text: int) -> Iterator[Layer]:
    block_counts: Counter[str] = Counter()
    for stage in backbone_of(spec).stages(spec):
        length = tokens[stage.part] // stage.merged
        for index in range(block_counts[stage.part], block_counts[stage.part] + stage.depth):
            yield from _block(spec, stage, f"{stage.part}.{index}.", length, text)
        block_counts[stage.part] += stage.depth
        yield from _skips(spec, stage, length)
        yield from _merging(spec, stage, length)


def _block(spec: ModelSpec, stage: Stage, path: str, length: int, text: int) -> Iterator[Layer]:
    width = stage.width_factor * spec.hidden_size
    for stream in STREAMS[stage.streams]:
        tokens = text if stream == "text." else length
        yield from _stream(spec, stage, f"{path}{stream}", tokens)
    joint = stage.streams > 1
    yield _attention(path.rstrip(".") if joint else f"{path}attn", stage.part, length + text, length + text, width)


def _stream(spec: ModelSpec, stage: Stage, path: str, tokens: int) -> Iterator[Layer]:
    part, width, hidden = stage.part, stage.width_factor * spec.hidden_size, stage.width_factor * spec.mlp_size
    if stage.streams > 1:
        for name in ("q", "k", "v"):
            yield _linear(f"{path}attn.{name}", LayerKind.ATTENTION, part, tokens, width, width)
    else:
        yield _linear(f"{path}attn.qkv", LayerKind.ATTENTION, part, tokens, width, 3 * width)
    if spec.qk_norm:
        norm_size = spec.hidden_size // spec.num_heads * (1 if spec.qk_norm_kind == "rms" else 2)
        yield _norm(f"{path}attn.q_norm", part, norm_size)
        yield _norm(f"{path}attn.k_norm", part, norm_size)
    yield _linear(f"{path}attn.proj", LayerKind.ATTENTION, part, tokens, width, width)
    yield _linear(f"{path}mlp.fc1", LayerKind.MLP, part, tokens, width, hidden)
    yield _linear(f"{path}mlp.fc2", LayerKind.MLP, part, tokens, hidden, width)
    yield _linear(f"{path}modulation.linear", LayerKind.MODULATION, part, 1, spec.hidden_size, 6 * width)


def _skips(spec: ModelSpec, stage: Stage, length: int) -> Iterator[Layer]:
    width = spec.hidden_size
    for index in range(stage.joins):
        yield _linear(f"{stage.part}_joins.{index}.linear", LayerKind.SKIP, stage.part, length, 2 * width, width)


def _merging(spec: ModelSpec, stage: Stage, length: int) -> Iterator[Layer]:
    if stage.merged > 1:
        merged_width, width = stage.merged * spec.hidden_size, stage.width_factor * spec.hidden_size
        yield _linear("merge.linear", LayerKind.MERGE, stage.part, length, merged_width, width)
        yield _linear("split.linear", LayerKind.MERGE, stage.part, length, width, merged_width)


# ---------------------------------------------------------------- Read and Write


def _read(spec: ModelSpec) -> Iterator[Layer]:
    """Yield the layers of Read; its queries are parameters, J for all groups, so their projection is a constant."""
    width = spec.hidden_size
    yield Layer("read", LayerKind.TABLE, READ, (2 * spec.latents + spec.tokens) * width, 0)
    yield _linear("read.attn.q_proj", LayerKind.CONSTANT, READ, spec.latents, width, width)
    yield from _interface(spec, READ)
    yield _linear("read.modulation.linear", LayerKind.MODULATION, READ, 1, width, 7 * width)


def _write(spec: ModelSpec) -> Iterator[Layer]:
    width = spec.hidden_size
    yield Layer("write", LayerKind.TABLE, WRITE, spec.latents * width, 0)
    yield _linear("write.attn.q_proj", LayerKind.ATTENTION, WRITE, spec.tokens, width, width)
    yield from _interface(spec, WRITE)


def _interface(spec: ModelSpec, part: str) -> Iterator[Layer]:
    """Yield the layers that Read and Write share; in every group J queries attend to J keys."""
    width, tokens = spec.hidden_size, spec.tokens
    yield _linear(f"{part}.attn.kv_proj", LayerKind.ATTENTION, part, tokens, width, 2 * width)
    yield _norm(f"{part}.attn.q_norm", part, width)
    yield _norm(f"{part}.attn.k_norm", part, width)
    yield _linear(f"{part}.attn.proj", LayerKind.ATTENTION, part, tokens, width, width)
    yield _linear(f"{part}.mlp.fc1", LayerKind.MLP, part, tokens, width, width, bias=False)
    yield _linear(f"{part}.mlp.fc2", LayerKind.MLP, part, tokens, width, width, bias=False)
    yield _attention(part, part, spec.latents, spec.latents, width, times=spec.groups)

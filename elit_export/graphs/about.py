"""What an ONNX file says of itself: its model and checkpoint, what its inputs and outputs mean, who wrote it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import onnx

from elit_export.bundle.atomic import write_bytes
from elit_export.spec import GraphSpec, Precision

PREFIX = "elit_export."  # of keys, so that no other tool's are taken for them
NEXT = "_next"  # ends the names of what goes into the next step
MEANINGS = {
    # inputs
    "x": "noisy samples",
    "t": "time of each row: 1 is noise, 0 is data",
    "y": "class of each row; the number of classes stands for none",
    "text": "embedded prompts",
    "text_mask": "1 for a token of a prompt, 0 for padding",
    "latents": "0..K-1: its length K is the budget, the latents kept of those of each group",
    "signal_prev": "signal of the step before",
    "residual": "what the blocks added to the tokens",
    "residual_prev": "residual of the computed step before the last one",
    "forecast": "weight w of residual + w * (residual - residual_prev)",
    "t_computed": "time of the last computed step",
    "t_computed_prev": "time of the computed step before the last one",
    "accumulated": "change of the signal since the last computed step",
    "reused": "steps reused since the last computed one; -1 before the first",
    "force": "compute, whatever the signal says",
    "threshold": "compute where the accumulated change would pass it",
    "coefficients": "polynomial from distances to changes, lowest power first",
    "low": "least distance that the polynomial was fitted to",
    "high": "largest distance that the polynomial was fitted to",
    "most": "most steps to reuse in a row",
    "order": "0 repeats the residual, 1 extrapolates it",
    "z": "latents as the decoder takes them: sample / scale + shift",
    # outputs
    "velocity": "dx/dt",
    "signal": "input of the blocks, whose change tells whether to reuse",
    "distance": "relative change of the signal since signal_prev",
    "embedding": "embedding of t",
    "computed": "whether the blocks ran",
    "pixels": "pictures with values in -1..1",
}


@dataclass(frozen=True)
class Origin:
    """The origin of a graph: the name of a model, and the SHA-256 of its checkpoint."""

    model: str
    checkpoint_sha256: str


def meaning_of(tensor: str) -> str:
    """Describe a tensor in a few words; the next value of a state means what the state does."""
    if tensor.endswith(NEXT):
        return f"{tensor.removesuffix(NEXT)} of the next step"
    return MEANINGS[tensor]


def describe(path: Path, graph: GraphSpec, origin: Origin, precision: Precision) -> None:
    """Write doc strings and metadata into a graph file; the weights beside it stay as they are."""
    model = onnx.load(path, load_external_data=False)
    model.doc_string = (
        f"Graph `{graph.name}` of the ELIT model {origin.model}, {precision.value}, "
        f"checkpoint sha256 {origin.checkpoint_sha256}"
    )
    model.producer_name, model.producer_version = "elit-export", version("elit-export")
    for value in (*model.graph.input, *model.graph.output):
        value.doc_string = meaning_of(value.name)
    del model.metadata_props[:]
    for key, text in metadata(graph, origin, precision):
        model.metadata_props.add(key=f"{PREFIX}{key}", value=text)
    write_bytes(path, model.SerializeToString(deterministic=True))


def metadata(graph: GraphSpec, origin: Origin, precision: Precision) -> Iterator[tuple[str, str]]:
    """Yield the metadata, which some runtimes show in place of doc strings."""
    yield "version", version("elit-export")
    yield "model", origin.model
    yield "checkpoint_sha256", origin.checkpoint_sha256
    yield "graph", graph.name
    yield "precision", precision.value
    for kind, tensors in (("input", graph.inputs), ("output", graph.outputs)):
        for tensor in tensors:
            shape = ", ".join(map(str, tensor.dims))
            yield f"{kind}.{tensor.name}", f"{tensor.dtype}[{shape}]: {meaning_of(tensor.name)}"

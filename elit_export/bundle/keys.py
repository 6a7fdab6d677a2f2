"""Hashes of all that a stage of a build depends on, by which a later build knows what is fresh."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

from elit_export.backends import BACKENDS
from elit_export.backends.target import Target
from elit_export.bundle.manifest import Graph, Reference
from elit_export.bundle.recipe import Recipe
from elit_export.spec import DecoderSpec, GraphSpec, Precision, Profile

GRAPH_LIBRARIES = ("torch", "onnx", "onnx-ir", "onnxscript")
DECODER_LIBRARY = "diffusers"
DECODER_SOURCES = ("checkpoints/vae.py", "checkpoints/vae_decoder.py", "compiler/decoder.py", "spec")
QUANTIZING_LIBRARY = "nvidia-modelopt"
PACKAGE = Path(__file__).parent.parent


def model_key(recipe: Recipe, checkpoint_sha256: str) -> str:
    """Make the key of the facts that a checkpoint holds."""
    architecture = recipe.architecture.model_dump()
    return key_of(checkpoint_sha256, architecture, recipe.name, code("checkpoints", "spec", "models"))


@dataclass(frozen=True)
class Keys:
    """The keys of one build; an equal key means that nothing has to be made again.

    `inputs_sha256` is of the inputs that a quantized target is calibrated on, empty for others.
    """

    target: Target
    model: str
    inputs_sha256: str = ""

    # names

    def graph_precision(self, graph: GraphSpec) -> Precision:
        """Return the precision of the stored graph that plans are built from."""
        return self.target.facts.graph_precision(self.target.precision, exact=graph.exact)

    def stored_name(self, graph: GraphSpec, precision: Precision | None = None) -> str:
        """`step-bf16`, `step-int8-SAMPLES`; with `-program` behind it for a backend that reads torch programs."""
        written = precision or self.graph_precision(graph)
        calibrated = f"-{self.inputs_sha256[:8]}" if written.quantized else ""
        return f"{graph.name}-{written.value}{calibrated}{self.target.facts.input_format.suffix}"

    # keys

    def graph(self, name: str) -> str:
        return key_of(self.model, name, code("graphs", "cost"), versions_of(GRAPH_LIBRARIES))

    def quantized(self, exact: Graph, reference: Reference) -> str:
        """Make the key of a quantized graph, and of the comparison that it passed."""
        libraries = version(QUANTIZING_LIBRARY), BACKENDS["onnxruntime"].loader().library_version()
        source = code("graphs/quantize.py", "bundle/calibration_inputs.py", "backends/onnxruntime", "cost", "verify")
        return key_of(exact.key, reference.key, self.target.precision, self.inputs_sha256, libraries, source)

    def reference(self, profiles: Sequence[Profile]) -> str:
        return key_of(self.model, str(profiles), version("torch"), code("verify", "runtime", "backends/protocols.py"))

    def plan(self, graph: Graph, profiles: Sequence[Profile], *, quantizes: bool) -> str:
        """`quantizes`: the backend does, by the calibration inputs, as it builds this plan."""
        backend = BACKENDS[self.target.backend]
        fingerprint = backend.builder().fingerprint(self.target)
        options = self.target.model_dump(mode="json", exclude={"fused", "accept_below_tolerance"})
        inputs = self.inputs_sha256 if quantizes else ""
        shared = ("backends/__init__.py", "backends/protocols.py", "backends/target.py", "backends/versions.py")
        source = code(f"backends/{backend.folder}", *shared, "compiler", "cost", "spec")
        return key_of(graph.artifact.name, str(profiles), options, fingerprint, inputs, source)

    def decoder_graph(self, sha256: str, spec: DecoderSpec, max_rows: int) -> str:
        """Make the key of the decoder's graph, which depends on nothing of the model but the side of its latents."""
        rows = max_rows if self.target.facts.input_format.bounds_rows else None
        libraries = versions_of((*GRAPH_LIBRARIES, DECODER_LIBRARY))
        name = self.stored_name(spec.graph)
        return key_of(sha256, str(spec), rows, name, code(*DECODER_SOURCES, "graphs"), libraries)

    def decoder_answers(self, sha256: str, spec: DecoderSpec, rows: tuple[int, ...]) -> str:
        libraries = versions_of(("torch", DECODER_LIBRARY))
        source = code(*DECODER_SOURCES, "verify", "runtime/vae.py")
        return key_of(sha256, str(spec), rows, source, libraries)


def key_of(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


@cache
def code(*places: str) -> str:
    """A hash of the package's own source in these files and folders."""
    files = [path for place in places for path in sorted((PACKAGE / place).rglob("*.py")) or [PACKAGE / place]]
    return key_of(*(_source_sha256(path) for path in files))


@cache
def _source_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def versions_of(libraries: Iterable[str]) -> dict[str, str]:
    return {library: version(library) for library in libraries}

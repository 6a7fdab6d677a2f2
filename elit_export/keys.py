"""Hashes of all that a stage of a build depends on, by which a later build knows what is fresh.

Takes: a recipe, one of its targets, hashes of checkpoint and samples.  Gives: names and keys.
May touch: the package's own source (reading).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from elit_export.backends import BACKENDS
from elit_export.manifest import Graph, Reference
from elit_export.recipe import AnyTarget, Recipe
from elit_export.samples import Samples
from elit_export.spec import EXACT_GRAPHS, QUANTIZED, STEP, DecoderSpec, Precision, Profile

GRAPH_LIBRARIES = ("torch", "onnx", "onnx-ir", "onnxscript")
DECODER_LIBRARY = "diffusers"
DECODER_SOURCES = ("decoder_folder.py", "decoder.py", "compile_decoder.py", "spec")
QUANTIZING_LIBRARY = "nvidia-modelopt"


@dataclass(frozen=True)
class Keys:
    """Of one build; an equal key means that nothing has to be made again."""

    recipe: Recipe
    chosen: AnyTarget
    checkpoint_sha256: str
    samples: Samples | None

    @property
    def model(self) -> str:
        architecture = self.recipe.architecture.model_dump()
        source = code("checkpoint.py", "checkpoint_diffusers.py", "weights.py", "spec", "models")
        return key_of(self.checkpoint_sha256, architecture, self.recipe.name, source)

    # names

    def precision_of(self, graph: str) -> Precision:
        """Of the stored graph. EXACT_GRAPHS are never rounded, and some backends round themselves."""
        rounds = BACKENDS[self.chosen.backend].rounds
        return Precision.FP32 if rounds or graph in EXACT_GRAPHS else self.chosen.precision

    def stored_name(self, graph: str, precision: Precision | None = None) -> str:
        """`step-bf16`, `step-int8-SAMPLES`; with `-program` behind it for a backend that reads torch programs."""
        written = precision or self.precision_of(graph)
        reads = BACKENDS[self.chosen.backend].reads
        parts = [graph, written.value]
        if written in QUANTIZED:
            assert self.samples
            parts.append(self.samples.sha256[:8])
        return "-".join(parts if reads == "onnx" else [*parts, reads])

    # keys

    def graph(self, name: str) -> str:
        return key_of(self.model, name, code("graphs"), versions_of(GRAPH_LIBRARIES))

    def quantized(self, exact: Graph, reference: Reference) -> str:
        """Of a graph, and of the comparison that let it pass."""
        assert self.samples
        libraries = version(QUANTIZING_LIBRARY), BACKENDS["onnxruntime"].library_version()
        source = code("calibrate/quantize.py", "verify")
        return key_of(exact.key, reference.key, self.chosen.precision, self.samples.sha256, libraries, source)

    def reference(self, profiles: tuple[Profile, ...]) -> str:
        return key_of(self.model, str(profiles), version("torch"), code("verify", "runtime"))

    def decoder(self, sha256: str, spec: DecoderSpec) -> str:
        """Of its graph, which holds nothing of the model but the side of its latents."""
        is_program = BACKENDS[self.chosen.backend].reads == "program"
        most_rows = self.recipe.decoder.rows.max if self.recipe.decoder and is_program else None
        libraries = versions_of((*GRAPH_LIBRARIES, DECODER_LIBRARY))
        source = code(*DECODER_SOURCES, "graphs")
        return key_of(sha256, str(spec), most_rows, source, libraries)

    def decoder_answers(self, sha256: str, spec: DecoderSpec, rows: tuple[int, ...]) -> str:
        libraries = versions_of(("torch", DECODER_LIBRARY))
        source = code(*DECODER_SOURCES, "verify", "runtime/decoding.py")
        return key_of(sha256, str(spec), rows, source, libraries)

    def plan(self, name: str, graph: Graph, profiles: tuple[Profile, ...]) -> str:
        made_by = BACKENDS[self.chosen.backend].builder().made_by(self.chosen)
        choices = self.chosen.model_dump(mode="json", exclude={"fused", "accept_below_tolerance"})
        samples = self.samples.sha256 if self.samples and name == STEP else None
        source = code("build", "backends.py", "compile.py", "machine.py")
        return key_of(graph.artifact.name, str(profiles), choices, made_by, samples, source)


def key_of(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def code(*places: str) -> str:
    """A hash of the package's own source in these files and folders."""
    package = Path(__file__).parent
    files = [path for place in places for path in sorted((package / place).rglob("*.py")) or [package / place]]
    return key_of(*(path.read_text(encoding="utf-8") for path in files))


def versions_of(libraries: Iterable[str]) -> dict[str, str]:
    return {library: version(library) for library in libraries}

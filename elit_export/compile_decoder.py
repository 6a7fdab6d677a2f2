"""The stages of a build that a decoder adds: its graph, and what diffusers answers.

Takes: a decoder folder, a bundle being built.  Gives: facts for its manifest.  May touch: the bundle's folder.
Knows nothing of: the model, but for the side of its latents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from elit_export.backends import BACKENDS
from elit_export.bundle import BundleWriter
from elit_export.decoder import VaeDecoder, load_decoder
from elit_export.decoder_folder import DecoderFolder
from elit_export.graphs.export import export_decoder
from elit_export.graphs.program import export_decoder_program
from elit_export.keys import DECODER_LIBRARY, GRAPH_LIBRARIES, Keys, versions_of
from elit_export.manifest import Artifact, DecoderAnswers, DecoderFacts, Graph, Parity, Plan
from elit_export.spec import DECODE, DecoderSpec, Range
from elit_export.verify.cases import REFERENCE_FILE, decoder_rows
from elit_export.verify.reference import decoder_answers


@dataclass
class DecoderStages:
    """Of one build. `fresh` finds an earlier graph by its name and key, `is_whole` tells whether files are there."""

    folder: DecoderFolder
    spec: DecoderSpec
    rows: Range
    keys: Keys
    writer: BundleWriter
    earlier: tuple[DecoderFacts, ...]
    fresh: Callable[[str, str], Graph | None]
    is_whole: Callable[[Artifact], bool]
    say: Callable[[str], None]

    @cached_property
    def _decoder(self) -> VaeDecoder:
        self.say("read decoder")
        return load_decoder(self.folder)

    @cached_property
    def graph(self) -> Graph:
        name, key = self.keys.stored_name(DECODE), self.keys.decoder(self.folder.sha256, self.spec)
        if old := self.fresh(name, key):
            return old
        decoder = self._decoder
        self.say(f"export graph {DECODE}")
        with self.writer.staged() as staged:
            file = self._exported(decoder, staged).name
            artifact = self.writer.adopt(staged, "graphs", name)
        versions = versions_of((*GRAPH_LIBRARIES, DECODER_LIBRARY))
        return Graph(artifact=artifact, file=file, key=key, versions=versions)

    def _exported(self, decoder: VaeDecoder, staged: Path) -> Path:
        if BACKENDS[self.keys.chosen.backend].reads == "program":
            return export_decoder_program(decoder, self.spec, self.rows.max, staged)
        return export_decoder(decoder, self.spec, staged)

    @cached_property
    def answers(self) -> DecoderAnswers:
        """Those of diffusers, which targets share."""
        rows = decoder_rows(self.rows)
        key = self.keys.decoder_answers(self.folder.sha256, self.spec, rows)
        for old in self.earlier:
            if old.answers.key == key and self.is_whole(old.answers.artifact):
                return old.answers
        decoder = self._decoder
        self.say("decoder reference")
        with self.writer.staged() as staged:
            np.savez(staged / REFERENCE_FILE, **decoder_answers(decoder, self.spec, rows))  # type: ignore[arg-type]
            artifact = self.writer.adopt(staged, "reference", DECODE)
        return DecoderAnswers(artifact=artifact, key=key, rows=rows)

    def facts(self, plan: Plan, parity: Parity) -> DecoderFacts:
        spec = self.spec
        return DecoderFacts(
            class_name=self.folder.class_name,
            sha256=self.folder.sha256,
            channels=spec.channels,
            image_channels=spec.image_channels,
            scale=spec.scale,
            shift=spec.shift,
            factor=spec.factor,
            side=spec.side,
            rows=self.rows.corners(),
            plan=plan,
            parity=parity,
            answers=self.answers,
        )

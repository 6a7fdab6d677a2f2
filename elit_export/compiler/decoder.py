"""The stages that a decoder adds to a build: its graph, and the reference outputs of diffusers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from elit_export.bundle.artifacts import REFERENCE_FILE
from elit_export.bundle.keys import DECODER_LIBRARY, GRAPH_LIBRARIES, versions_of
from elit_export.bundle.manifest import DecoderAnswers, DecoderFacts, Graph, Parity, Plan
from elit_export.bundle.recipe import DecoderTable
from elit_export.bundle.store import Made, Progress, Stage
from elit_export.checkpoints.vae import DecoderFolder
from elit_export.checkpoints.vae_decoder import VaeDecoder, load_decoder
from elit_export.compiler.job import Job
from elit_export.graphs.about import Origin
from elit_export.graphs.formats import FORMATS
from elit_export.spec import DECODE, DecoderSpec, Precision, Range
from elit_export.verify.cases import decoder_rows
from elit_export.verify.reference import decoder_outputs

SHARE = 0.0  # of the build that is done then: a damaged folder fails before the long stages


@dataclass(frozen=True)
class BuiltDecoder:
    """A decoder whose graph and reference outputs exist; its plan is built with those of the model."""

    folder: DecoderFolder
    spec: DecoderSpec
    rows: Range
    graph: Graph
    answers: DecoderAnswers

    def facts(self, plan: Plan, parity: Parity) -> DecoderFacts:
        return DecoderFacts(
            class_name=self.folder.class_name,
            sha256=self.folder.sha256,
            spec=self.spec,
            rows=self.rows,
            plan=plan,
            parity=parity,
            answers=self.answers,
        )


@dataclass(frozen=True)
class _Weights:
    """The weights of a decoder, read when a stage needs them."""

    folder: DecoderFolder
    progress: Progress

    def decoder(self) -> VaeDecoder:
        return self._decoder

    @cached_property
    def _decoder(self) -> VaeDecoder:
        self.progress("read decoder", SHARE)
        return load_decoder(self.folder)


def make_decoder(job: Job, folder: DecoderFolder, table: DecoderTable) -> BuiltDecoder:
    """Make graph and reference outputs of the decoder; raises RecipeError if it does not fit the model."""
    folder.check_fits(job.facts.spec, job.facts.data)
    spec, rows = folder.spec(min(job.facts.spec.input_size, table.tile)), table.rows
    weights = _Weights(folder, job.store.progress)
    graph = _graph(job, weights, spec, rows)
    return BuiltDecoder(folder, spec, rows, graph, _reference_outputs(job, weights, spec, rows))


def _graph(job: Job, weights: _Weights, spec: DecoderSpec, rows: Range) -> Graph:
    def make(folder: Path) -> Made:
        graph_format = FORMATS[job.options.facts.input_format.name]
        path = graph_format.export_decoder(weights.decoder(), spec, rows.max, folder)
        origin = Origin(weights.folder.class_name, weights.folder.sha256)
        graph_format.describe(path, spec.graph, origin, Precision.FP32)
        versions = versions_of((*GRAPH_LIBRARIES, DECODER_LIBRARY))
        return Made({"graph": DECODE, "precision": Precision.FP32, "file": path.name, "versions": versions})

    key = job.keys.decoder_graph(weights.folder.sha256, spec, rows.max)
    name, stage = job.keys.stored_name(spec.graph), Stage(f"export graph {DECODE}", SHARE)
    is_program = job.options.facts.input_format.is_program
    return job.store.artifact(Graph, name, key, make, stage=stage, first=weights.decoder, is_program=is_program)


def _reference_outputs(job: Job, weights: _Weights, spec: DecoderSpec, rows: Range) -> DecoderAnswers:
    """Make the reference outputs, which all targets share."""
    counts = decoder_rows(rows)

    def make(folder: Path) -> Made:
        np.savez(folder / REFERENCE_FILE, **decoder_outputs(weights.decoder(), spec, counts))  # type: ignore[arg-type]
        return Made({"rows": counts})

    key = job.keys.decoder_answers(weights.folder.sha256, spec, counts)
    stage = Stage("decoder reference", SHARE)
    return job.store.artifact(DecoderAnswers, DECODE, key, make, stage=stage, first=weights.decoder)

"""The writers of graphs, one for each format that backends build from."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from torch import nn

from elit_export.graphs.about import Origin, describe
from elit_export.graphs.export import export_decoder, export_graph
from elit_export.graphs.program import export_decoder_program, export_program
from elit_export.models.elit import Elit
from elit_export.spec import DecoderSpec, GraphSpec, Precision


class GraphFormat(Protocol):
    """A writer of one graph into a folder; returns its path, raises ExportError."""

    def export(self, model: Elit, name: str, folder: Path, precision: Precision) -> Path: ...

    def export_decoder(self, decoder: nn.Module, spec: DecoderSpec, max_rows: int, folder: Path) -> Path: ...

    def describe(self, path: Path, graph: GraphSpec, origin: Origin, precision: Precision) -> None:
        """Write into a graph what it is, where the format has a place for that."""


class OnnxFormat:
    """Writes ONNX."""

    def export(self, model: Elit, name: str, folder: Path, precision: Precision) -> Path:
        return export_graph(model, name, folder, precision)

    def export_decoder(self, decoder: nn.Module, spec: DecoderSpec, max_rows: int, folder: Path) -> Path:
        return export_decoder(decoder, spec, folder)

    def describe(self, path: Path, graph: GraphSpec, origin: Origin, precision: Precision) -> None:
        describe(path, graph, origin, precision)


class ProgramFormat:
    """Writes torch.export programs."""

    def export(self, model: Elit, name: str, folder: Path, precision: Precision) -> Path:
        return export_program(model, name, folder, precision)

    def export_decoder(self, decoder: nn.Module, spec: DecoderSpec, max_rows: int, folder: Path) -> Path:
        return export_decoder_program(decoder, spec, max_rows, folder)

    def describe(self, path: Path, graph: GraphSpec, origin: Origin, precision: Precision) -> None:
        """A program of torch has none."""


FORMATS: dict[str, GraphFormat] = {"onnx": OnnxFormat(), "program": ProgramFormat()}

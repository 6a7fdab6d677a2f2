"""Model, or the decoder of a VAE → ONNX."""

from __future__ import annotations

import ast
import logging
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import (
    ClearMetadataAndDocStringPass,
    LiftSubgraphInitializersToMainGraphPass,
    RemoveUnusedNodesPass,
)
from onnxscript.optimizer import fold_constants
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from elit_export.errors import ExportError
from elit_export.graphs.attention import attention_table
from elit_export.graphs.check import check_graph
from elit_export.graphs.fused import fused
from elit_export.graphs.rounding import in_precision
from elit_export.graphs.vae_frames import join_frames, of_one_frame
from elit_export.graphs.weights import give_weights, weightless
from elit_export.models.elit import Elit
from elit_export.spec import (
    LATENTS,
    LONGEST_TEXT,
    ROWS,
    TEXT,
    DecoderSpec,
    GraphSpec,
    ModelSpec,
    Precision,
    Role,
    TensorSpec,
)

HEAD_SIZES = range(16, 257, 8)  # what kernels of native attention take
# Constant folding has no size limit: what depends on weights alone (the queries of Read, the grouped
# latent positions) becomes a constant of the graph, and nothing large can appear from it.
NO_LIMIT = 1 << 40
SCOPES = "pkg.torch.onnx.name_scopes"  # where the exporter keeps the modules around a node, innermost last
MODEL = "model"  # of GraphModule
MODULE_PATH = r"[a-z]\w*(?:\.\w+)*"
MULTIPLES = "multiples"  # of the least number of latents that a model keeps
EXAMPLE_ROWS = 3  # 0 and 1 would be taken as fixed sizes
EXAMPLE_TEXT = 5


def export_graph(model: Elit, name: str, folder: Path, precision: Precision = Precision.FP32) -> Path:
    """Write the graph `step`, `fused` or one of CACHE_GRAPHS into `folder` (made if missing), once checked.

    The model's weights may be of any floating-point type, and mapped onto their file: they are read one by one. Inputs
    and outputs are the same in every precision; `graphs.rounding` says what is rounded.
    Gives the path of the graph, NAME.onnx; its weights lie beside it as NAME.onnx.data. Raises ExportError.
    """
    _check_exportable(model.spec, precision)
    return _written(lambda: graph_model(model, name, precision), model.spec.graph(name), folder, precision)


def export_decoder(decoder: nn.Module, spec: DecoderSpec, folder: Path) -> Path:
    """Write the graph `decode` in fp32, as export_graph does."""

    def made() -> ir.Model:
        program = _traced(traceable_decoder(decoder, spec), Precision.FP32)
        graph = _folded(program, spec.graph)
        join_frames(graph)
        return graph

    return _written(made, spec.graph, folder, Precision.FP32)


def _written(make: Callable[[], ir.Model], graph: GraphSpec, folder: Path, precision: Precision) -> Path:
    """The path of a graph that was made, checked, and only then given its name."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as private:
        path = Path(private) / f"{graph.name}.onnx"
        ir.save(make(), path, external_data=f"{path.name}.data")
        check_graph(path, graph, opset=precision.opset)
        (folder / path.name).unlink(missing_ok=True)  # an old graph would read the new weights
        for file in (f"{path.name}.data", path.name):  # the graph last: it is what a reader looks for
            (Path(private) / file).replace(folder / file)
    return folder / path.name


def _check_exportable(spec: ModelSpec, precision: Precision) -> None:
    if len(spec.budgets) == 1:
        raise ExportError(f"the model has one budget only, {spec.full}: there is nothing elastic to export")
    head_size = spec.hidden_size // spec.num_heads
    if precision is not Precision.FP32 and head_size not in HEAD_SIZES:
        raise ExportError(
            f"heads of {head_size} channels (width {spec.hidden_size}, {spec.num_heads} heads): native attention in "
            f"{precision.value} wants a multiple of {HEAD_SIZES.step} from {HEAD_SIZES[0]} to {HEAD_SIZES[-1]}",
            "use precision fp32",
        )


def graph_model(model: Elit, name: str, precision: Precision) -> ir.Model:
    """A graph in memory; its weights are those of the model, read and rounded when they are asked for."""
    mode = FakeTensorMode()
    traced = traceable(weightless(model, mode), name, precision)
    with mode:
        program = _traced(traced, precision)
    weights = {f"{MODEL}.{own}": tensor for own, tensor in model.state_dict(keep_vars=True).items()}
    give_weights(program.model, weights)
    return _folded(program, traced.graph)


def _traced(traced: Traceable, precision: Precision) -> torch.onnx.ONNXProgram:
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                traced.module,
                traced.examples,
                dynamo=True,
                opset_version=precision.opset,
                input_names=[tensor.name for tensor in traced.graph.inputs],
                output_names=[tensor.name for tensor in traced.graph.outputs],
                dynamic_shapes=traced.dynamic_shapes,
                custom_translation_table=attention_table(traced.graph, precision),
                verbose=False,
                optimize=False,  # weights come first
            )
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(f"torch.onnx.export failed: {error}") from error
    if program is None:
        raise ExportError("torch.onnx.export gave no graph")
    return program


def _folded(program: torch.onnx.ONNXProgram, graph: GraphSpec) -> ir.Model:
    """Without what can be computed now, once the weights are there."""
    program.optimize()
    made: ir.Model = program.model
    _name_dimensions(made, graph)
    fold_constants(made, input_size_limit=NO_LIMIT, output_size_limit=NO_LIMIT)
    RemoveUnusedNodesPass()(made)
    LiftSubgraphInitializersToMainGraphPass()(made)  # ONNX Runtime writes those of branches twice
    name_nodes(made)
    ClearMetadataAndDocStringPass()(made)  # stack traces of the exporting machine
    return made


def _name_dimensions(made: ir.Model, graph: GraphSpec) -> None:
    """Dynamic dimensions of inputs as in the spec, where the exporter calls one `4*multiples`."""
    for value, tensor in zip(made.graph.inputs, graph.inputs, strict=True):
        value.shape = ir.Shape(tensor.dims)


def name_nodes(made: ir.Model) -> None:
    """Name every node after the module it came from, so that errors and profiles can be read.

    `core.3.attn/MatMul_93`; nodes that belong to no module keep their name alone.
    """
    for number, node in enumerate(ir.traversal.RecursiveGraphIterator(made.graph)):
        scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
        module = str(scopes[-2]).removeprefix(f"{MODEL}.") if len(scopes) > 1 else ""
        kind = f"{node.op_type}_{number}"
        node.name = f"{module}/{kind}" if re.fullmatch(MODULE_PATH, module) else kind


class GraphModule(nn.Module):
    """What the exporter traces: a function of a model, which it keeps to find the weights."""

    def __init__(self, model: nn.Module, run: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self.run = run

    def forward(self, *inputs: Tensor) -> Any:
        return self.run(*inputs)


# ---------------------------------------------------------------- what is traced


@dataclass(frozen=True)
class Traceable:
    """A module to trace, its graph, what each dynamic dimension may be, and is while it is traced."""

    module: nn.Module
    graph: GraphSpec
    dims: Mapping[str, Any]
    sizes: Mapping[str, int]

    @property
    def examples(self) -> tuple[Tensor, ...]:
        return tuple(_example(tensor, self.sizes) for tensor in self.graph.inputs)

    @property
    def dynamic_shapes(self) -> dict[str, tuple[dict[int, Any], ...]]:
        dims = self.dims
        shapes = [
            {axis: dims[size] for axis, size in enumerate(tensor.dims) if isinstance(size, str)}
            for tensor in self.graph.inputs
        ]
        return {"inputs": tuple(shapes)}


def traceable(model: Elit, name: str, precision: Precision) -> Traceable:
    """A graph of the model: one that chooses inside, or its method of that name."""
    rounded, graph = in_precision(model, precision), model.spec.graph(name)
    run = partial(fused, rounded) if graph.has_if else getattr(rounded, name)
    spec = model.spec
    dims = {ROWS: torch.export.Dim(ROWS, min=1), LATENTS: _latents_dim(spec)}
    dims[TEXT] = torch.export.Dim(TEXT, min=1, max=LONGEST_TEXT)
    sizes = {ROWS: EXAMPLE_ROWS, LATENTS: 2 * spec.budget_step, TEXT: EXAMPLE_TEXT}
    return Traceable(GraphModule(rounded, run).eval(), graph, dims, sizes)


def _latents_dim(spec: ModelSpec) -> Any:
    """K; where a model keeps multiples alone, so many times the dimension that torch knows."""
    step, most = spec.budget_step, len(spec.budgets)
    if step == 1:
        return torch.export.Dim(LATENTS, min=1, max=most)
    return step * torch.export.Dim(MULTIPLES, min=1, max=most)


def traceable_decoder(decoder: nn.Module, spec: DecoderSpec, most_rows: int | None = None) -> Traceable:
    rows = torch.export.Dim(ROWS, min=1, max=most_rows)
    decoder = of_one_frame(decoder)
    module = GraphModule(decoder, decoder.forward).eval()
    return Traceable(module, spec.graph, {ROWS: rows}, {ROWS: EXAMPLE_ROWS})


def _example(tensor: TensorSpec, sizes: Mapping[str, int]) -> Tensor:
    shape = [sizes[size] if isinstance(size, str) else size for size in tensor.dims]
    if tensor.role is Role.LATENTS:
        return torch.arange(shape[0])
    return torch.ones(shape, dtype=getattr(torch, tensor.dtype))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the exporter says about torchvision and aliased names: it is harmless and constant."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        registration.setLevel(level)

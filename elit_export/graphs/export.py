"""Exports a model, or the decoder of a VAE, to ONNX."""

from __future__ import annotations

import ast
import logging
import re
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

from elit_export.bundle.atomic import naming_file, private_folder
from elit_export.errors import ExportError
from elit_export.graphs.attention import attention_table
from elit_export.graphs.check import check_graph
from elit_export.graphs.fused import fused
from elit_export.graphs.rounding import in_precision
from elit_export.graphs.vae_frames import join_frames, of_one_frame
from elit_export.graphs.weights import set_weights, weightless
from elit_export.models.elit import Elit
from elit_export.spec import (
    LATENTS,
    MAX_TEXT_TOKENS,
    ROWS,
    TEXT,
    DecoderSpec,
    GraphSpec,
    ModelSpec,
    Precision,
    Role,
    TensorSpec,
)

HEAD_SIZES = range(16, 257, 8)  # supported by kernels of native attention
# Constant folding has no size limit: tensors that depend on weights alone (the queries of Read, the grouped latent
# positions) become constants of the graph, and none of them is large.
NO_LIMIT = 1 << 40
SCOPES = "pkg.torch.onnx.name_scopes"  # the exporter's metadata: the modules around a node, innermost last
MODEL = "model"  # of GraphModule
MODULE_PATH = r"[a-z]\w*(?:\.\w+)*"
MULTIPLES = "multiples"  # the dimension of which K is a multiple, where a model keeps multiples alone
EXAMPLE_ROWS = 3  # 0 and 1 would become fixed sizes
EXAMPLE_TEXT = 5


def export_graph(model: Elit, name: str, folder: Path, precision: Precision = Precision.FP32) -> Path:
    """Export and check the graph `step`, `fused` or one of CACHE_GRAPHS; writes it into `folder`, made if missing.

    The model's weights may have any floating-point type, and be mapped onto their file: they are read one by one.
    Inputs and outputs are the same in every precision; `graphs.rounding` defines which layers are rounded.
    Returns the path of the graph, NAME.onnx; its weights lie beside it as NAME.onnx.data. Raises ExportError.
    """
    _check_exportable(model.spec, precision)
    return _written(lambda: graph_model(model, name, precision), model.spec.graph(name), folder, precision)


def export_decoder(decoder: nn.Module, spec: DecoderSpec, folder: Path) -> Path:
    """Write the graph `decode` in fp32, as export_graph does."""

    def build() -> ir.Model:
        program = _traced(traceable_decoder(decoder, spec), Precision.FP32)
        graph = _folded(program, spec.graph)
        join_frames(graph)
        return graph

    return _written(build, spec.graph, folder, Precision.FP32)


def _written(make: Callable[[], ir.Model], graph: GraphSpec, folder: Path, precision: Precision) -> Path:
    """Build and check a graph in a temporary folder, then move it to its name; returns its path."""
    with naming_file(folder / f"{graph.name}.onnx"), private_folder(folder, "export") as temporary:
        path = temporary / f"{graph.name}.onnx"
        ir.save(make(), path, external_data=f"{path.name}.data")
        check_graph(path, graph, opset=precision.opset)
        (folder / path.name).unlink(missing_ok=True)  # an old graph would read the new weights
        for file in (f"{path.name}.data", path.name):  # the graph last: readers look for it
            (temporary / file).replace(folder / file)
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
    """Export a graph in memory; its weights are read from the model, and rounded, when they are written."""
    mode = FakeTensorMode()
    described = traceable(weightless(model, mode), name, precision)
    with mode:
        program = _traced(described, precision)
    weights = {f"{MODEL}.{path}": tensor for path, tensor in model.state_dict(keep_vars=True).items()}
    set_weights(program.model, weights)
    return _folded(program, described.graph)


def _traced(described: Traceable, precision: Precision) -> torch.onnx.ONNXProgram:
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                described.module,
                described.examples,
                dynamo=True,
                opset_version=precision.opset,
                input_names=[tensor.name for tensor in described.graph.inputs],
                output_names=[tensor.name for tensor in described.graph.outputs],
                dynamic_shapes=described.dynamic_shapes,
                custom_translation_table=attention_table(described.graph, precision),
                verbose=False,
                optimize=False,  # after the weights are set
            )
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(f"torch.onnx.export failed: {error}") from error
    if program is None:
        raise ExportError("torch.onnx.export gave no graph")
    return program


def _folded(program: torch.onnx.ONNXProgram, graph: GraphSpec) -> ir.Model:
    """Fold constants, now that the weights are set, and name dimensions and nodes."""
    program.optimize()
    model_ir: ir.Model = program.model
    _name_dimensions(model_ir, graph)
    fold_constants(model_ir, input_size_limit=NO_LIMIT, output_size_limit=NO_LIMIT)
    RemoveUnusedNodesPass()(model_ir)
    LiftSubgraphInitializersToMainGraphPass()(model_ir)  # ONNX Runtime would write initializers of branches twice
    name_nodes(model_ir)
    ClearMetadataAndDocStringPass()(model_ir)  # stack traces of the exporting machine
    return model_ir


def _name_dimensions(model_ir: ir.Model, graph: GraphSpec) -> None:
    """Name dynamic dimensions of inputs as in the spec, where the exporter writes `4*multiples`."""
    for value, tensor in zip(model_ir.graph.inputs, graph.inputs, strict=True):
        value.shape = ir.Shape(tensor.dims)


def name_nodes(model_ir: ir.Model) -> None:
    """Name every node after its module, so that errors and profiles are readable.

    `core.3.attn/MatMul_93`; nodes outside any module have the kind and number alone.
    """
    for number, node in enumerate(ir.traversal.RecursiveGraphIterator(model_ir.graph)):
        scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
        module = str(scopes[-2]).removeprefix(f"{MODEL}.") if len(scopes) > 1 else ""
        kind = f"{node.op_type}_{number}"
        node.name = f"{module}/{kind}" if re.fullmatch(MODULE_PATH, module) else kind


class GraphModule(nn.Module):
    """The module that the exporter traces: a function of a model, held to find the weights by name."""

    def __init__(self, model: nn.Module, run: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self.run = run

    def forward(self, *inputs: Tensor) -> Any:
        return self.run(*inputs)


# ---------------------------------------------------------------- tracing


@dataclass(frozen=True)
class Traceable:
    """A module to trace, its graph, and for each dynamic dimension its range and its size while traced."""

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
    """Describe a graph of the model: `fused` for one with an `If`, else the method of that name."""
    rounded, graph = in_precision(model, precision), model.spec.graph(name)
    run = partial(fused, rounded) if graph.has_if else getattr(rounded, name)
    spec = model.spec
    dims = {ROWS: torch.export.Dim(ROWS, min=1), LATENTS: _latents_dim(spec)}
    dims[TEXT] = torch.export.Dim(TEXT, min=1, max=MAX_TEXT_TOKENS)
    sizes = {ROWS: EXAMPLE_ROWS, LATENTS: 2 * spec.budget_step, TEXT: EXAMPLE_TEXT}
    return Traceable(GraphModule(rounded, run).eval(), graph, dims, sizes)


def _latents_dim(spec: ModelSpec) -> Any:
    """The dimension K; where a model keeps multiples alone, a multiple of the dimension that torch sees."""
    step, max_latents = spec.budget_step, len(spec.budgets)
    if step == 1:
        return torch.export.Dim(LATENTS, min=1, max=max_latents)
    return step * torch.export.Dim(MULTIPLES, min=1, max=max_latents)


def traceable_decoder(decoder: nn.Module, spec: DecoderSpec, max_rows: int | None = None) -> Traceable:
    """Describe the decoder of a VAE."""
    rows = torch.export.Dim(ROWS, min=1, max=max_rows)
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
    """Silence the exporter's messages about torchvision and aliased names: they are harmless and always the same."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        registration.setLevel(level)

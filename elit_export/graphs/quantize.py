"""The graph `step` with its large products in 8 bits, for TensorRT, by NVIDIA Model Optimizer on the CPU.

QuantizeLinear and DequantizeLinear stand around linear layers of attention and MLP, and those that join, merge and
split tokens: activations with one scale each, weights with one for each output, stored in 8 bits. The other products
run in float16. In float32 stay embedders, adaLN, norms, softmax, the tokens between layers and the final layer.
"""

from __future__ import annotations

import io
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from elit_export.arrays import Arrays
from elit_export.backends import BACKENDS
from elit_export.bundle.calibration_inputs import CalibrationInputs
from elit_export.cost.layers import GROUPS, PRODUCTS, layers_of
from elit_export.errors import BackendUnavailable, CalibrationError, summary
from elit_export.spec import ModelSpec, Precision

if TYPE_CHECKING:
    import onnx

LINEAR = tuple(name for name in GROUPS if name != PRODUCTS)
# What is quantized if nothing else is asked for; docs/eight-bits.md has what was tried.
LAYERS_IN: dict[Precision, tuple[str, ...]] = {
    Precision.INT8: tuple(name for name in LINEAR if name != "tail MLP"),
    Precision.FP8: LINEAR,
}


# ---------------------------------------------------------------- the graph


def quantized_graph(
    graph: Path,
    folder: Path,
    precision: Precision,
    inputs: CalibrationInputs,
    spec: ModelSpec,
    layers: Sequence[str] = (),
    *,
    rest: Precision = Precision.FP16,
) -> Path:
    """Write `graph` into `folder` with the products of `layers` (names of GROUPS) in int8 or fp8; gives its path.

    Without `layers` those of LAYERS_IN. The other products of GROUPS run in `rest`, fp16 or fp32. Arrays, outputs and
    opset are those of `graph`; the weights lie beside it as NAME.data.
    Raises BackendUnavailable, or CalibrationError with what the library said.
    """
    assert rest in (Precision.FP16, Precision.FP32)
    import onnx

    source = onnx.load(graph, load_external_data=False)
    wanted = _products(source, spec, layers or LAYERS_IN[precision])
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".quantize-") as private:
        made = onnx.load(_by_modelopt(graph, Path(private), precision, inputs, wanted))
        _unshare(made, wanted)
        _check_complete(made, wanted)
        _check_same_interface(made, source)
        if rest is Precision.FP16:
            _halve(made, set(_products(source, spec, GROUPS)) - set(wanted))
        finished = Path(private) / "finished"
        finished.mkdir()
        onnx.save(made, finished / graph.name, save_as_external_data=True, location=f"{graph.name}.data")
        for name in (f"{graph.name}.data", graph.name):  # the graph last: it is what a reader looks for
            (finished / name).replace(folder / name)
    return folder / graph.name


def _products(model: onnx.ModelProto, spec: ModelSpec, layers: Sequence[str]) -> dict[str, str]:
    """Names of the products to quantize, with the group of layers that each belongs to."""
    if unknown := [name for name in layers if name not in GROUPS]:
        raise CalibrationError(f"no kind of layer {unknown[0]!r}; there are {', '.join(GROUPS)}")
    groups = {layer.path: layer.group for layer in layers_of(spec) if layer.group}
    products = [node.name for node in model.graph.node if node.op_type == "MatMul"]
    found = {name: group for group in layers for name in products if groups.get(name.rpartition("/")[0]) == group}
    if not found:
        raise CalibrationError(f"the graph has no products of {', '.join(layers)}: quantize an fp32 graph of `step`")
    return found


def _by_modelopt(
    graph: Path, private: Path, precision: Precision, inputs: CalibrationInputs, wanted: Mapping[str, str]
) -> Path:
    """The library's own file. It works on a copy, as it writes into what it reads."""
    quantize = _library()
    source, made = private / "source", private / "quantized.onnx"
    source.mkdir()
    for name in (graph.name, f"{graph.name}.data"):
        shutil.copy(graph.parent / name, source)
    try:
        with _silent():
            quantize(
                str(source / graph.name),
                quantize_mode=precision.value,
                calibration_data_reader=Reader(inputs),
                calibration_method="max",
                calibration_eps=["cpu"],
                op_types_to_quantize=["MatMul"],
                nodes_to_quantize=[f"{re.escape(name)}$" for name in wanted],
                disable_mha_qdq=PRODUCTS not in wanted.values(),
                # It would leave out products that have one row in the first sample, and so depend on its budget.
                enable_gemv_detection_for_trt=False,
                high_precision_dtype="fp32",
                dq_only=True,  # weights stored in 8 bits
                use_external_data_format=True,
                output_path=str(made),
                log_level="CRITICAL",
            )
    except Exception as error:  # it raises what it likes
        raise CalibrationError(
            f"modelopt cannot quantize {graph.name} in {precision.value}: {summary(error)}",
            "pip install -U 'elit-export[quantize]', or collect the samples again",
        ) from error
    return made


def check_tools() -> None:
    """Raise BackendUnavailable if what makes and tries 8-bit graphs is not installed."""
    _library()
    BACKENDS["onnxruntime"].loader()


def _library() -> Callable[..., None]:
    try:
        with _silent():
            from modelopt.onnx.quantization import quantize
    except ImportError as error:
        raise BackendUnavailable(
            f"int8 and fp8 graphs need modelopt ({summary(error)})", "pip install 'elit-export[quantize]'"
        ) from error
    function: Callable[..., None] = quantize
    return function


@contextmanager
def _silent() -> Iterator[None]:
    """It prints, warns of missing GPUs and draws bars, all of them harmless."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Reader:
    """Calibration inputs as the library reads them."""

    def __init__(self, inputs: CalibrationInputs) -> None:
        self._source = inputs
        self.rewind()

    def get_next(self) -> Arrays | None:
        return next(self._rows, None)

    def get_first(self) -> Arrays:
        return next(self._source.inputs())

    def rewind(self) -> None:
        self._rows = self._source.inputs()


# ---------------------------------------------------------------- mending and checking what the library made


def _unshare(model: onnx.ModelProto, wanted: Mapping[str, str]) -> None:
    """Give quantized activations to the products alone.

    The library gives them to whatever else reads the tensor: the sums of Write, which carry all tokens past its layers.
    """
    made_by = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            dequantize = made_by.get(name)
            if node.name in wanted or dequantize is None or dequantize.op_type != "DequantizeLinear":
                continue
            quantize = made_by.get(dequantize.input[0])
            if quantize is not None and quantize.op_type == "QuantizeLinear":
                node.input[index] = quantize.input[0]


def _halve(model: onnx.ModelProto, names: set[str]) -> None:
    """Run these products in float16, between casts; weights are stored in it."""
    from onnx import TensorProto, helper, numpy_helper

    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = []
    for node in model.graph.node:
        if node.name not in names:
            nodes.append(node)
            continue
        for index, name in enumerate(node.input):
            if name in weights:  # an exported product has its weight for itself
                halved = numpy_helper.to_array(weights[name]).astype(np.float16)
                weights[name].CopyFrom(numpy_helper.from_array(halved, name))
                continue
            half = node.input[index] = f"{node.name}/input_{index}"
            nodes.append(helper.make_node("Cast", [name], [half], half, to=TensorProto.FLOAT16))
        exact, half = node.output[0], f"{node.name}/output"
        node.output[0] = half
        nodes += [node, helper.make_node("Cast", [half], [exact], half, to=TensorProto.FLOAT)]
    del model.graph.node[:], model.graph.value_info[:]
    model.graph.node.extend(nodes)


def _check_complete(model: onnx.ModelProto, wanted: Mapping[str, str]) -> None:
    """Products of attention may be left out: the library takes those only that TensorRT has kernels for."""
    made_by = {name: node.op_type for node in model.graph.node for name in node.output}
    whole = {
        node.name
        for node in model.graph.node
        if node.name in wanted and [made_by.get(name) for name in node.input] == ["DequantizeLinear"] * 2
    }
    if missing := [name for name, layer in wanted.items() if name not in whole and layer != PRODUCTS]:
        raise CalibrationError(
            f"modelopt left {len(missing)} of {len(wanted)} products in float32, {missing[0]} among them",
            "pip install 'nvidia-modelopt[onnx]==0.47.*'",
        )


def _check_same_interface(made: onnx.ModelProto, source: onnx.ModelProto) -> None:
    for what in ("input", "output"):
        theirs, ours = ([(value.name, value.type) for value in getattr(model.graph, what)] for model in (made, source))
        if theirs != ours:
            raise CalibrationError(
                f"modelopt changed the {what}s of the graph", "pip install 'nvidia-modelopt[onnx]==0.47.*'"
            )

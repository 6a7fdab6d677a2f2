"""The graph `step` with its large products in 8 bits, for TensorRT, by NVIDIA Model Optimizer on the CPU.

Linear layers of attention, MLP, skip projections, TokenMerge and TokenSplit are quantized: activations with one scale
per tensor, weights with one per output channel, stored in 8 bits. The other products run in float16; embedders, adaLN,
norms, softmax, the tokens between layers and the final layer in float32. docs/eight-bits.md has the measurements.
"""

from __future__ import annotations

import io
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from elit_export.arrays import Arrays
from elit_export.backends import BACKENDS
from elit_export.bundle.atomic import naming_file, private_folder
from elit_export.bundle.calibration_inputs import CalibrationInputs
from elit_export.cost.layers import GROUPS, PRODUCTS, layers_of
from elit_export.errors import BackendUnavailable, CalibrationError, pip_install, summary
from elit_export.spec import ModelSpec, Precision

if TYPE_CHECKING:
    import onnx

LINEAR = tuple(name for name in GROUPS if name != PRODUCTS)
# The layers that are quantized by default; docs/eight-bits.md has the alternatives that were measured.
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
    """Write `graph` into `folder` with the products of `layers` (names of GROUPS) in int8 or fp8; returns its path.

    `layers` defaults to LAYERS_IN. The other products of GROUPS run in `rest`, fp16 or fp32. Inputs, outputs and opset
    are those of `graph`; the weights lie beside it as NAME.data.
    Raises BackendUnavailable, or CalibrationError with the library's message.
    """
    assert rest in (Precision.FP16, Precision.FP32)
    import onnx

    source = onnx.load(graph, load_external_data=False)
    products = _products(source, spec, layers or LAYERS_IN[precision])
    with naming_file(folder / graph.name), private_folder(folder, "quantize") as temporary:
        quantized = onnx.load(_run_modelopt(graph, temporary, precision, inputs, products))
        _restore_other_consumers(quantized, products)
        _check_complete(quantized, products)
        _check_same_interface(quantized, source)
        if rest is Precision.FP16:
            _cast_to_half(quantized, set(_products(source, spec, GROUPS)) - set(products))
        final = temporary / "finished"
        final.mkdir()
        onnx.save(quantized, final / graph.name, save_as_external_data=True, location=f"{graph.name}.data")
        for name in (f"{graph.name}.data", graph.name):  # the graph last: readers look for it
            (final / name).replace(folder / name)
    return folder / graph.name


def _products(model: onnx.ModelProto, spec: ModelSpec, layers: Sequence[str]) -> dict[str, str]:
    """Find the products to quantize, by name, with the group of layers of each."""
    if unknown := [name for name in layers if name not in GROUPS]:
        raise CalibrationError(f"no kind of layer {unknown[0]!r}; there are {', '.join(GROUPS)}")
    groups = {layer.path: layer.group for layer in layers_of(spec) if layer.group}
    matmuls = [node.name for node in model.graph.node if node.op_type == "MatMul"]
    products_by_name = {
        name: group for group in layers for name in matmuls if groups.get(name.rpartition("/")[0]) == group
    }
    if not products_by_name:
        raise CalibrationError(f"the graph has no products of {', '.join(layers)}: quantize an fp32 graph of `step`")
    return products_by_name


def _run_modelopt(
    graph: Path, temporary: Path, precision: Precision, inputs: CalibrationInputs, products: Mapping[str, str]
) -> Path:
    """Quantize a copy of the graph, because the library writes into its source; returns the path of its result."""
    quantize = _library()
    source, quantized = temporary / "source", temporary / "quantized.onnx"
    source.mkdir()
    for name in (graph.name, f"{graph.name}.data"):
        shutil.copy(graph.parent / name, source)
    try:
        with _silence():
            quantize(
                str(source / graph.name),
                quantize_mode=precision.value,
                calibration_data_reader=Reader(inputs),
                calibration_method="max",
                calibration_eps=["cpu"],
                op_types_to_quantize=["MatMul"],
                nodes_to_quantize=[f"{re.escape(name)}$" for name in products],
                disable_mha_qdq=PRODUCTS not in products.values(),
                # Detection would skip products with one row in the first sample, and so depend on its budget.
                enable_gemv_detection_for_trt=False,
                high_precision_dtype="fp32",
                dq_only=True,  # weights stored in 8 bits
                use_external_data_format=True,
                output_path=str(quantized),
                log_level="CRITICAL",
            )
    except Exception as error:  # the library raises many types
        raise CalibrationError(
            f"modelopt cannot quantize {graph.name} in {precision.value}: {summary(error)}",
            f"{pip_install('quantize', '-U')}, or collect the samples again",
        ) from error
    return quantized


def check_tools() -> None:
    """Raise BackendUnavailable if the libraries that make and run 8-bit graphs are not installed."""
    _library()
    BACKENDS["onnxruntime"].loader()


def _library() -> Callable[..., None]:
    try:
        with _silence():
            from modelopt.onnx.quantization import quantize
    except ImportError as error:
        raise BackendUnavailable(
            f"int8 and fp8 graphs need modelopt ({summary(error)})", pip_install("quantize")
        ) from error
    function: Callable[..., None] = quantize
    return function


@contextmanager
def _silence() -> Iterator[None]:
    """Silence the library: its output, GPU warnings and progress bars are harmless."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Reader:
    """A reader of calibration inputs with the interface that the library expects."""

    def __init__(self, inputs: CalibrationInputs) -> None:
        self._source = inputs
        self.rewind()

    def get_next(self) -> Arrays | None:
        return next(self._rows, None)

    def get_first(self) -> Arrays:
        return next(self._source.inputs())

    def rewind(self) -> None:
        self._rows = self._source.inputs()


# ---------------------------------------------------------------- corrections and checks of the library's result


def _restore_other_consumers(model: onnx.ModelProto, products: Mapping[str, str]) -> None:
    """Restrict quantized activations to the products.

    The library also gives them to other consumers of the tensor, such as the residual sums of Write.
    """
    producer = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            dequantize = producer.get(name)
            if node.name in products or dequantize is None or dequantize.op_type != "DequantizeLinear":
                continue
            quantize = producer.get(dequantize.input[0])
            if quantize is not None and quantize.op_type == "QuantizeLinear":
                node.input[index] = quantize.input[0]


def _cast_to_half(model: onnx.ModelProto, names: set[str]) -> None:
    """Run these products in float16 between casts; their weights are stored in float16."""
    from onnx import TensorProto, helper, numpy_helper

    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = []
    for node in model.graph.node:
        if node.name not in names:
            nodes.append(node)
            continue
        for index, name in enumerate(node.input):
            if name in weights:  # no other node shares an exported product's weight
                halved = numpy_helper.to_array(weights[name]).astype(np.float16)
                weights[name].CopyFrom(numpy_helper.from_array(halved, name))
                continue
            half = node.input[index] = f"{node.name}/input_{index}"
            nodes.append(helper.make_node("Cast", [name], [half], half, to=TensorProto.FLOAT16))
        full, half = node.output[0], f"{node.name}/output"
        node.output[0] = half
        nodes += [node, helper.make_node("Cast", [half], [full], half, to=TensorProto.FLOAT)]
    del model.graph.node[:], model.graph.value_info[:]
    model.graph.node.extend(nodes)


def _check_complete(model: onnx.ModelProto, products: Mapping[str, str]) -> None:
    """Require that all products are quantized, except those of attention for which TensorRT has no kernels."""
    producer = {name: node.op_type for node in model.graph.node for name in node.output}
    quantized_names = {
        node.name
        for node in model.graph.node
        if node.name in products and [producer.get(name) for name in node.input] == ["DequantizeLinear"] * 2
    }
    if missing := [name for name, layer in products.items() if name not in quantized_names and layer != PRODUCTS]:
        raise CalibrationError(
            f"modelopt left {len(missing)} of {len(products)} products in float32, {missing[0]} among them",
            "pip install 'nvidia-modelopt[onnx]==0.47.*'",
        )


def _check_same_interface(quantized: onnx.ModelProto, source: onnx.ModelProto) -> None:
    for what in ("input", "output"):
        quantized_signature, source_signature = (
            [(value.name, value.type) for value in getattr(model.graph, what)] for model in (quantized, source)
        )
        if quantized_signature != source_signature:
            raise CalibrationError(
                f"modelopt changed the {what}s of the graph", "pip install 'nvidia-modelopt[onnx]==0.47.*'"
            )

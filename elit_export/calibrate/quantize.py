"""The graph `step` with its large products in 8 bits, for TensorRT.

Takes: a float32 graph, samples.  Gives: another graph.  May touch: the folder it is given.
Needs NVIDIA Model Optimizer (`modelopt`), and runs on the CPU.  Knows nothing of: plans.

Quantized are linear layers of attention and MLP, and those that join, merge and split tokens, by QuantizeLinear and
DequantizeLinear around them: activations
with one scale each, weights with one for each output and stored in 8 bits. Products that are left, as those of
attention, run in float16, because float32 has no tensor cores. In float32 stay patch, time and class embedders, adaLN,
norms, softmax, the tokens between layers and the final layer.

What was tried on the shipped model (calibrated on 256 samples; the worst dB over the least, best and most K of every
profile, of velocity / residual, on 20 rows of other trajectories each; the graph run node by node in ONNX Runtime):

                                                              int8           fp8
    every linear layer, activations by their maximum          28.9 / 32.0    26.1 / 28.6
    the same by least entropy                                 24.1 / 32.3    26.1 / 28.6
    by maximum, products of attention too                     28.4 / 30.4    25.7 / 27.9
    by maximum, without the second MLP layers of head, tail   31.8 / 34.6    28.3 / 30.2
    by maximum, without the tail's MLP                        31.8 / 34.3    29.7 / 31.0
    by maximum, without the tail's MLP and Write              33.9 / 36.0    30.2 / 31.8
    by maximum, every linear layer, as the library leaves it  21.2 / 27.4    22.2 / 25.8   (see `_unshare`)

(With the rest in float32; in float16 as here the numbers are the same. The library's own way to float16, its
`high_precision_dtype`, left int8 19 dB.) Hence LAYERS_IN: int8 leaves the tail's MLP, 18 % of the FLOPs at 1 latent of
16 and 6 % at all of them. Entropy cuts off the largest values, holds every activation of every sample in memory, and
the library's fp8 is made for maxima: it puts them at 36 of 448, which leaves room above and costs nothing (at 448:
26.3 / 28.6). Most of the error is of activations (weights alone in int8: 42 dB) and of small t: int8 without the
tail's second layer has 21 dB at t = 0.05 and 39 dB at t = 1. Other models have other weak layers: `sensitivities`.
A small random model with text (tests/text_models.py) has 37.4 / 33.4 dB in int8 and 31.3 / 27.0 dB in fp8, nearly
all of it Write's (37.6 / 33.7, 32.0 / 27.6); its tail's MLP alone has 53 / 49 dB in int8. Random weights say nothing of
trained ones, so LAYERS_IN is the same for it. Padding in its samples does not matter: without, all is within 0.1 dB.
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

from elit_export.backends import BACKENDS
from elit_export.errors import BackendUnavailable, CalibrationError, first_line
from elit_export.samples import Inputs, Samples
from elit_export.spec import Precision

if TYPE_CHECKING:
    import onnx

BLOCKS = ("head", "core", "tail")
PRODUCTS = "attention products"
IN_BLOCK = r"\d+(\.(text|image))?"  # blocks with streams have weights for each of them
# kind of layer → the modules whose products it holds, as in the names of nodes; the kinds are those of `models.cost`
LAYERS: dict[str, str] = {
    **{f"{part} attention": rf"{part}\.{IN_BLOCK}\.attn\.(qkv|q|k|v|proj)" for part in BLOCKS},
    **{f"{part} MLP": rf"{part}\.{IN_BLOCK}\.mlp\.fc[12]" for part in BLOCKS},
    "joins": r"(core|tail)_joins\.\d+",
    "merging": r"merge|split",
    **{part.title(): rf"{part}\.(attn\.(q_proj|kv_proj|proj)|mlp\.fc[12])" for part in ("read", "write")},
    PRODUCTS: r"(head|core|tail)\.\d+(\.attn)?|read|write",  # streams meet outside their own attention
}
LINEAR = tuple(name for name in LAYERS if name != PRODUCTS)
# What is quantized if nothing else is asked for.
LAYERS_IN: dict[Precision, tuple[str, ...]] = {
    Precision.INT8: tuple(name for name in LINEAR if name != "tail MLP"),
    Precision.FP8: LINEAR,
}


# ---------------------------------------------------------------- the graph


def quantized_graph(
    graph: Path,
    folder: Path,
    precision: Precision,
    samples: Samples,
    layers: Sequence[str] = (),
    *,
    rest: Precision = Precision.FP16,
) -> Path:
    """Write `graph` into `folder` with the products of `layers` (names of LAYERS) in int8 or fp8; gives its path.

    Without `layers` those of LAYERS_IN. The other products of LAYERS run in `rest`, fp16 or fp32. Inputs, outputs and
    opset are those of `graph`; the weights lie beside it as NAME.data.
    Raises BackendUnavailable, or CalibrationError with what the library said.
    """
    assert rest in (Precision.FP16, Precision.FP32)
    import onnx

    source = onnx.load(graph, load_external_data=False)
    wanted = _products(source, layers or LAYERS_IN[precision])
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".quantize-") as private:
        made = onnx.load(_by_modelopt(graph, Path(private), precision, samples, wanted))
        _unshare(made, wanted)
        _check_complete(made, wanted)
        _check_same_interface(made, source)
        if rest is Precision.FP16:
            _halve(made, set(_products(source, tuple(LAYERS))) - set(wanted))
        finished = Path(private) / "finished"
        finished.mkdir()
        onnx.save(made, finished / graph.name, save_as_external_data=True, location=f"{graph.name}.data")
        for name in (f"{graph.name}.data", graph.name):  # the graph last: it is what a reader looks for
            (finished / name).replace(folder / name)
    return folder / graph.name


def _products(model: onnx.ModelProto, layers: Sequence[str]) -> dict[str, str]:
    """Names of the products to quantize, with the kind of layer that each belongs to."""
    if unknown := [name for name in layers if name not in LAYERS]:
        raise CalibrationError(f"no kind of layer {unknown[0]!r}; there are {', '.join(LAYERS)}")
    products = [node.name for node in model.graph.node if node.op_type == "MatMul"]
    found = {
        name: layer for layer in layers for name in products if re.fullmatch(LAYERS[layer], name.rpartition("/")[0])
    }
    if not found:
        raise CalibrationError(f"the graph has no products of {', '.join(layers)}: quantize an fp32 graph of `step`")
    return found


def _by_modelopt(graph: Path, private: Path, precision: Precision, samples: Samples, wanted: Mapping[str, str]) -> Path:
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
                calibration_data_reader=Reader(samples),
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
            f"modelopt cannot quantize {graph.name} in {precision.value}: {first_line(error)}: "
            f"pip install -U 'elit-export[quantize]', or take samples anew"
        ) from error
    return made


def check_tools() -> None:
    """Raise BackendUnavailable if what makes and tries 8-bit graphs is not installed."""
    _library()
    BACKENDS["onnxruntime"].engines()


def _library() -> Callable[..., None]:
    try:
        with _silent():
            from modelopt.onnx.quantization import quantize
    except ImportError as error:
        raise BackendUnavailable(
            f"int8 and fp8 graphs need modelopt ({first_line(error)}): pip install 'elit-export[quantize]'"
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
    """Samples as the library reads them."""

    def __init__(self, samples: Samples) -> None:
        self._samples = samples
        self.rewind()

    def get_next(self) -> Inputs | None:
        return next(self._rows, None)

    def get_first(self) -> Inputs:
        return next(self._samples.inputs())

    def rewind(self) -> None:
        self._rows = self._samples.inputs()


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
            f"modelopt left {len(missing)} of {len(wanted)} products in float32, {missing[0]} among them: "
            f"pip install 'nvidia-modelopt[onnx]==0.47.*'"
        )


def _check_same_interface(made: onnx.ModelProto, source: onnx.ModelProto) -> None:
    for what in ("input", "output"):
        theirs, ours = ([(value.name, value.type) for value in getattr(model.graph, what)] for model in (made, source))
        if theirs != ours:
            raise CalibrationError(
                f"modelopt changed the {what}s of the graph: pip install 'nvidia-modelopt[onnx]==0.47.*'"
            )

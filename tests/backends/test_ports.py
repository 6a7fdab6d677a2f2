"""A plan of another graph is refused as it is opened, not when a sampling fails or goes on with a wrong shape."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from elit_export.backends.onnxruntime.engine import OnnxRuntimeEngine
from elit_export.backends.ports import Port, check_ports
from elit_export.bundle.reading import Bundle
from elit_export.errors import BundleError
from elit_export.spec import PROBE, STEP, GraphSpec
from tests.helpers import tiny_spec

GRAPH = tiny_spec().graph(STEP)
REMEDY = "; copy the bundle again, or build it again: elit-export build RECIPE --target TARGET --out BUNDLE"


def ports_of(graph: GraphSpec) -> tuple[list[Port], list[Port]]:
    """As a library tells them: dynamic dimensions are open."""
    inputs = [Port(each.name, each.dtype, opened(each.dims)) for each in graph.inputs]
    return inputs, [Port(each.name, each.dtype, opened(each.dims)) for each in graph.outputs]


def opened(dims: tuple[int | str, ...]) -> tuple[int | None, ...]:
    return tuple(size if isinstance(size, int) else None for size in dims)


def test_a_plan_of_its_graph_passes_in_any_order_and_with_less_told() -> None:
    inputs, outputs = ports_of(GRAPH)
    check_ports(Path("a"), GRAPH, inputs[::-1], outputs[::-1])
    untold = [replace(port, dtype=None, dims=None) for port in inputs]
    check_ports(Path("a"), GRAPH, untold, outputs)
    no_size = [replace(port, dims=(None,) * len(port.dims or ())) for port in outputs]
    check_ports(Path("a"), GRAPH, inputs, no_size)


WRONG = {
    "another name": ("t", {"name": "time"}, "time float32[?]"),
    "another type": ("t", {"dtype": "float64"}, "t float64[?]"),
    "another size": ("x", {"dims": (None, 3, 8, 8)}, "x float32[?, 3, 8, 8]"),
    "fixed rows": ("y", {"dims": (1,)}, "y int64[1]"),
    "another rank": ("x", {"dims": (None, 64)}, "x float32[?, 64]"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_plan_with_another_input_is_refused(kind: str) -> None:
    name, change, said = WRONG[kind]
    inputs, outputs = ports_of(GRAPH)
    changed = [replace(port, **change) if port.name == name else port for port in inputs]  # type: ignore[arg-type]
    with pytest.raises(BundleError) as caught:
        check_ports(Path("plans/step.onnx"), GRAPH, changed, outputs)
    problem = str(caught.value)
    assert problem.startswith("plans/step.onnx: is not a plan of the graph `step`: it takes ")
    assert said in problem
    assert "the graph takes x float32[rows, 1, 8, 8], t float32[rows], y int64[rows], latents int64[latents]" in problem
    assert problem.endswith(REMEDY)


def test_a_plan_that_gives_less_is_refused() -> None:
    inputs, outputs = ports_of(GRAPH)
    with pytest.raises(BundleError, match=r"it gives velocity.*the graph gives velocity float32\[rows, 1, 8, 8\], res"):
        check_ports(Path("a"), GRAPH, inputs, outputs[:-1])


def test_a_plan_may_show_more_than_its_graph_gives() -> None:
    """As the ones that are bisected do."""
    inputs, outputs = ports_of(GRAPH)
    check_ports(Path("a"), GRAPH, inputs, [*outputs, Port("computed", "bool", ())])


def test_onnx_runtime_refuses_a_plan_of_another_graph_and_of_another_model(tiny_bundle: Bundle) -> None:
    """That of OpenVINO is in `test_openvino.py`, that of TensorRT in `test_tensorrt_engine.py`."""
    plan = tiny_bundle.manifest.plan_sets[0].profiles[0].plan
    path = tiny_bundle.verified(plan.artifact) / plan.file
    for graph in (tiny_spec().graph(PROBE), tiny_spec(in_channels=3).graph(STEP)):
        with pytest.raises(BundleError, match=f"is not a plan of the graph `{graph.name}`: it takes x float32"):
            OnnxRuntimeEngine(path, device="cpu", threads=1, graph=graph)

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from elit_export import bisect as module
from elit_export.bisect import bisect, departures, visible
from elit_export.bundle import Bundle
from elit_export.errors import BundleError
from elit_export.verify.cases import Arrays


def test_a_sound_plan_has_no_departure(tiny_bundle: Bundle) -> None:
    verdict = bisect(tiny_bundle, tiny_bundle.manifest.plan_sets[0], case=1)
    assert verdict.departure is None
    assert verdict.graph_db > verdict.least_db
    assert "the stored plan is not what its graph says" in str(verdict)


def test_the_node_with_a_wrong_weight_is_named(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend gets a graph in which one weight differs in the fifth digit."""
    graphs = tiny_bundle.manifest.graphs["step-fp32"]
    graph = onnx.load(tiny_bundle.verified(graphs) / "step.onnx").graph
    victim = next(node for node in graph.node if "core.1.modulation" in str(node.input))
    real = module._engine_outputs

    def with_wrong_weight(model: onnx.ModelProto, *rest: object) -> Arrays:
        wrong = onnx.ModelProto()
        wrong.CopyFrom(model)
        weight = next(tensor for tensor in wrong.graph.initializer if tensor.name in victim.input)
        values = numpy_helper.to_array(weight).copy()
        values.flat[0] += np.float32(1e-3)
        weight.CopyFrom(numpy_helper.from_array(values, weight.name))
        return real(wrong, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_engine_outputs", with_wrong_weight)
    verdict = bisect(tiny_bundle, tiny_bundle.manifest.plan_sets[0], case=1)
    assert verdict.departure is not None
    assert verdict.departure.node == victim.name
    assert f"Gemm ({victim.name})" in str(verdict)


def test_departures_come_in_the_order_of_the_graph() -> None:
    nodes = [onnx.helper.make_node("Neg", [a], [b], name=b) for a, b in (("x", "a"), ("a", "b"), ("b", "c"))]
    exact = {name: np.ones(3, np.float32) for name in "abc"}
    found: Mapping[str, object] = {"a": exact["a"], "b": exact["b"] * 1.1, "c": exact["c"] * 2}
    graph = onnx.helper.make_graph(nodes, "g", [], [])
    assert [departure.node for departure in departures(graph, dict(found), exact, 60.0)] == ["b", "c"]  # type: ignore[arg-type]


def test_all_outputs_become_visible_once(tiny_bundle: Bundle) -> None:
    path = tiny_bundle.verified(tiny_bundle.manifest.graphs["step-fp32"]) / "step.onnx"
    model = onnx.load(path, load_external_data=False)
    names = [value.name for value in visible(model).graph.output]
    assert len(names) == len(set(names)) == sum(len(node.output) for node in model.graph.node)


def test_a_copy_without_graphs_says_so(tiny_bundle: Bundle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_bundle.folder, tmp_path / "copied"))
    shutil.rmtree(folder / "graphs")
    with pytest.raises(BundleError, match="bisecting needs the graph"):
        bisect(Bundle.open(folder), tiny_bundle.manifest.plan_sets[0], case=0)

"""Which node of the graph is the first whose output departs?

Takes: a bundle with its graph, a reference case.  Gives: a Verdict.  May touch: a temporary folder.

The graph is built again by the bundle's own backend with every node's output visible, and each is
compared with ONNX's reference evaluator (NumPy). A fault that only exists in the stored plan, or
already in the graph, shows no such node; the verdict then says which of the two it is.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from elit_export.backends import BACKENDS
from elit_export.bundle import Bundle, PlanSet
from elit_export.errors import BundleError
from elit_export.recipe import Target
from elit_export.runtime.engine import HostArray, to_host
from elit_export.spec import LATENTS
from elit_export.verify.cases import Arrays
from elit_export.verify.metrics import Difference, difference
from elit_export.verify.parity import load_reference
from elit_export.verify.tolerances import TOLERANCES

GRAPH_FILE = "step.onnx"


@dataclass(frozen=True)
class Departure:
    """The first node whose output misses the tolerance, in the order of the graph."""

    operator: str
    node: str
    output: str
    index: int
    found: Difference


@dataclass(frozen=True)
class Verdict:
    """`departure` is None if no node departs; `graph_db` is how well the graph itself agrees with PyTorch."""

    departure: Departure | None
    nodes: int
    graph_db: float
    least_db: float

    def __str__(self) -> str:
        if self.departure:
            first = self.departure
            return (
                f"first departure: node {first.index + 1} of {self.nodes}, {first.operator} ({first.node}), "
                f"output {first.output}: {first.found.sqnr_db:.1f} dB where {self.least_db:g} are needed"
            )
        if self.graph_db < self.least_db:
            return f"every node agrees with the graph, but the graph itself misses PyTorch ({self.graph_db:.1f} dB)"
        return f"all {self.nodes} nodes agree when built again: the stored plan is not what its graph says; build again"


def bisect(bundle: Bundle, plan_set: PlanSet, *, case: int) -> Verdict:
    """Compare every node at one reference case (an index into the plan set's cases).

    Raises BundleError if the bundle is a copy without graphs.
    """
    graph_file = _graph_file(bundle)
    arrays = load_reference(bundle, plan_set.reference)
    inputs = _case_inputs(bundle, plan_set, arrays, case)
    least_db = TOLERANCES[plan_set.precision].step_db
    model = onnx.load(graph_file)
    exact = _reference_outputs(model, inputs)
    with tempfile.TemporaryDirectory() as folder:
        found = _engine_outputs(model, plan_set, inputs, Path(folder))
    graph_db = difference(exact["velocity"], arrays[f"{case}/velocity"]).sqnr_db
    departure = next(departures(model.graph, found, exact, least_db), None)
    return Verdict(departure, len(model.graph.node), graph_db, least_db)


def departures(graph: onnx.GraphProto, found: Arrays, exact: Arrays, least_db: float) -> Iterator[Departure]:
    """Every floating-point output that misses, in the order of the graph."""
    for index, node in enumerate(graph.node):
        for name in node.output:
            if name in found and np.issubdtype(exact[name].dtype, np.floating):
                measured = difference(found[name], exact[name])
                if measured.sqnr_db < least_db:
                    yield Departure(node.op_type, node.name, name, index, measured)


def _graph_file(bundle: Bundle) -> Path:
    (artifact,) = bundle.manifest.graphs.values()
    try:
        return bundle.verified(artifact) / GRAPH_FILE
    except BundleError as error:
        raise BundleError(f"bisecting needs the graph, which this copy lacks: {error}") from error


def _case_inputs(bundle: Bundle, plan_set: PlanSet, arrays: Arrays, case: int) -> Arrays:
    names = [tensor.name for tensor in bundle.manifest.model.spec.step_inputs if tensor.name != LATENTS]
    kept = plan_set.reference.cases[case].kept
    return {name: arrays[f"{case}/{name}"] for name in names} | {LATENTS: np.arange(kept)}


def visible(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose nodes' outputs are all outputs of the graph."""
    marked = onnx.ModelProto()
    marked.CopyFrom(model)
    known = {value.name for value in marked.graph.output}
    names = [name for node in marked.graph.node for name in node.output if name and name not in known]
    marked.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return marked


def _reference_outputs(model: onnx.ModelProto, inputs: Arrays) -> dict[str, HostArray]:
    evaluator = ReferenceEvaluator(visible(model))
    values = evaluator.run(None, inputs)
    return {name: np.asarray(value) for name, value in zip(evaluator.output_names, values, strict=True)}


def _engine_outputs(model: onnx.ModelProto, plan_set: PlanSet, inputs: Arrays, folder: Path) -> Arrays:
    marked = folder / GRAPH_FILE
    onnx.save(visible(model), marked, save_as_external_data=True, location=f"{GRAPH_FILE}.data")
    (folder / "plan").mkdir()
    backend = BACKENDS[plan_set.backend]
    target = Target(backend=plan_set.backend, device=plan_set.device, precision=plan_set.precision)
    profiles = [facts.profile for facts in plan_set.profiles]
    built = next(iter(backend.builder().build_plans(marked, folder / "plan", profiles, target)))
    with backend.engines().open_engine(built.folder / built.file, plan_set) as engine:
        return {name: to_host(array) for name, array in engine(inputs).items()}

"""Finds where a plan that misses PyTorch goes wrong: in the stored plan, the optimiser, a node, or the graph.

Three plans are compared with PyTorch's stored reference outputs until one matches: the stored plan, the graph built
again by the bundle's own backend, and the graph built with every node's output visible, which prevents fusion. If none
matches, each visible output is compared with ONNX's reference evaluator (NumPy), and the first that departs is named.
If none departs, the graph itself misses PyTorch, or rounding adds up.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import packages_distributions, version
from pathlib import Path

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from elit_export.arrays import Arrays
from elit_export.backends import BACKENDS
from elit_export.backends.protocols import GraphFile, PlanFile, to_host
from elit_export.bundle.manifest import PlanSet, ProfileFacts, ReferenceCase
from elit_export.bundle.reading import Bundle
from elit_export.errors import BundleError, InputError
from elit_export.runtime.opening import plan_set_target
from elit_export.spec import STEP, GraphSpec
from elit_export.verify.cases import case_point
from elit_export.verify.metrics import Difference, difference
from elit_export.verify.parity import case_of, load_reference
from elit_export.verify.tolerances import TOLERANCES


class Cause(StrEnum):
    """The cause of a miss."""

    NOTHING = "the stored plan is sound"
    PLAN = "the stored plan is stale or altered"
    OPTIMISER = "the backend's optimiser departs"
    NODE = "a node departs"
    GRAPH = "the graph misses PyTorch"
    ROUNDING = "no single node departs"


@dataclass(frozen=True)
class Departure:
    """The first node whose output misses the tolerance, in the order of the graph."""

    operator: str
    node: str
    output: str
    index: int
    difference: Difference


@dataclass(frozen=True)
class Verdict:
    """A cause, and a message that says where, what was measured and what to type."""

    cause: Cause
    message: str

    def __str__(self) -> str:
        return self.message


def bisect(bundle: Bundle, plan_set: PlanSet, *, case: int) -> Verdict:
    """Find what departs at one reference case (an index into the plan set's cases).

    Raises InputError for plans that say nothing about the nodes of a graph, and BundleError if the bundle is a copy
    without graphs, or its graph was altered.
    """
    _check_follows_graph(bundle, plan_set)
    graph_file = _graph_file(bundle, plan_set)
    trial = _trial(bundle, plan_set, case)
    stored_db = trial.agreement_db(trial.run(trial.stored_plan()))
    if stored_db >= trial.min_db:
        return trial.verdict(Cause.NOTHING, f"it matches PyTorch's stored outputs ({stored_db:.1f} dB)")
    with tempfile.TemporaryDirectory() as folder:
        rebuilt_db = trial.agreement_db(trial.run(trial.build(graph_file, Path(folder))))
    if rebuilt_db >= trial.min_db:
        return trial.verdict(
            Cause.PLAN,
            f"it gives {stored_db:.1f} dB, and {rebuilt_db:.1f} dB when its graph is built again. "
            f"Build it again: rm -r {trial.plan_folder} && {trial.build_command}",
        )
    return _bisected_graph(trial, onnx.load(graph_file), rebuilt_db)


def _bisected_graph(trial: _Trial, model: onnx.ModelProto, rebuilt_db: float) -> Verdict:
    """Give the verdict on a graph whose plan misses also when built again."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = trial.run(trial.build(_saved(visible(model), Path(folder)), Path(folder)))
    visible_db = trial.agreement_db(outputs)
    if visible_db >= trial.min_db:
        return trial.verdict(
            Cause.OPTIMISER,
            f"the graph built again gives {rebuilt_db:.1f} dB, and {visible_db:.1f} dB with every node's output "
            f"visible, which keeps nodes from being fused. {trial.other_version}",
        )
    return _bisected_nodes(trial, model.graph, outputs, _reference_outputs(model, trial.inputs))


def _bisected_nodes(trial: _Trial, graph: onnx.GraphProto, outputs: Arrays, expected: Arrays) -> Verdict:
    """Give the verdict on a graph whose plan misses also with every node's output visible."""
    for first in departures(graph, outputs, expected, trial.min_db):
        return trial.verdict(
            Cause.NODE,
            f"the first is node {first.index + 1} of {len(graph.node)}, {first.operator} ({first.node}), "
            f"output {first.output} with {first.difference.sqnr_db:.1f} dB. {trial.other_version}",
        )
    graph_db, plan_db = trial.agreement_db(expected), trial.agreement_db(outputs)
    if graph_db < trial.min_db:
        folders = f"{trial.bundle.folder / 'graphs'} {trial.bundle.folder / 'plans'}"
        return trial.verdict(
            Cause.GRAPH,
            f"the backend's nodes match it, but its own output gives {graph_db:.1f} dB. "
            f"Export it again: rm -r {folders} && {trial.build_command}",
        )
    return trial.verdict(
        Cause.ROUNDING,
        f"the graph itself gives {graph_db:.1f} dB, its plan {plan_db:.1f} dB: rounding adds up. {trial.other_version}",
    )


def departures(graph: onnx.GraphProto, outputs: Arrays, expected: Arrays, min_db: float) -> Iterator[Departure]:
    """Yield every floating-point output that misses, in the order of the graph."""
    for index, node in enumerate(graph.node):
        for name in node.output:
            if name in outputs and np.issubdtype(expected[name].dtype, np.floating):
                deviation = difference(outputs[name], expected[name])
                if deviation.sqnr_db < min_db:
                    yield Departure(node.op_type, node.name, name, index, deviation)


# ---------------------------------------------------------------- one case


@dataclass(frozen=True)
class _Trial:
    """A reference case with its inputs, PyTorch's outputs, and the bundle's backend that runs it."""

    bundle: Bundle
    plan_set: PlanSet
    case: ReferenceCase
    inputs: Arrays
    expected: Arrays

    @property
    def min_db(self) -> float:
        return TOLERANCES[self.plan_set.precision].step_db

    @property
    def step(self) -> GraphSpec:
        return self.bundle.manifest.model.spec.graph(STEP)

    @property
    def profile(self) -> ProfileFacts:
        return next(facts for facts in self.plan_set.profiles if facts.name == self.case.profile)

    def agreement_db(self, outputs: Arrays) -> float:
        """Compute the lowest SQNR over the outputs."""
        return min(difference(outputs[name], array).sqnr_db for name, array in self.expected.items())

    def stored_plan(self) -> Path:
        return self.bundle.verified(self.profile.plan.artifact) / self.profile.plan.file

    def build(self, graph: Path, folder: Path) -> Path:
        """Build a plan for the case's profile alone, in a new folder below `folder`."""
        plan_set = self.plan_set
        (folder / "plan").mkdir()
        built = (
            BACKENDS[plan_set.backend]
            .builder()
            .build_plan(
                GraphFile(graph, self.step),
                folder / "plan",
                [self.profile.profile],
                plan_set_target(plan_set),
                None,
                lambda _share: None,
            )
        )
        return folder / "plan" / built.file

    def run(self, plan: Path) -> Arrays:
        """Run a plan; the stored one serves all its profiles, one built here only the case's profile."""
        origin = self.profile.plan
        file = PlanFile(plan, self.step, origin.versions, origin.built_on)
        stored = {facts.name: file for facts in self.plan_set.profiles if facts.plan == origin}
        served = stored if plan == self.stored_plan() else {self.profile.name: file}
        loader = BACKENDS[self.plan_set.backend].loader()
        opened = loader.open_engines(served, plan_set_target(self.plan_set))
        with ExitStack() as stack:
            for engine in set(opened.values()):
                stack.enter_context(engine)
            outputs = opened[self.profile.name](self.inputs)
            return {name: to_host(array) for name, array in outputs.items()}

    # ------------------------------------------------------------ messages

    def verdict(self, cause: Cause, detail: str) -> Verdict:
        where = f"profile {self.case.profile}, {case_point(self.case)}"
        return Verdict(cause, f"{where}, where {self.min_db:g} dB are needed: {cause}: {detail}")

    @property
    def plan_folder(self) -> Path:
        return self.bundle.folder / self.profile.plan.artifact.kind / self.profile.plan.artifact.name

    @property
    def build_command(self) -> str:
        return f"elit-export build RECIPE --target {self.plan_set.target} --out {self.bundle.folder}"

    @property
    def other_version(self) -> str:
        library = BACKENDS[self.plan_set.backend].library
        package = packages_distributions().get(library, [library])[0]  # onnxruntime-gpu is onnxruntime too
        return f"Try another version: pip install '{package}!={version(package)}' && {self.build_command}"


def _trial(bundle: Bundle, plan_set: PlanSet, index: int) -> _Trial:
    arrays = load_reference(bundle, plan_set.reference)
    inputs, outputs = case_of(plan_set.reference, index, arrays, bundle.manifest.model.spec)
    return _Trial(bundle, plan_set, plan_set.reference.cases[index], inputs, outputs)


# ---------------------------------------------------------------- graphs


def _check_follows_graph(bundle: Bundle, plan_set: PlanSet) -> None:
    """Require plans whose nodes are those of a stored ONNX graph in the same precision; raises InputError."""
    backend = BACKENDS[plan_set.backend]
    if plan_set.precision.quantized:
        raise InputError(
            f"{plan_set.precision.value} departs at every product, so the first one is not informative",
            f"elit-export calibrate sensitivity {bundle.folder} --samples FILE --precision {plan_set.precision.value} "
            f"shows what each kind of layer costs",
        )
    if not backend.facts.keeps_nodes:
        raise InputError(
            f"plans of {backend.name} do not show the nodes of their graph",
            f"build a target of onnxruntime into {bundle.folder}, which runs the same model, and bisect that one",
        )


def _graph_file(bundle: Bundle, plan_set: PlanSet) -> Path:
    artifact = bundle.manifest.graphs[plan_set.graph].artifact
    folder = bundle.folder / artifact.kind / artifact.name
    if not folder.is_dir():
        raise BundleError(
            f"bisecting needs the graph, which this copy lacks: {folder}",
            "copy it from the bundle as it was built, or verify that one",
        )
    return bundle.verified(artifact) / bundle.manifest.graphs[plan_set.graph].file


def visible(model: onnx.ModelProto) -> onnx.ModelProto:
    """Copy a model with the outputs of all nodes as outputs of the graph."""
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    visible_names = {value.name for value in copied.graph.output}
    names = [name for node in copied.graph.node for name in node.output if name and name not in visible_names]
    copied.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return copied


def _saved(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "visible.onnx"
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data")
    return path


def _reference_outputs(model: onnx.ModelProto, inputs: Arrays) -> Arrays:
    evaluator = ReferenceEvaluator(visible(model))
    values = evaluator.run(None, inputs)
    return {name: np.asarray(value) for name, value in zip(evaluator.output_names, values, strict=True)}

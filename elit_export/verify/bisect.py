"""Where does a plan that misses PyTorch go wrong: in itself, in the optimiser, at a node, or in its graph?

Three plans are held against PyTorch's stored answer until one agrees: the stored one, the graph built
again by the bundle's own backend, and the graph built with every node's output visible, which keeps
nodes from being fused. If none does, each visible output is compared with ONNX's reference evaluator
(NumPy), and the first that departs is named; if none departs, the graph says the same as its plan.
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
from elit_export.verify.cases import point_of
from elit_export.verify.metrics import Difference, difference
from elit_export.verify.parity import case_of, load_reference
from elit_export.verify.tolerances import TOLERANCES


class Cause(StrEnum):
    """What a miss comes from."""

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
    found: Difference


@dataclass(frozen=True)
class Verdict:
    """A cause, and the whole of it in words: where, what was measured, what to type."""

    cause: Cause
    told: str

    def __str__(self) -> str:
        return self.told


def bisect(bundle: Bundle, plan_set: PlanSet, *, case: int) -> Verdict:
    """Find what departs at one reference case (an index into the plan set's cases).

    Raises InputError for plans that say nothing about the nodes of a graph, and BundleError if the bundle is a copy
    without graphs, or its graph was altered.
    """
    _check_follows_graph(bundle, plan_set)
    graph_file = _graph_file(bundle, plan_set)
    trial = _trial(bundle, plan_set, case)
    stored_db = trial.agreement_db(trial.run(trial.stored_plan()))
    if stored_db >= trial.least_db:
        return trial.verdict(Cause.NOTHING, f"it agrees with PyTorch's stored answer ({stored_db:.1f} dB)")
    with tempfile.TemporaryDirectory() as folder:
        rebuilt_db = trial.agreement_db(trial.run(trial.build(graph_file, Path(folder))))
    if rebuilt_db >= trial.least_db:
        return trial.verdict(
            Cause.PLAN,
            f"it gives {stored_db:.1f} dB, and {rebuilt_db:.1f} dB when its graph is built again. "
            f"Build it anew: rm -r {trial.plan_folder} && {trial.build_command}",
        )
    return _bisected_graph(trial, onnx.load(graph_file), rebuilt_db)


def _bisected_graph(trial: _Trial, model: onnx.ModelProto, rebuilt_db: float) -> Verdict:
    """The verdict on a graph whose plan departs also when built again."""
    with tempfile.TemporaryDirectory() as folder:
        found = trial.run(trial.build(_saved(visible(model), Path(folder)), Path(folder)))
    visible_db = trial.agreement_db(found)
    if visible_db >= trial.least_db:
        return trial.verdict(
            Cause.OPTIMISER,
            f"the graph built again gives {rebuilt_db:.1f} dB, and {visible_db:.1f} dB with every node's output "
            f"visible, which keeps nodes from being fused. {trial.other_version}",
        )
    return _bisected_nodes(trial, model.graph, found, _reference_outputs(model, trial.inputs))


def _bisected_nodes(trial: _Trial, graph: onnx.GraphProto, found: Arrays, exact: Arrays) -> Verdict:
    """The verdict on a graph that departs also with every node's output visible."""
    for first in departures(graph, found, exact, trial.least_db):
        return trial.verdict(
            Cause.NODE,
            f"the first is node {first.index + 1} of {len(graph.node)}, {first.operator} ({first.node}), "
            f"output {first.output} with {first.found.sqnr_db:.1f} dB. {trial.other_version}",
        )
    graph_db, plan_db = trial.agreement_db(exact), trial.agreement_db(found)
    if graph_db < trial.least_db:
        folders = f"{trial.bundle.folder / 'graphs'} {trial.bundle.folder / 'plans'}"
        return trial.verdict(
            Cause.GRAPH,
            f"the backend's nodes agree with it, but its own answer gives {graph_db:.1f} dB. "
            f"Export it anew: rm -r {folders} && {trial.build_command}",
        )
    return trial.verdict(
        Cause.ROUNDING,
        f"the graph itself gives {graph_db:.1f} dB, its plan {plan_db:.1f} dB: rounding adds up. {trial.other_version}",
    )


def departures(graph: onnx.GraphProto, found: Arrays, exact: Arrays, least_db: float) -> Iterator[Departure]:
    """Every floating-point output that misses, in the order of the graph."""
    for index, node in enumerate(graph.node):
        for name in node.output:
            if name in found and np.issubdtype(exact[name].dtype, np.floating):
                measured = difference(found[name], exact[name])
                if measured.sqnr_db < least_db:
                    yield Departure(node.op_type, node.name, name, index, measured)


# ---------------------------------------------------------------- one case


@dataclass(frozen=True)
class _Trial:
    """A reference case, what goes in, what PyTorch answered, and how the bundle's backend runs it."""

    bundle: Bundle
    plan_set: PlanSet
    case: ReferenceCase
    inputs: Arrays
    answers: Arrays

    @property
    def least_db(self) -> float:
        return TOLERANCES[self.plan_set.precision].step_db

    @property
    def step(self) -> GraphSpec:
        return self.bundle.manifest.model.spec.graph(STEP)

    @property
    def profile(self) -> ProfileFacts:
        return next(facts for facts in self.plan_set.profiles if facts.name == self.case.profile)

    def agreement_db(self, outputs: Arrays) -> float:
        """The worst of the outputs that PyTorch answered."""
        return min(difference(outputs[name], answer).sqnr_db for name, answer in self.answers.items())

    def stored_plan(self) -> Path:
        return self.bundle.verified(self.profile.plan.artifact) / self.profile.plan.file

    def build(self, graph: Path, folder: Path) -> Path:
        """A plan for the case's profile alone, in a folder made below `folder`."""
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
        """What a plan gives; the stored one serves all its profiles, one built here only this one."""
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

    # ------------------------------------------------------------ words

    def verdict(self, cause: Cause, measured: str) -> Verdict:
        where = f"profile {self.case.profile}, {point_of(self.case)}"
        return Verdict(cause, f"{where}, where {self.least_db:g} dB are needed: {cause}: {measured}")

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
    """Are the nodes of the plans those of a stored ONNX graph, in the precision of that graph?"""
    backend = BACKENDS[plan_set.backend]
    if plan_set.precision.quantized:
        raise InputError(
            f"{plan_set.precision.value} departs at every product, so that the first one tells nothing",
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
    """A copy whose nodes' outputs are all outputs of the graph."""
    marked = onnx.ModelProto()
    marked.CopyFrom(model)
    known = {value.name for value in marked.graph.output}
    names = [name for node in marked.graph.node for name in node.output if name and name not in known]
    marked.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return marked


def _saved(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "visible.onnx"
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data")
    return path


def _reference_outputs(model: onnx.ModelProto, inputs: Arrays) -> Arrays:
    evaluator = ReferenceEvaluator(visible(model))
    values = evaluator.run(None, inputs)
    return {name: np.asarray(value) for name, value in zip(evaluator.output_names, values, strict=True)}

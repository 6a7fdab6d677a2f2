"""The stages of a build: PyTorch's reference outputs, graphs, plans, and the comparison of engines with PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from elit_export.backends import BACKENDS
from elit_export.backends.protocols import GraphFile
from elit_export.bundle.artifacts import REFERENCE_FILE
from elit_export.bundle.keys import GRAPH_LIBRARIES, QUANTIZING_LIBRARY, versions_of
from elit_export.bundle.manifest import Graph, Parity, Plan, PlanSet, ProfileFacts, Reference
from elit_export.bundle.reading import Bundle
from elit_export.bundle.store import Made, Stage
from elit_export.bundle.trust import check_trusted
from elit_export.compiler.decoder import BuiltDecoder
from elit_export.compiler.job import Job
from elit_export.cost.layers import modules_kept_exact
from elit_export.graphs.formats import FORMATS
from elit_export.graphs.quantize import quantized_graph
from elit_export.models.upcast import upcast_on_use
from elit_export.runtime.opening import incompatibility, open_bank
from elit_export.spec import CACHE_GRAPHS, FUSED, GraphSpec, Precision, Profile, Range, covered_text, covering
from elit_export.verify.cases import cache_rows, reference_cases, reference_trajectories
from elit_export.verify.compare import Comparison, require
from elit_export.verify.parity import (
    compared,
    compared_cases,
    comparison_count,
    decoder_parity_of,
    load_reference,
    load_reference_file,
    met_db,
    parity_of,
)
from elit_export.verify.reference import reference_arrays

# The share of a build that is done when a stage begins.
REFERENCE, GRAPH, QUANTIZE, PLANS, VERIFY = 0.1, 0.2, 0.4, 0.5, 0.8
ANY_BUDGET = Range(1, 1, 1)  # for graphs without latents
BEING_BUILT = Parity(status="not run", reason="being built")


# ---------------------------------------------------------------- reference outputs


def make_reference(job: Job) -> Reference:
    """Make PyTorch's reference outputs, which all targets with the same profiles share."""
    cases, rows = reference_cases(job.profiles), cache_rows(job.profiles)
    trajectories = reference_trajectories(job.profiles, job.facts.spec)

    def make(folder: Path) -> Made:
        model = upcast_on_use(job.source.model())
        arrays = reference_arrays(model, cases, rows, trajectories, covered_text(job.profiles))
        np.savez(folder / REFERENCE_FILE, **arrays)  # type: ignore[arg-type]
        return Made({"cache_rows": rows, "cases": cases, "trajectories": trajectories})

    stage = Stage("PyTorch reference", REFERENCE)
    key = job.keys.reference(job.profiles)
    return job.store.artifact(Reference, "reference", key, make, stage=stage, first=job.source.model)


# ---------------------------------------------------------------- graphs


def make_graphs(job: Job, reference: Reference) -> dict[str, Graph]:
    """Make all graphs of the target, by the names under which the bundle stores them."""
    graphs = {}
    for graph in map(job.facts.spec.graph, job.graph_names):
        precision = job.keys.graph_precision(graph)
        exported = graphs[job.keys.stored_name(graph, precision.exported)] = _exported(job, graph, precision.exported)
        if precision.quantized:
            graphs[job.keys.stored_name(graph)] = _quantized(job, graph, exported, reference)
    return graphs


def _exported(job: Job, graph: GraphSpec, precision: Precision) -> Graph:
    name = job.keys.stored_name(graph, precision)

    def make(folder: Path) -> Made:
        graph_format = FORMATS[job.options.facts.input_format.name]
        path = graph_format.export(job.source.model(), graph.name, folder, precision)
        graph_format.describe(path, graph, job.origin, precision)
        versions = versions_of(GRAPH_LIBRARIES)
        return Made({"graph": graph.name, "precision": precision, "file": path.name, "versions": versions})

    stage = Stage(f"export graph {graph.name}", GRAPH)
    key, is_program = job.keys.graph(name), job.options.facts.input_format.is_program
    return job.store.artifact(Graph, name, key, make, stage=stage, first=job.source.model, is_program=is_program)


def _quantized(job: Job, graph: GraphSpec, exact: Graph, reference: Reference) -> Graph:
    """Make a graph in int8 or fp8; raises ParityError if its outputs in ONNX Runtime are too far from PyTorch's."""
    store, precision, key = job.store, job.options.precision, job.keys.quantized(exact, reference)

    def make(folder: Path) -> Made:
        assert job.inputs
        path = quantized_graph(store.path(exact), folder, precision, job.inputs, job.facts.spec)
        FORMATS[job.options.facts.input_format.name].describe(path, graph, job.origin, precision)
        versions = versions_of((*GRAPH_LIBRARIES, QUANTIZING_LIBRARY))
        facts = {"graph": graph.name, "precision": precision, "file": path.name, "versions": versions}
        return Made({**facts, "sqnr_db": _graph_sqnr_db(job, path, reference)})

    stage = Stage(f"quantize graph {graph.name}", QUANTIZE)
    quantized = store.artifact(Graph, job.keys.stored_name(graph), key, make, stage=stage)
    if not job.options.accept_below_tolerance and not met_db(quantized.sqnr_db, precision):
        _graph_sqnr_db(
            job, store.path(quantized), reference
        )  # raises: an earlier recipe accepted it, this one does not
    return quantized


def _graph_sqnr_db(job: Job, graph: Path, reference: Reference) -> float:
    """Return the SQNR of a graph at the worst of the reference cases."""
    from elit_export.backends.onnxruntime.engine import open_as_written

    store, precision = job.store, job.options.precision
    arrays = load_reference_file(store.folder / reference.artifact.kind / reference.artifact.name)
    with open_as_written(graph) as engine:
        comparisons = compared_cases(engine, precision, reference, arrays, job.facts.spec)
        return min(_required(job, comparison).found.sqnr_db for comparison in comparisons)


def _required(job: Job, comparison: Comparison) -> Comparison:
    """Check one comparison of a quantized graph; raises ParityError with the command that helps after a miss."""
    accepted = replace(comparison, accepted=job.options.accept_below_tolerance or "")
    remedy = (
        f"elit-export calibrate sensitivity {job.store.folder} --samples {job.inputs_file} "
        f"--precision {job.options.precision.value} shows which layers cost it"
    )
    return require(accepted, remedy)


# ---------------------------------------------------------------- plans


def make_plan_set(job: Job, graphs: Mapping[str, Graph], reference: Reference, decoder: BuiltDecoder | None) -> PlanSet:
    """Build all plans; no profile is verified yet."""
    groups = BACKENDS[job.options.backend].builder().group_profiles(job.profiles, job.options)
    step, *others = map(job.facts.spec.graph, job.graph_names)
    requested = [(step, group) for group in groups]
    requested += [(graph, (_covering(graph, job.profiles),)) for graph in others]
    if decoder:
        graph = decoder.spec.graph
        requested.append((graph, (Profile(graph.name, ANY_BUDGET, decoder.rows),)))
    share = (VERIFY - PLANS) / len(requested)
    with job.store.staged() as shared:
        plans = [
            _plan(job, graph, graphs[job.keys.stored_name(graph)], group, shared, (PLANS + index * share, share))
            for index, (graph, group) in enumerate(requested)
        ]
    group_plans, graph_plans = plans[: len(groups)], plans[len(groups) :]
    other_plans = {graph.name: plan for (graph, _), plan in zip(requested[len(groups) :], graph_plans, strict=True)}
    return PlanSet(
        target=job.target,
        backend=job.options.backend,
        device=job.options.device,
        precision=job.options.precision,
        options=job.options.options(),
        graph=job.keys.stored_name(step),
        profiles=tuple(
            _profile_facts(profile, plan) for group, plan in zip(groups, group_plans, strict=True) for profile in group
        ),
        cache={name: other_plans[name] for name in CACHE_GRAPHS},
        fused=other_plans.get(FUSED),
        decoder=decoder.facts(other_plans[decoder.spec.graph.name], BEING_BUILT) if decoder else None,
        reference=reference,
        samples=job.inputs.facts if job.inputs else None,
        accepted=job.options.accept_below_tolerance,
    )


def _profile_facts(profile: Profile, plan: Plan) -> ProfileFacts:
    return ProfileFacts(
        name=profile.name,
        latents=profile.latents,
        rows=profile.rows,
        text=profile.text,
        plan=plan,
        parity=BEING_BUILT,
    )


def _covering(graph: GraphSpec, profiles: Sequence[Profile]) -> Profile:
    """Return one profile that covers all of them, for a graph whose plan serves all budgets."""
    latents = covering([profile.latents for profile in profiles]) if graph.elastic else ANY_BUDGET
    text = covered_text(profiles) if graph.takes_text else None
    return Profile(graph.name, latents, covering([profile.rows for profile in profiles]), text)


def _plan(
    job: Job,
    graph: GraphSpec,
    stored: Graph,
    profiles: Sequence[Profile],
    shared: Path,
    part: tuple[float, float],
) -> Plan:
    """Build one plan in a folder inside the one that the plans of the set share.

    `part` is (the share of the build that is done before it, its own share).
    """
    quantizes = not graph.exact and job.options.facts.casts_weights and job.options.precision.quantized
    before, share = part
    names = [
        profile.name for profile in profiles if profile.name != graph.name
    ]  # `_covering` names its profile after the graph
    what = f"build {', '.join([graph.name, *names])}"

    def make(folder: Path) -> Made:
        if job.options.facts.input_format.is_program:
            check_trusted(job.store.folder, stored.artifact, trust=job.trust)
        kept = modules_kept_exact(job.facts.spec) if quantizes else ()
        builder = BACKENDS[job.options.backend].builder()
        built = builder.build_plan(
            GraphFile(job.store.path(stored), graph, kept),
            folder,
            profiles,
            job.options,
            job.inputs if quantizes else None,
            lambda done: job.store.progress(what, before + done * share),
        )
        precision = Precision.FP32 if graph.exact else job.options.precision
        name = f"{graph.name}-{job.target}-{precision.value}-{built.label}"
        return Made({"file": built.file, "versions": built.versions, "built_on": built.built_on}, name)

    key = job.keys.plan(stored, profiles, quantizes=quantizes)
    is_program = job.options.plans_are_programs
    return job.store.artifact(
        Plan, graph.name, key, make, stage=Stage(what, before), beside=shared, is_program=is_program
    )


# ---------------------------------------------------------------- verification


def verified(job: Job, bundle: Bundle, plan_set: PlanSet) -> PlanSet:
    """Return the plan set with the parity of its engines, or why they did not run; raises ParityError at a miss."""
    if all(parity.ran for parity in plan_set.parities):
        return plan_set
    names = [facts.name for facts in plan_set.profiles]
    if reason := incompatibility(plan_set):
        not_run = Parity(status="not run", reason=reason)
        return plan_set.with_parity(dict.fromkeys(names, not_run), not_run)
    job.store.progress("verify", VERIFY)
    comparisons: list[Comparison] = []
    with open_bank(bundle, plan_set) as bank:
        for comparison in compared(bundle, plan_set, bank, load_reference(bundle, plan_set.reference)):
            comparisons.append(require(comparison))
            done = len(comparisons) / comparison_count(plan_set)
            job.store.progress(f"verified {comparison.part}", VERIFY + (1 - VERIFY) * done)
    return plan_set.with_parity({name: parity_of(name, comparisons) for name in names}, decoder_parity_of(comparisons))

"""The plans of a bundle → engines."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from elit_export.backends import BACKENDS, Backend
from elit_export.backends.protocols import Engine, LateEngine, PlanFile
from elit_export.backends.target import Target
from elit_export.bundle.manifest import Plan, PlanSet, described
from elit_export.bundle.reading import Bundle
from elit_export.bundle.recipe import target_of
from elit_export.bundle.trust import check_trusted
from elit_export.errors import BackendUnavailable, BundleError, InputError, did_you_mean
from elit_export.runtime.bank import EngineBank, Slot
from elit_export.runtime.coverage import Coverage
from elit_export.runtime.request import Unopened
from elit_export.runtime.vae import Decoder
from elit_export.spec import FUSED, STEP, Budget, Fit, GraphSpec, Precision, SolverFacts

log = logging.getLogger(__name__)
CACHE = "cache/"  # before the names of the cache's engines, which no profile can have


def select_plan_set(plan_sets: tuple[PlanSet, ...], target: str | None, precision: str | None) -> PlanSet:
    """Return the plan set of a target and precision or, if several fit, the only one that can run on this machine.

    Raises InputError listing all if none or several remain, with the reason for each that cannot run.
    """
    fitting = matching(plan_sets, target, precision)
    if len(fitting) == 1:
        return fitting[0]
    if not fitting:
        asked = {"target": target, "precision": precision}
        words = " ".join(f"{name}={value!r}" for name, value in asked.items() if value is not None)
        raise InputError(
            f"no plan set for {words}; this bundle has {described(plan_sets)}",
            did_you_mean(target or "", [plan_set.target for plan_set in plan_sets if plan_set.target != target]),
        )
    reasons = [incompatibility(plan_set) for plan_set in fitting]
    runnable = tuple(plan_set for plan_set, reason in zip(fitting, reasons, strict=True) if not reason)
    if len(runnable) == 1:
        return runnable[0]
    problem = f"several plan sets fit, choose one: {described(runnable)}" if runnable else "no plan set can run here"
    refused = [
        f"target {plan_set.target} cannot run here: {reason}"
        for plan_set, reason in zip(fitting, reasons, strict=True)
        if reason
    ]
    raise InputError("; ".join([problem, *refused]))


def matching(plan_sets: tuple[PlanSet, ...], target: str | None, precision: str | None) -> list[PlanSet]:
    """List the plan sets of a target and a precision; None means any."""
    return [
        plan_set
        for plan_set in plan_sets
        if target in (None, plan_set.target) and precision in (None, plan_set.precision.value)
    ]


def incompatibility(plan_set: PlanSet) -> str:
    """Say why a plan set cannot run on this machine; empty if it can."""
    try:
        return _backend_of(plan_set).loader().incompatibility(plan_set.plans, plan_set_target(plan_set))
    except (BackendUnavailable, BundleError) as error:
        return str(error)


def plan_set_target(plan_set: PlanSet) -> Target:
    """Return the recipe's target of a plan set; raises BundleError for options that no build writes."""
    return target_of(plan_set.backend, plan_set.device, plan_set.precision.value, plan_set.options)


def _backend_of(plan_set: PlanSet) -> Backend:
    backend = BACKENDS.get(plan_set.backend)
    if backend is None or plan_set.device not in backend.devices:
        raise BundleError(
            f"no backend {plan_set.backend!r} for device {plan_set.device!r} in this version",
            "pip install -U elit-export, or build it again",
        )
    return backend


def check_verified(plan_set: PlanSet, folder: Path) -> None:
    parities = {f"profile {facts.name}": facts.parity for facts in plan_set.profiles}
    if plan_set.decoder:
        parities["the decoder"] = plan_set.decoder.parity
    for part, parity in parities.items():
        if not parity.ran:
            raise BundleError(
                f"{part} of target {plan_set.target} was never compared with PyTorch ({parity.reason})",
                f"run `elit-export verify {folder}` on its device, or, in Python, load with allow_unverified=True",
            )


def open_bank(bundle: Bundle, plan_set: PlanSet) -> EngineBank:
    """Verify and open the plans of one set, each once; the decoder's plan is opened when it is first called."""
    spec = bundle.manifest.model.spec
    step = spec.graph(STEP)
    plans = {facts.name: _plan_file(bundle, plan_set, facts.plan, step) for facts in plan_set.profiles}
    cache = {name: _plan_file(bundle, plan_set, plan, spec.graph(name)) for name, plan in plan_set.cache.items()}
    decoder = _late_decoder(bundle, plan_set)
    opened = _opened({**plans, **{f"{CACHE}{name}": plan for name, plan in cache.items()}}, plan_set)
    slots = [Slot(facts.profile, opened[facts.name]) for facts in plan_set.profiles]
    caching = {name: opened[f"{CACHE}{name}"] for name in cache}
    return EngineBank(slots, spec.budgets, plan_set.precision, caching, decoder)


def _plan_file(bundle: Bundle, plan_set: PlanSet, plan: Plan, graph: GraphSpec) -> PlanFile:
    """Return the file after its hash was verified, and if it can run code, after it is known to be trusted."""
    folder = bundle.verified(plan.artifact)
    with _naming(plan_set):
        if plan_set_target(plan_set).plans_are_programs:
            check_trusted(bundle.folder, plan.artifact, trust=bundle.trust)
    return PlanFile(folder / plan.file, graph, plan.versions, plan.built_on)


def _opened(plans: Mapping[str, PlanFile], plan_set: PlanSet) -> Mapping[str, Engine]:
    began = time.perf_counter()
    with _naming(plan_set):
        engines = _backend_of(plan_set).loader().open_engines(plans, plan_set_target(plan_set))
    where = f"plan set {plan_set.name}, {plan_set.backend} on {plan_set.device}"
    log.info("%s: opened %s in %.2f s", where, ", ".join(plans), time.perf_counter() - began)
    return engines


@contextmanager
def _naming(plan_set: PlanSet) -> Iterator[None]:
    """Put the name of the target before the errors of a plan set."""
    try:
        yield
    except (BackendUnavailable, BundleError) as error:
        raise type(error)(f"target {plan_set.target}: {error.problem}", error.remedy) from error


def _late_decoder(bundle: Bundle, plan_set: PlanSet) -> Engine | None:
    """Verify the decoder's plan now and open it when needed: it takes more memory than a step, and few calls decode.

    It is opened apart from the others, because it shares no arrays with them; on a GPU it has its own stream and
    activation memory.
    """
    facts = plan_set.decoder
    if facts is None:
        return None
    plan, graph = facts.plan, facts.spec.graph
    _plan_file(bundle, plan_set, plan, graph)
    return LateEngine(lambda: _opened_alone(bundle, plan_set, plan, graph))


def open_decoder(bank: EngineBank, plan_set: PlanSet) -> Decoder | None:
    """Return the decoder that runs on a bank's engine, None if the plan set has none."""
    facts = plan_set.decoder
    return Decoder(bank.decode, facts.spec, facts.rows) if facts else None


def open_fused(bundle: Bundle, plan_set: PlanSet) -> Engine:
    """Open the engine of the graph `fused`, which the plan set must have."""
    assert plan_set.fused
    return _opened_alone(bundle, plan_set, plan_set.fused, bundle.manifest.model.spec.graph(FUSED))


def _opened_alone(bundle: Bundle, plan_set: PlanSet, plan: Plan, graph: GraphSpec) -> Engine:
    return _opened({graph.name: _plan_file(bundle, plan_set, plan, graph)}, plan_set)[graph.name]


def coverage_of(bundle: Bundle, plan_set: PlanSet) -> Coverage:
    """Read from the manifest what samplings of a plan set are checked against."""
    fits, problem = cache_fits(bundle)
    solvers, no_solvers = solvers_of(bundle, plan_set.precision)
    return Coverage(
        tuple(facts.profile for facts in plan_set.profiles),
        bundle.manifest.model.spec.budgets,
        frozenset(plan_set.cache),
        fits,
        problem,
        solvers,
        no_solvers,
    )


def unopened(bundle: Bundle, plan_set: PlanSet) -> Unopened:
    """Return what can be asked of a plan set before its engines are open."""
    model = bundle.manifest.model
    return Unopened(model.spec, model.data, coverage_of(bundle, plan_set))


def solvers_of(bundle: Bundle, precision: Precision) -> tuple[tuple[SolverFacts, ...], str]:
    """Return the solver tables of the bundle's checkpoint, those of the precision first, and why there are no more."""
    model, problem = bundle.manifest.model, f"{bundle.folder} has no solver tables"
    own = []
    for facts in bundle.manifest.solvers:
        if other := model.other_checkpoint(facts.checkpoint_sha256):
            problem = f"the solver tables of {bundle.folder} are {other}"
        else:
            own.append(facts)
    return tuple(sorted(own, key=lambda facts: facts.precision is not precision)), problem


def cache_fits(bundle: Bundle) -> tuple[dict[Budget, Fit] | None, str]:
    """Return the calibrated fit of each budget, or None and the reason why there is none to use."""
    model, calibration = bundle.manifest.model, bundle.manifest.cache_calibration
    remedy = f"elit-export calibrate cache {bundle.folder}"
    if calibration is None:
        return None, f"{bundle.folder} has none: {remedy}"
    if problem := model.other_checkpoint(calibration.checkpoint_sha256):
        return None, f"that of {bundle.folder} is {problem}: {remedy}"
    return {budget: calibration.fit_for(budget.kept) for budget in model.spec.budgets}, ""

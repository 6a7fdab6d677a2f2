"""Compares the engines of a bundle with stored reference outputs of PyTorch. Needs neither torch nor the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np

from elit_export.arrays import Arrays, HostArray
from elit_export.backends.protocols import Array, Engine, to_host
from elit_export.bundle.artifacts import REFERENCE_FILE
from elit_export.bundle.manifest import DecoderFacts, Graph, Parity, PlanSet, Reference, ReferenceTrajectory
from elit_export.bundle.readers import PlainArraysError, plain_arrays
from elit_export.bundle.reading import Bundle
from elit_export.errors import BundleError, EngineError
from elit_export.runtime.bank import EngineBank
from elit_export.runtime.conditioning import random_rows
from elit_export.runtime.opening import open_fused
from elit_export.runtime.pipeline import Pipeline
from elit_export.spec import DECODE, FUSED, LATENTS, STEP, ModelSpec, Precision, Profile, Role
from elit_export.verify.cases import (
    cache_inputs,
    case_point,
    decoder_inputs,
    fused_inputs,
    trajectory_profiles,
    trajectory_steps,
)
from elit_export.verify.compare import NO_OUTPUT, Comparison
from elit_export.verify.metrics import Difference, difference, worst
from elit_export.verify.tolerances import CACHE_DB, DECODE_DB, DECODE_RELATIVE, TOLERANCES

MIN_ACCEPTED_DB = 0.0  # errors as large as the values themselves are never accepted
SLACK_DB = 1.0  # a later verify may be this much worse than the accepted SQNR
IDENTICAL_DB = 999.0  # JSON has no infinity

NUMBERS = "biuf"  # NumPy's kinds of types
COPY_AGAIN = "copy the bundle again, or build it again: elit-export build RECIPE --target TARGET --out BUNDLE"


class Case(NamedTuple):
    """The inputs of an engine at one point, and PyTorch's outputs there."""

    point: str
    inputs: Arrays
    expected: Arrays


def compared(bundle: Bundle, plan_set: PlanSet, bank: EngineBank, arrays: Arrays) -> Iterator[Comparison]:
    """Compare every profile at its corners with its own engine, the graphs of the cache, and trajectories step by step.

    An engine that fails or returns values that are not finite is a miss at every point for which it has no output.
    """
    recorded = {f"profile {facts.name}": facts.parity for facts in plan_set.profiles}
    for comparison in _compared(bundle, plan_set, bank, arrays):
        yield _with_acceptance(comparison, plan_set.accepted, recorded.get(comparison.part))


def _with_acceptance(comparison: Comparison, reason: str | None, recorded: Parity | None) -> Comparison:
    """Let steps and trajectories miss down to the recorded SQNR, but not graphs that are fp32 in every plan set."""
    if not reason or comparison.is_graph:
        return comparison
    return replace(comparison, accepted=reason, accepted_from_db=accepted_from_db(recorded))


def accepted_from_db(recorded: Parity | None) -> float:
    """The least SQNR of an accepted miss in a part of which this is recorded."""
    recorded_db = recorded.sqnr_db if recorded else None
    return MIN_ACCEPTED_DB if recorded_db is None else recorded_db - SLACK_DB


def _compared(bundle: Bundle, plan_set: PlanSet, bank: EngineBank, arrays: Arrays) -> Iterator[Comparison]:
    model = bundle.manifest.model
    tolerance = TOLERANCES[plan_set.precision]
    engines = {slot.profile.name: slot.engine for slot in bank.slots}
    reference = plan_set.reference
    for index, case in enumerate(reference.cases):
        yield from _compared_case(engines[case.profile], index, reference, arrays, model.spec, tolerance.step_db)
    for graph, rows in product(bank.cache, plan_set.reference.cache_rows):
        yield from _compared_cache(bank, graph, rows, arrays, model.spec)
    if plan_set.fused:
        with open_fused(bundle, plan_set) as engine:
            yield from _compared_fused(engine, plan_set, arrays, model.spec)
    if plan_set.decoder:
        yield from _compared_decoder(bundle, bank, plan_set.decoder)
    pipeline = Pipeline(bank, model.spec, model.data)
    for trajectory in plan_set.reference.trajectories:
        yield from _compared_trajectory(pipeline, trajectory, arrays, tolerance.trajectory_db)


def compared_cases(
    engine: Engine, precision: Precision, reference: Reference, arrays: Arrays, spec: ModelSpec
) -> Iterator[Comparison]:
    """Compare the single steps of every profile with one engine: for a graph that is not yet a plan."""
    for index in range(len(reference.cases)):
        yield from _compared_case(engine, index, reference, arrays, spec, TOLERANCES[precision].step_db)


def comparison_count(plan_set: PlanSet) -> int:
    """Count the comparisons of a plan set."""
    reference = plan_set.reference
    steps = 2 * len(reference.cases)  # velocity and residual
    cached = 4 * len(reference.cache_rows)  # outputs of CACHE_GRAPHS
    fused = steps + 2 * len(reference.cache_rows) if plan_set.fused else 0
    decoded = len(plan_set.decoder.answers.rows) if plan_set.decoder else 0
    return steps + cached + fused + decoded + sum(trajectory.steps for trajectory in reference.trajectories)


def met_db(sqnr_db: float | None, precision: Precision) -> bool:
    """Whether the SQNR of a single step is within the tolerance of the precision."""
    return sqnr_db is not None and sqnr_db >= TOLERANCES[precision].step_db


def accepted_miss(plan_set: PlanSet, graphs: Mapping[str, Graph]) -> str:
    """The reason why a plan set below its tolerance, or with such a graph, was accepted; empty where none is below."""
    quantized = graphs[plan_set.graph].sqnr_db if plan_set.graph in graphs else None
    is_below = any(facts.parity.status == "accepted" for facts in plan_set.profiles)
    is_below |= quantized is not None and not met_db(quantized, plan_set.precision)
    return (plan_set.accepted or "") if is_below else ""


def parity_of(profile: str, comparisons: Sequence[Comparison]) -> Parity:
    """Take the worst values of a profile, for the manifest.

    A trajectory that missed counts for all profiles it used, a graph of the cache and `fused` for every profile.
    """
    own = [comparison for comparison in comparisons if comparison.part == f"profile {profile}"]
    measured = worst([comparison.found for comparison in own])
    misses = [comparison for comparison in comparisons if not comparison.met and _concerns(comparison, profile)]
    return Parity(
        status="accepted" if misses else "passed",
        reason=misses[0].accepted if misses else "",
        sqnr_db=min(measured.sqnr_db, IDENTICAL_DB),
        max_relative=measured.max_relative,
    )


def decoder_parity_of(comparisons: Sequence[Comparison]) -> Parity:
    """Take the worst values of the decoder, which is fp32: none of its misses is accepted."""
    own = [comparison.found for comparison in comparisons if comparison.part == f"graph {DECODE}"]
    if not own:
        return Parity(status="not run", reason="there is no decoder")
    measured = worst(own)
    return Parity(status="passed", sqnr_db=min(measured.sqnr_db, IDENTICAL_DB), max_relative=measured.max_relative)


def _concerns(comparison: Comparison, profile: str) -> bool:
    return comparison.is_graph or comparison.part == f"profile {profile}" or profile in comparison.profiles


def load_reference(bundle: Bundle, reference: Reference) -> Arrays:
    """Read PyTorch's outputs as the build stored them; raises BundleError."""
    return load_reference_file(bundle.verified(reference.artifact))


def load_reference_file(folder: Path) -> Arrays:
    """Read the outputs from an artifact whose hash was checked."""
    path = folder / REFERENCE_FILE
    try:  # a build compresses nothing
        limit_bytes = path.stat().st_size
        arrays = plain_arrays(path, lambda _: True, what="the reference", error=BundleError, limit_bytes=limit_bytes)
    except (OSError, PlainArraysError) as error:
        raise BundleError(f"{path}: unreadable: {error}", COPY_AGAIN) from error
    return _Stored(path, arrays)


class _Stored(dict[str, HostArray]):
    """Arrays of a file by name; raises BundleError for one that is not there, or not of numbers."""

    def __init__(self, path: Path, arrays: Arrays) -> None:
        super().__init__(arrays)
        self._path = path
        for name, array in arrays.items():
            if array.dtype.kind not in NUMBERS:
                raise BundleError(f"{path}: the array {name} holds {array.dtype}, not numbers", COPY_AGAIN)

    def __missing__(self, name: str) -> HostArray:
        raise BundleError(f"{self._path}: has no array {name}", COPY_AGAIN)


def case_of(reference: Reference, index: int, arrays: Arrays, spec: ModelSpec) -> tuple[Arrays, Arrays]:
    """Select the inputs of `step` and PyTorch's outputs at one reference case."""
    step, latents = spec.graph(STEP), np.arange(reference.cases[index].kept)
    inputs = {
        tensor.name: latents if tensor.role is Role.LATENTS else arrays[f"{index}/{tensor.name}"]
        for tensor in step.inputs
    }
    rows = reference.cases[index].rows
    return inputs, {tensor.name: _of_rows(arrays, f"{index}/{tensor.name}", rows) for tensor in step.outputs}


def _of_rows(arrays: Arrays, name: str, rows: int) -> HostArray:
    """PyTorch's output for so many rows; raises BundleError where the file has others, before inputs are made."""
    values = arrays[name]
    if values.shape[:1] != (rows,):
        raise BundleError(f"the reference output {name} has shape {values.shape}, not {rows} rows", COPY_AGAIN)
    return values


def _compared_case(
    engine: Engine, index: int, reference: Reference, arrays: Arrays, spec: ModelSpec, min_db: float
) -> Iterator[Comparison]:
    """Compare velocity and residual of one case."""
    case = reference.cases[index]
    inputs, expected = case_of(reference, index, arrays, spec)
    outputs, problem = _run(engine, inputs)
    for name, values in expected.items():
        deviation = _difference(outputs, name, values)
        point = f"{case_point(case)} {name}"
        yield Comparison(f"profile {case.profile}", point, deviation, min_db, problem=problem, case=index)


def _compared_cache(bank: EngineBank, graph: str, rows: int, arrays: Arrays, spec: ModelSpec) -> Iterator[Comparison]:
    """Compare a graph of the step cache, which is fp32 in every plan set."""
    names = [tensor.name for tensor in spec.graph(graph).outputs]
    expected = {name: _of_rows(arrays, f"{graph}/{rows}/{name}", rows) for name in names}
    outputs, problem = _run(bank.cache[graph], cache_inputs(graph, rows, spec))
    for name, values in expected.items():
        deviation = _difference(outputs, name, values)
        yield Comparison(f"graph {graph}", f"rows={rows} {name}", deviation, CACHE_DB, problem=problem)


def _compared_fused(engine: Engine, plan_set: PlanSet, arrays: Arrays, spec: ModelSpec) -> Iterator[Comparison]:
    """Compare `fused`: where it computes with `step`, where it reuses with `reuse` and `probe`."""
    step_db = TOLERANCES[plan_set.precision].step_db
    for cases, min_db in (
        (fused_computing(plan_set, arrays, spec), step_db),
        (fused_reusing(plan_set, arrays, spec), CACHE_DB),
    ):
        for point, inputs, expected in cases:
            outputs, problem = _run(engine, inputs)
            for name, values in expected.items():
                deviation = _difference(outputs, name, values)
                yield Comparison(f"graph {FUSED}", f"{point} {name}", deviation, min_db, problem=problem)


def fused_computing(plan_set: PlanSet, arrays: Arrays, spec: ModelSpec) -> Iterator[Case]:
    """The cases in which `fused` computes and gives what `step` gives."""
    for index, case in enumerate(plan_set.reference.cases):
        inputs, expected = case_of(plan_set.reference, index, arrays, spec)
        forced = fused_inputs(inputs, force=True, rows=case.rows, spec=spec)
        reference = {"velocity": expected["velocity"], "residual_next": expected["residual"]}
        yield Case(f"{case_point(case)} computed", forced, reference)


def fused_reusing(plan_set: PlanSet, arrays: Arrays, spec: ModelSpec) -> Iterator[Case]:
    """The cases in which `fused` reuses and gives what `reuse` and `probe` give."""
    first = plan_set.profiles[0]
    for rows in plan_set.reference.cache_rows:
        places = {"velocity": f"reuse/{rows}/velocity", "signal_next": f"probe/{rows}/signal"}
        reference = {name: _of_rows(arrays, place, rows) for name, place in places.items()}
        inputs = {LATENTS: np.arange(first.latents.opt), **_reused(rows, spec), **_any_text(first.profile, rows, spec)}
        yield Case(f"rows={rows} reused", fused_inputs(inputs, force=False, rows=rows, spec=spec), reference)


def _compared_decoder(bundle: Bundle, bank: EngineBank, facts: DecoderFacts) -> Iterator[Comparison]:
    """Compare the decoder of a VAE, which is fp32 in every plan set."""
    assert bank.decoder
    arrays = load_reference_file(bundle.verified(facts.answers.artifact))
    for rows in facts.answers.rows:
        expected = _of_rows(arrays, f"{rows}/pixels", rows)
        outputs, problem = _run(bank.decoder, decoder_inputs(rows, facts.spec))
        deviation = _difference(outputs, "pixels", expected)
        yield Comparison(
            f"graph {DECODE}",
            f"rows={rows} pixels",
            deviation,
            DECODE_DB,
            problem=problem,
            most_relative=DECODE_RELATIVE,
        )


def _any_text(profile: Profile, rows: int, spec: ModelSpec) -> Arrays:
    """Make text inputs, which no block reads where a step is reused."""
    return random_rows(spec, rows, profile.text.min, np.random.default_rng(0)) if profile.text else {}


def _reused(rows: int, spec: ModelSpec) -> Arrays:
    """Join the cases of `reuse` and `probe`: steps were computed at t − forecast and at one before that."""
    inputs = cache_inputs("reuse", rows, spec)
    t_computed = inputs["t"] - inputs.pop("forecast")
    times = {"t_computed": t_computed, "t_computed_prev": t_computed - 1}
    return {**inputs, **times, "signal": cache_inputs("probe", rows, spec)["signal_prev"]}


def _difference(outputs: Mapping[str, Array], name: str, expected: HostArray) -> Difference:
    output = outputs.get(name)
    return NO_OUTPUT if output is None else difference(to_host(output), expected)


def _run(engine: Engine, inputs: Mapping[str, Array]) -> tuple[Mapping[str, Array], str]:
    """Run an engine; returns its outputs, or none and the reason."""
    try:
        return engine(inputs), ""
    except EngineError as error:
        return {}, str(error)


def _compared_trajectory(
    pipeline: Pipeline, trajectory: ReferenceTrajectory, arrays: Arrays, min_db: float
) -> Iterator[Comparison]:
    """Compare every state; where an engine fails, that step and the later ones miss."""
    profiles = trajectory_profiles(pipeline, trajectory)
    states = _states_and_problems(pipeline, trajectory)
    for step, (state, problem) in enumerate(states):
        deviation = NO_OUTPUT if state is None else difference(state, arrays[f"{trajectory.name}/{step}"])
        yield Comparison(f"trajectory {trajectory.name}", f"step {step}", deviation, min_db, profiles, problem)


def _states_and_problems(pipeline: Pipeline, trajectory: ReferenceTrajectory) -> Iterator[tuple[HostArray | None, str]]:
    """Yield a state or the reason why there is none, for each step of the trajectory."""
    done = 0
    try:
        for record in trajectory_steps(pipeline, trajectory):
            yield record.x, ""
            done += 1
    except EngineError as error:
        yield from ((None, str(error)) for _ in range(trajectory.steps - done))

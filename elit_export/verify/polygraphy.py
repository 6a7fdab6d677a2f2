"""The reference cases of a plan set for NVIDIA Polygraphy: its own JSON, a data loader, and the lines that run them."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from polygraphy.comparator import IterationResult, RunResults
from polygraphy.json import save_json

from elit_export.arrays import Arrays
from elit_export.backends.target import ONNX, POLYGRAPHY_ONNXRT, PolygraphyRunner
from elit_export.bundle.atomic import atomic_write, write_text
from elit_export.bundle.manifest import Graph, Plan, PlanSet
from elit_export.bundle.reading import Bundle
from elit_export.runtime.opening import plan_set_target
from elit_export.spec import DECODE, FUSED, STEP, ModelSpec, Precision
from elit_export.verify.cases import cache_inputs, decoder_inputs
from elit_export.verify.parity import (
    Case,
    accepted_from_db,
    case_of,
    fused_computing,
    fused_reusing,
    load_reference,
    load_reference_file,
)
from elit_export.verify.tolerances import CACHE_DB, DECODE_DB, TOLERANCES

INPUTS, OUTPUTS, LOADER, COMMANDS = "inputs.json", "outputs.json", "data_loader.py", "commands.sh"
DATA_LOADER = f'''"""The inputs beside this file, for Polygraphy: --data-loader-script, or data_loader=load_data()."""

from pathlib import Path

from polygraphy.json import load_json


def load_data():
    yield from load_json(str(Path(__file__).with_name("{INPUTS}")))
'''
SLACK = 1.01  # of tolerances, which are written with three digits


@dataclass(frozen=True)
class Part:
    """What one line runs: cases of a plan, in one of its optimization profiles, each output to `least_db`."""

    name: str
    graph: str
    plan: Plan
    cases: Sequence[Case]
    least_db: float
    profile: int = 0


@dataclass(frozen=True)
class Command:
    """A line for a shell; `about` says what it runs."""

    about: str
    line: str


def write_polygraphy(bundle: Bundle, plan_set: PlanSet, folder: Path) -> list[Command]:
    """Write every single step of the reference into `folder`, a folder a part, and COMMANDS, which runs them all.

    Trajectories stay out: Polygraphy has no sampler. Neither engines nor their device are needed. Raises BundleError.
    """
    commands: list[Command] = []
    for part in reference_parts(bundle, plan_set):
        write_cases(part, folder / part.name)
        commands += _commands(bundle, plan_set, part, (folder / part.name).absolute())
    write_text(folder / COMMANDS, script(commands))
    return commands


# ---------------------------------------------------------------- cases


def reference_parts(bundle: Bundle, plan_set: PlanSet) -> Iterator[Part]:
    """The steps of each profile, the graphs of the cache, `fused` and the decoder, as far as the plan set has them."""
    arrays, spec = load_reference(bundle, plan_set.reference), bundle.manifest.model.spec
    yield from _step_parts(plan_set, arrays, spec)
    for graph, plan in plan_set.cache.items():
        yield Part(graph, graph, plan, tuple(_cache_cases(graph, plan_set, arrays, spec)), CACHE_DB)
    if plan_set.fused:
        step_db = TOLERANCES[plan_set.precision].step_db
        computing = tuple(fused_computing(plan_set, arrays, spec))
        yield Part(f"{FUSED}-computing", FUSED, plan_set.fused, computing, step_db)
        yield Part(f"{FUSED}-reusing", FUSED, plan_set.fused, tuple(fused_reusing(plan_set, arrays, spec)), CACHE_DB)
    if plan_set.decoder:
        yield Part(DECODE, DECODE, plan_set.decoder.plan, tuple(_decoder_cases(bundle, plan_set)), DECODE_DB)


def _step_parts(plan_set: PlanSet, arrays: Arrays, spec: ModelSpec) -> Iterator[Part]:
    reference, step_db = plan_set.reference, TOLERANCES[plan_set.precision].step_db
    for number, facts in enumerate(plan_set.profiles):
        indices = [index for index, case in enumerate(reference.cases) if case.profile == facts.name]
        cases = tuple(Case(str(index), *case_of(reference, index, arrays, spec)) for index in indices)
        least_db = min(step_db, accepted_from_db(facts.parity)) if plan_set.accepted else step_db
        place = [one.plan for one in plan_set.profiles[:number]].count(facts.plan)  # among the profiles of its plan
        yield Part(f"{STEP}-{facts.name}", STEP, facts.plan, cases, least_db, place)


def _cache_cases(graph: str, plan_set: PlanSet, arrays: Arrays, spec: ModelSpec) -> Iterator[Case]:
    for rows in plan_set.reference.cache_rows:
        names = [tensor.name for tensor in spec.graph(graph).outputs]
        yield Case(
            str(rows), cache_inputs(graph, rows, spec), {name: arrays[f"{graph}/{rows}/{name}"] for name in names}
        )


def _decoder_cases(bundle: Bundle, plan_set: PlanSet) -> Iterator[Case]:
    assert plan_set.decoder
    answers = plan_set.decoder.answers
    arrays = load_reference_file(bundle.verified(answers.artifact))
    for rows in answers.rows:
        yield Case(str(rows), decoder_inputs(rows, plan_set.decoder.spec), {"pixels": arrays[f"{rows}/pixels"]})


def write_cases(part: Part, folder: Path) -> None:
    results = RunResults()
    results.append(("PyTorch", [IterationResult(dict(case.expected), 0.0, "PyTorch") for case in part.cases]))
    with atomic_write(folder / INPUTS) as temporary:
        save_json([dict(case.inputs) for case in part.cases], str(temporary))
    with atomic_write(folder / OUTPUTS) as temporary:
        save_json(results, str(temporary))  # `results.save` would print
    write_text(folder / LOADER, DATA_LOADER)


# ---------------------------------------------------------------- lines


def _commands(bundle: Bundle, plan_set: PlanSet, part: Part, folder: Path) -> Iterator[Command]:
    """Yield a line for the plan if Polygraphy can open it, and one for its graph if ONNX Runtime can run that."""
    if runner := plan_set_target(plan_set).polygraphy:
        plan = (bundle.folder / part.plan.artifact.kind / part.plan.artifact.name / part.plan.file).absolute()
        yield Command(f"{part.name} of target {plan_set.target}", _line(plan, runner, part, folder))
    if graph := _runnable_graph(bundle, plan_set, part.graph):
        stored = (bundle.folder / graph.artifact.kind / graph.artifact.name / graph.file).absolute()
        if stored.is_file():  # a copy for running leaves graphs out
            about = f"{part.name} as the graph it was built from, in ONNX Runtime"
            yield Command(about, _line(stored, POLYGRAPHY_ONNXRT, part, folder))


def _runnable_graph(bundle: Bundle, plan_set: PlanSet, name: str) -> Graph | None:
    """The fp32 ONNX graph that plans were built from."""
    if plan_set_target(plan_set).facts.input_format is not ONNX:
        return None
    graphs = bundle.manifest.graphs
    named = [graphs[plan_set.graph]] if plan_set.graph in graphs and name == STEP else list(graphs.values())
    fitting = (graph for graph in named if graph.graph == name and graph.precision is Precision.FP32)
    return next((graph for graph in fitting if graph.file.endswith(".onnx")), None)


def _line(model: Path, runner: PolygraphyRunner, part: Part, folder: Path) -> str:
    profile = ("--optimization-profile", str(part.profile)) if runner.by_profile else ()
    words = [
        *("polygraphy", "run", str(model), *runner.options, *profile),
        *("--load-inputs", str(folder / INPUTS), "--load-outputs", str(folder / OUTPUTS)),
        *tolerance_options(part),
    ]
    return " ".join([*runner.environment, shlex.join(words)])


def tolerance_options(part: Part) -> tuple[str, ...]:
    """The part's tolerance as Polygraphy takes it: a mean error of each output, and the SNR, which is the tighter.

    An accepted miss of 0 dB or less has no SNR: an error so large may leave no signal.
    """
    named = (f"{name}:{SLACK * atol:.3g}" for name, atol in _mean_errors(part).items())
    mean = ("--check-error-stat", "mean", "--rtol", "0", "--atol", *named)
    if part.least_db <= 0:
        return ("--compare", "simple", *mean)
    return ("--compare", "simple", "snr", *mean, "--snr-threshold", f"{_snr_db(part.least_db):.2f}")


def _mean_errors(part: Part) -> Mapping[str, float]:
    """The largest mean error of each output that a case within its tolerance may have.

    An SQNR of d dB is a root mean square error of rms · 10^(−d/20), and no mean error is above its root mean square.
    """
    share = 10 ** (-part.least_db / 20)
    names = {name for case in part.cases for name in case.expected}
    return {
        name: share * max(math.sqrt(np.square(case.expected[name], dtype=np.float64).mean()) for case in part.cases)
        for name in sorted(names)
    }


def _snr_db(least_db: float) -> float:
    """The same tolerance where the signal is what the engine gave, which its error may have made smaller."""
    return least_db + 20 * math.log10(1 - 10 ** (-least_db / 20)) - 0.01


def script(commands: Sequence[Command]) -> str:
    """Runs every line, and fails if one does."""
    lines = [f"# {command.about}\n{command.line} || status=1\n" for command in commands]
    return "\n".join(["#!/bin/sh", "status=0\n", *lines, "exit $status\n"])

"""How well a bundle's solver tables hold: on held-out images, and away from where they were calibrated.

    python benchmarks/solver.py BUNDLE [--images 64] [--calls 8] [--seed 90210] [--json FILE]

For each table: its error beside `ab3` with as many calls and 50 Euler steps, from the same noise. Then the same with
another seed, with the guidance scale a quarter lower and higher, at other budgets, and on the other plan sets that run
here. Every error is that of the final images, in dB, against `ab3` at 160 steps with the budget and the guidance that
are sampled with, solved by an fp32 plan set. Nothing here is timed.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from elit_export.arrays import HostArray
from elit_export.bench.contenders import EULER_STEPS, REFERENCE_STEPS, check_unseen
from elit_export.bench.engines import measured_budgets
from elit_export.bundle.reading import Bundle
from elit_export.cli.common import show
from elit_export.cli.plan_sets import runnable_plan_sets
from elit_export.cli.tables.layout import Table, table
from elit_export.errors import ElitExportError, InputError
from elit_export.runtime.conditioning import as_conditioning, numbered
from elit_export.runtime.guidance import Guidance
from elit_export.runtime.options import SamplingOptions, resolve
from elit_export.runtime.pipeline import Pipeline
from elit_export.runtime.request import prepare
from elit_export.runtime.samplers.adams_bashforth import AB3
from elit_export.spec import Precision, SolverFacts
from elit_export.verify.metrics import SampleError, sample_error

AT_ONCE = 16  # images of a part
FAR_IMAGE = 1_000_000  # of another range of noise
SCALES = (0.75, 1.25)


@dataclass(frozen=True)
class Place:
    """Where a table is used: where it was calibrated, or away from there in one respect."""

    name: str
    plan_set: str
    options: SamplingOptions  # of the table itself


@dataclass(frozen=True)
class Row:
    """The errors of a table, and of the samplers beside it, at one place."""

    table: str
    guidance: str
    place: str
    plan_set: str
    solver: SampleError
    ab3: SampleError
    euler: SampleError


# ---------------------------------------------------------------- where a table is used


def own_plan_set(facts: SolverFacts, names: Sequence[str]) -> str:
    """The plan set that a table was calibrated on, or the only one that runs here; raises InputError otherwise."""
    own = f"{facts.target} {facts.precision.value}"
    if own in names:
        return own
    if len(names) > 1:
        raise InputError(
            f"{facts.name} was calibrated on {own}, which does not run here; {', '.join(names)} do",
            f"build that too, or calibrate one here: elit-export calibrate solver BUNDLE --calls {facts.table.calls}",
        )
    print(f"{facts.name} was calibrated on {own}, which does not run here: measured on {names[0]}, the only one")
    return names[0]


def exact_plan_set(pipelines: dict[str, Pipeline]) -> str:
    """The one that makes reference solutions; raises InputError if there is none."""
    for name, pipeline in pipelines.items():
        if pipeline.bank.precision is Precision.FP32:
            return name
    raise InputError(
        f"none of {', '.join(pipelines)} is in fp32, by which errors are measured", "build a target in fp32 too"
    )


def places(facts: SolverFacts, pipelines: dict[str, Pipeline], seed: int) -> Iterator[Place]:
    own = own_plan_set(facts, list(pipelines))
    schedule = {} if facts.table.budgets else {"schedule": facts.schedule}
    options = SamplingOptions(
        sampler=facts.name,
        guidance=facts.guidance,
        guidance_interval=facts.guidance_interval,
        seed=seed,
        **schedule,  # type: ignore[arg-type]
    )
    made_here = own == f"{facts.target} {facts.precision.value}"
    yield Place("as calibrated" if made_here else "on other plans", own, options)
    yield Place("another seed", own, replace(options, seed=seed + 1, first_image=FAR_IMAGE))
    guidance = Guidance.parse(facts.guidance, pipelines[own].spec)
    for factor in SCALES if guidance.guides else ():
        scaled = replace(guidance, scale=max(1.0, guidance.scale * factor))
        yield Place(f"guidance {scaled}", own, replace(options, guidance=str(scaled)))
    if not facts.table.budgets:
        for name in measured_budgets(pipelines[own]):
            if name != facts.schedule:
                yield Place(f"budget {name}", own, replace(options, schedule=name))
    for other in pipelines:
        if other != own:
            yield Place(f"plans {other}", other, options)


# ---------------------------------------------------------------- errors


class Sampled:
    """Samples, each made once; warnings of tables that are used with other guidance are what is measured here."""

    def __init__(self, pipelines: dict[str, Pipeline], images: int) -> None:
        self.pipelines, self._images = pipelines, images
        self._made: dict[tuple[str, str, tuple[SolverFacts, ...]], HostArray] = {}

    def __call__(self, plan_set: str, options: SamplingOptions, *solvers: SolverFacts) -> HostArray:
        """Sample by one of `solvers`, not by a table that the plan set has for itself."""
        key = plan_set, repr(options), solvers
        if key not in self._made:
            print(f"  {plan_set}: {options.sampler} {options.steps or ''}, {options.guidance}, {options.schedule}")
            pipeline = self.pipelines[plan_set]
            spec, coverage = pipeline.spec, pipeline.coverage
            conditioning = as_conditioning(numbered(spec, range(self._images), coverage.text), spec, pipeline.data)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="solver:.* was calibrated for guidance")
                resolved = resolve(spec, options, solvers)
            self._made[key] = pipeline.run(prepare(spec, coverage, conditioning, resolved, AT_ONCE)).latents
        return self._made[key]


def row(facts: SolverFacts, place: Place, sampled: Sampled, exact: str) -> Row:
    ab3 = replace(place.options, sampler="ab3", steps=AB3.steps_within(facts.table.calls))
    euler = replace(ab3, sampler="euler", steps=EULER_STEPS)
    expected = sampled(exact, replace(ab3, steps=REFERENCE_STEPS))
    return Row(
        table=facts.name,
        guidance=facts.guidance,
        place=place.name,
        plan_set=place.plan_set,
        solver=sample_error(sampled(place.plan_set, place.options, facts), expected),
        ab3=sample_error(sampled(place.plan_set, ab3), expected),
        euler=sample_error(sampled(place.plan_set, euler), expected),
    )


def errors_table(facts: SolverFacts, rows: Sequence[Row], images: int) -> Table:
    cells = [
        (each.place, *(cell for error in (each.solver, each.ab3, each.euler) for cell in _cells(error)))
        for each in rows
    ]
    names = (facts.name, f"ab3, {facts.table.calls} calls", f"euler {EULER_STEPS}")
    columns = [f"{name}: {part}" for name in names for part in ("all", "median", "worst")]
    own = f"calibrated for {facts.guidance} on {facts.target} {facts.precision.value}"
    return table(f"{facts.name}, {own}: dB of {images} images", ("used", *columns), cells)


def _cells(error: SampleError) -> tuple[str, ...]:
    return tuple(f"{value:.1f}" for value in (error.pooled_db, error.median_db, error.worst_db))


# ---------------------------------------------------------------- the command


def chosen(bundle: Bundle, calls: Sequence[int], seed: int) -> list[SolverFacts]:
    """The tables of this checkpoint that are asked for; refuses a seed on which one of them was calibrated."""
    tables = [
        facts
        for facts in bundle.manifest.solvers
        if not calls or facts.table.calls in calls
        if facts.checkpoint_sha256 == bundle.manifest.model.checkpoint_sha256
    ]
    if not tables:
        raise InputError("no such solver tables in this bundle", "elit-export calibrate solver BUNDLE --calls 8")
    check_unseen(tables, seed, seed + 1)
    return tables


def opened(bundle: Bundle, stack: ExitStack) -> dict[str, Pipeline]:
    plan_sets, _ = runnable_plan_sets(bundle, None, None)
    return {plan_set.name: stack.enter_context(Pipeline.of(bundle, plan_set)) for plan_set in plan_sets}


def measured(bundle: Bundle, tables: Sequence[SolverFacts], images: int, seed: int) -> dict[SolverFacts, list[Row]]:
    with ExitStack() as stack:
        pipelines = opened(bundle, stack)
        exact = exact_plan_set(pipelines)
        sampled = Sampled(pipelines, images)
        return {
            facts: [row(facts, place, sampled, exact) for place in places(facts, pipelines, seed)] for facts in tables
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--calls", type=int, action="append", default=[], help="only the tables of so many calls")
    parser.add_argument("--seed", type=int, default=90210, help="of the noise; the next one is used too")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    try:
        bundle = Bundle.open(options.bundle)
        tables = chosen(bundle, options.calls, options.seed)
        found = measured(bundle, tables, options.images, options.seed)
    except ElitExportError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    show(*(errors_table(facts, rows, options.images) for facts, rows in found.items()))
    if options.json:
        written: dict[str, Any] = {"images": options.images, "seed": options.seed}
        written["rows"] = [asdict(each) for rows in found.values() for each in rows]
        options.json.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""What a search needs, checked before engines are opened: the space, the reference, and what a study belongs to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from elit_export.bench.contenders import check_unseen
from elit_export.bundle.manifest import PlanSet
from elit_export.bundle.reading import Bundle
from elit_export.errors import CalibrationError, InputError
from elit_export.runtime.conditioning import numbered
from elit_export.runtime.guidance import Guidance
from elit_export.runtime.opening import check_verified, incompatibility, unopened
from elit_export.runtime.request import Samplable, prepared
from elit_export.spec import Precision, SolverFacts
from elit_export.tune.images import reference_config
from elit_export.tune.search import Job
from elit_export.tune.space import Config, Space, sampling_options, solver_tables, space_of


def checked_space(
    bundle: Bundle, plan_sets: Sequence[PlanSet], guidance: str, *, rows: int, images: int, seed: int
) -> Space:
    """Return the choices of a search.

    Raises InputError where profiles do not take what every search samples, or where a solver table was calibrated on
    images that it would be compared by.
    """
    on: Mapping[str, Samplable] = {each.name: unopened(bundle, each) for each in plan_sets}
    for plan_set in plan_sets:
        check_verified(plan_set, bundle.folder)
    space = space_of(on, guidance)
    for name, each in on.items():
        check_unseen(_tables(each, space).values(), seed, seed + 1)
        check_samples(each, space.baseline(name), rows)
        check_samples(each, space.baseline(name), images)
    return space


def _tables(on: Samplable, space: Space) -> dict[str, SolverFacts]:
    return solver_tables(on, Guidance.parse(space.guidance, on.spec), space.largest)


def check_samples(on: Samplable, config: Config, images: int) -> None:
    """Raise InputError where a plan set does not take so many images of a config."""
    prepared(on, numbered(on.spec, range(images), on.coverage.text), sampling_options(config.options))


def reference_plan_set(bundle: Bundle, plan_sets: Sequence[PlanSet], space: Space, *, images: int) -> PlanSet:
    """Return the plan set that computes the reference solution.

    It is one in fp32 that runs here and takes so many images at the largest budget of the space, else the first of
    the search, which takes them.
    """
    every = (*plan_sets, *bundle.manifest.plan_sets)
    exact = (each for each in every if each.precision is Precision.FP32 and _can_run(each))
    return next((each for each in exact if _takes(bundle, each, space, images)), plan_sets[0])


def _can_run(plan_set: PlanSet) -> bool:
    return all(parity.ran for parity in plan_set.parities) and not incompatibility(plan_set)


def _takes(bundle: Bundle, plan_set: PlanSet, space: Space, images: int) -> bool:
    try:
        check_samples(unopened(bundle, plan_set), reference_config(space, plan_set.name), images)
    except (InputError, CalibrationError):  # no profile takes them
        return False
    return True


def belongings(bundle: Bundle, plan_sets: Sequence[PlanSet], job: Job) -> dict[str, Any]:
    """Return what the trials of a study belong to: with anything else they would not be comparable."""
    space = job.space
    references = [each for each in bundle.manifest.plan_sets if each.name == job.reference]
    return {
        "checkpoint": bundle.manifest.model.checkpoint_sha256,
        "plans": {each.name: sorted(plan.artifact.name for plan in each.plans) for each in (*plan_sets, *references)},
        "target": str(job.target),
        "guidance": space.guidance,
        "samplers": space.samplers,
        "solver tables": {each.name: _hashes(unopened(bundle, each), space) for each in plan_sets},
        "reference": job.reference,
        "evaluator": job.evaluator.sha256 if job.evaluator else None,
        "rows": job.rows,
        "images": job.images,
        "seed": job.seed,
    }


def _hashes(on: Samplable, space: Space) -> dict[str, str]:
    return {name: short_hash(asdict(facts.table)) for name, facts in _tables(on, space).items()}


def short_hash(values: Mapping[str, Any]) -> str:
    """Hash values that JSON holds into 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

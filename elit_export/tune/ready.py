"""What a search needs, checked before engines are opened: the space, the reference, and what a study belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from elit_export.bundle.manifest import PlanSet
from elit_export.bundle.reading import Bundle
from elit_export.runtime.conditioning import numbered
from elit_export.runtime.opening import check_verified, incompatibility, unopened
from elit_export.runtime.request import Samplable, prepared
from elit_export.spec import Precision
from elit_export.tune.images import reference_config
from elit_export.tune.search import Job
from elit_export.tune.space import Space, sampling_options, space_of


def checked_space(bundle: Bundle, plan_sets: Sequence[PlanSet], guidance: str, *, rows: int, images: int) -> Space:
    """The choices of a search; raises InputError where profiles do not take what every search samples."""
    on: Mapping[str, Samplable] = {each.name: unopened(bundle, each) for each in plan_sets}
    for plan_set in plan_sets:
        check_verified(plan_set, bundle.folder)
    space = space_of(on, guidance)
    for name, each in on.items():
        check_samples(each, space, name, rows)
        check_samples(each, space, name, images)
    return space


def check_samples(on: Samplable, space: Space, name: str, images: int) -> None:
    """Raise InputError where a plan set does not take so many images at the largest budget."""
    conditioning = numbered(on.spec, range(images), on.coverage.text)
    for config in (space.baseline(name), reference_config(space, name)):
        prepared(on, conditioning, sampling_options(config.options))


def reference_plan_set(bundle: Bundle, plan_sets: Sequence[PlanSet]) -> PlanSet:
    """The plan set that computes the reference solution: one in fp32 that runs here, else the first of the search."""
    every = (*plan_sets, *bundle.manifest.plan_sets)
    exact = (each for each in every if each.precision is Precision.FP32 and _can_run(each))
    return next(exact, plan_sets[0])


def _can_run(plan_set: PlanSet) -> bool:
    return all(parity.ran for parity in plan_set.parities) and not incompatibility(plan_set)


def belongings(bundle: Bundle, plan_sets: Sequence[PlanSet], job: Job) -> dict[str, Any]:
    """What the trials of a study belong to: with anything else they would not be comparable."""
    space = job.space
    return {
        "checkpoint": bundle.manifest.model.checkpoint_sha256,
        "plans": {each.name: sorted(plan.artifact.name for plan in each.plans) for each in plan_sets},
        "target": str(job.target),
        "guidance": space.guidance,
        "samplers": [*space.samplers, *space.tables, *space.budget_tables],
        "reference": job.reference,
        "evaluator": job.evaluator.sha256 if job.evaluator else None,
        "rows": job.rows,
        "images": job.images,
        "seed": job.seed,
    }

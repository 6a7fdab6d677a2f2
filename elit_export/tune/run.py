"""One run of `tune`: search, final measurements, presets."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import numpy as np

from elit_export.bundle.manifest import PlanSet
from elit_export.bundle.presets import Measured as PresetMeasured
from elit_export.bundle.presets import Preset
from elit_export.bundle.reading import Bundle
from elit_export.runtime.pipeline import Pipeline
from elit_export.tune.finals import Finals, Measured, Selection, final_choices, mispredicted, refuse_unmet
from elit_export.tune.images import Images, reference_config
from elit_export.tune.pareto import front, pooled_db
from elit_export.tune.result import PresetResult, TunedRow, TuneResult
from elit_export.tune.search import Job, OnStage, Search
from elit_export.tune.study import Study

NO_EVALUATOR = (
    "without an evaluator only samplings at the largest budget were searched: dB say nothing of the quality of other "
    "budgets"
)
TARGET_IN_DB = "the target is in dB, which other budgets do not have: only the largest one was searched"


@dataclass(frozen=True)
class Origin:
    """Holds where presets go: a bundle, its plan sets by name, why others cannot run, and the command to store."""

    bundle: Bundle
    plan_sets: Mapping[str, PlanSet]
    skipped: Mapping[str, str]
    command: str


@dataclass(frozen=True)
class Tuned:
    """Holds the result as numbers, and the presets as a manifest holds them."""

    result: TuneResult
    presets: list[Preset]


def tune(job: Job, pipelines: Mapping[str, Pipeline], study: Study, origin: Origin, on_stage: OnStage) -> Tuned:
    """Search, measure on unseen images, and choose presets; nothing is written but the study.

    Raises InputError or CalibrationError, naming what comes nearest, for a target that cannot be met.
    """
    search = Search(job, pipelines, study, on_stage)
    search.measure()
    found = search.run()
    if not found.candidates:
        search.refuse_empty()
    images = Images(pipelines, reference_config(job.space, job.reference), seed=job.seed + 1, keep=study.kept)
    finals = Finals(search, images, on_stage)
    chosen = final_choices(found, finals, job.goals)
    if not chosen:
        refuse_unmet(search, finals)
    return _tuned(search, finals, chosen, origin)


def _tuned(search: Search, finals: Finals, chosen: Sequence[Selection], origin: Origin) -> Tuned:
    result = _result(search, finals, chosen, origin)
    presets = [_preset(each, result, origin) for each in chosen]
    pairs = zip(chosen, presets, strict=True)
    return Tuned(replace(result, presets=[_preset_result(*pair, search.job, origin) for pair in pairs]), presets)


def _result(search: Search, finals: Finals, chosen: Sequence[Selection], origin: Origin) -> TuneResult:
    job = search.job
    assert search.smallest
    return TuneResult(
        target=str(job.target),
        guidance=job.space.guidance,
        largest_budget=job.space.largest,
        rows=job.rows,
        images=job.images,
        error_images=finals.error_images,
        seed=job.seed,
        final_seed=job.seed + 1,
        reference=job.reference,
        evaluator=job.evaluator.name if job.evaluator else None,
        trials=job.trial_counts,
        baseline_ms={name: finals.measured[search.space.baseline(name)].ms for name in finals.plan_sets},
        smallest_ms=search.smallest[0],
        found=_rows(list(finals.measured.values())),
        presets=[],
        notes=_notes(job, chosen, origin),
    )


def _rows(measured: Sequence[Measured]) -> list[TunedRow]:
    """Rows by time; the front is that of distance, or of dB where nothing has a distance."""
    ordered = sorted(measured, key=lambda each: each.ms)
    by_distance = any(each.quality.distance for each in ordered)
    evaluated = [each for each in ordered if (each.quality.distance if by_distance else each.quality.errors)]
    on_front = {evaluated[place].config for place in front([(each.ms, _loss(each)) for each in evaluated])}
    return [_row(each, is_on_front=each.config in on_front) for each in ordered]


def _loss(one: Measured) -> float:
    return one.quality.distance.value if one.quality.distance else -pooled_db(one.quality)


def _row(one: Measured, *, is_on_front: bool) -> TunedRow:
    errors, distance = one.quality.errors, one.quality.distance
    return TunedRow(
        name=str(one.config),
        family=one.family,
        plan_set=one.config.plan_set,
        options=one.config.options.model_dump(mode="json"),
        predicted_ms=one.predicted_ms,
        ms=one.ms,
        speedup=one.speedup,
        engine_calls=one.engine_calls,
        keeps_solution=errors is not None,
        sqnr_db=errors.pooled_db if errors else None,
        median_sqnr_db=float(np.median(errors.db)) if errors else None,
        worst_sqnr_db=float(errors.db.min()) if errors else None,
        distance=distance.value if distance else None,
        distance_error=distance.error if distance else None,
        on_front=is_on_front,
    )


def _preset_result(chosen: Selection, preset: Preset, job: Job, origin: Origin) -> PresetResult:
    one, folder, spec = chosen.measured, origin.bundle.folder, origin.bundle.manifest.model.spec
    return PresetResult(
        name=preset.name,
        row=str(one.config),
        plan_set=one.config.plan_set,
        goal=_goal_text(chosen, job),
        remeasured_ms=one.ms,
        remeasured_speedup=one.speedup,
        compared_with=chosen.compared_with,
        worse_than=chosen.worse_than,
        accepted=chosen.is_accepted,
        command=preset.command_line(folder, spec),
        python=preset.python_line(folder, spec),
    )


def _goal_text(chosen: Selection, job: Job) -> str:
    goal, one = chosen.goal, chosen.measured
    if goal.min_db is not None:
        return f"at least {goal.min_db:g} dB"
    if job.target.speedup is not None:
        return f"at least {job.target.speedup / goal.max_cost:.3g} times as fast as the baseline"
    return f"at most {goal.max_cost * job.target.limit_ms(one.ms):.10g} ms"


def _notes(job: Job, chosen: Sequence[Selection], origin: Origin) -> list[str]:
    notes = (
        []
        if job.searches_all_budgets
        else [f"{NO_EVALUATOR}; {job.no_evaluator}" if job.target.is_time else TARGET_IN_DB]
    )
    notes += [f"{name} was not searched: {reason}" for name, reason in origin.skipped.items()]
    notes += [note for each in chosen if (note := mispredicted(each))]
    made = {each.goal.name for each in chosen}
    missing = [goal.name for goal in job.goals if goal.name not in made]
    return [*notes, *(f"no preset {name}: nothing that was found reaches its goal" for name in missing)]


# ---------------------------------------------------------------- presets


def _preset(chosen: Selection, result: TuneResult, origin: Origin) -> Preset:
    one = chosen.measured
    plan_set = origin.plan_sets[one.config.plan_set]
    return Preset(
        name=chosen.goal.name,
        checkpoint_sha256=origin.bundle.manifest.model.checkpoint_sha256,
        target=plan_set.target,
        precision=plan_set.precision,
        options=one.config.options,
        measured=_measured(one, result),
        command=origin.command,
    )


def _measured(one: Measured, result: TuneResult) -> PresetMeasured:
    row = _row(one, is_on_front=False)
    return PresetMeasured(
        rows=result.rows,
        ms=row.ms,
        speedup=row.speedup,
        engine_calls=row.engine_calls,
        images=result.images if row.distance is not None else result.error_images,
        seed=result.final_seed,
        sqnr_db=row.sqnr_db,
        worst_sqnr_db=row.worst_sqnr_db,
        evaluator=result.evaluator,
        distance=row.distance,
        distance_error=row.distance_error,
        machine=f"{platform.machine()} {platform.system()}, {os.cpu_count()} CPUs",
        date=datetime.now(UTC).date().isoformat(),
    )

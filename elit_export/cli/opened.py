"""A bundle, the plan set of it that a command takes, and its engines: opened once and together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from elit_export.errors import ElitExportError

if TYPE_CHECKING:
    from elit_export.bundle.manifest import PlanSet
    from elit_export.bundle.reading import Bundle
    from elit_export.runtime.pipeline import Pipeline

T = TypeVar("T")


@dataclass(frozen=True)
class Opened:
    """The bundle and plan set that one reading of a manifest names. Close the pipeline, or use it in `with`."""

    bundle: Bundle
    plan_set: PlanSet
    pipeline: Pipeline


def opened_once(folder: Path, target: str | None, precision: str | None, *, trust: bool = False) -> Opened:
    """Open a plan set of a bundle; it is opened again where another process replaces the manifest meanwhile."""
    from elit_export.bundle.reading import with_current
    from elit_export.runtime.opening import select_plan_set
    from elit_export.runtime.pipeline import Pipeline

    def opened(bundle: Bundle) -> Opened:
        plan_set = select_plan_set(bundle.manifest.plan_sets, target, precision)
        return Opened(bundle, plan_set, Pipeline.of(bundle, plan_set))

    return with_current(folder, opened, trust=trust)


def on_current(bundle: Bundle, plan_set: PlanSet, work: Callable[[Bundle, PlanSet], T]) -> T:
    """Return what `work` makes of a plan set; `with_current` calls it again where another process replaced it."""
    from elit_export.bundle.reading import with_current
    from elit_export.runtime.opening import select_plan_set

    def again(current: Bundle) -> T:
        return work(current, select_plan_set(current.manifest.plan_sets, plan_set.target, plan_set.precision.value))

    try:
        return work(bundle, plan_set)
    except (ElitExportError, OSError):
        if not bundle.is_replaced:
            raise
    return with_current(bundle.folder, again, trust=bundle.trust)

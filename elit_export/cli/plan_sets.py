"""Which plan sets of a bundle a command measures: one, or with --all each that can run here."""

from __future__ import annotations

from collections.abc import Sequence

from elit_export.bundle.manifest import PlanSet
from elit_export.bundle.reading import Bundle
from elit_export.runtime.opening import check_verified, incompatibility, matching, select_plan_set
from elit_export.spec import Precision


def runnable_plan_sets(
    bundle: Bundle, target: str | None, precision: str | None
) -> tuple[list[PlanSet], dict[str, str]]:
    """Return the requested plan sets that can run here, the most precise first, and why others cannot."""
    reasons = [
        (plan_set, incompatibility(plan_set)) for plan_set in matching(bundle.manifest.plan_sets, target, precision)
    ]
    runnable = [plan_set for plan_set, reason in reasons if not reason]
    if not runnable:
        runnable = [select_plan_set(bundle.manifest.plan_sets, target, precision)]  # says why not, here or in opening
    order = list(Precision)
    skipped = {plan_set.name: reason for plan_set, reason in reasons if reason}
    return sorted(runnable, key=lambda plan_set: order.index(plan_set.precision)), skipped


def verified_plan_sets(
    bundle: Bundle, target: str | None, precision: str | None
) -> tuple[list[PlanSet], dict[str, str]]:
    """Return what `runnable_plan_sets` does; raises BundleError if one was never compared with PyTorch."""
    runnable, skipped = runnable_plan_sets(bundle, target, precision)
    for plan_set in runnable:
        check_verified(plan_set, bundle.folder)
    return runnable, skipped


def selected_plan_sets(
    bundle: Bundle, target: str | None, precision: str | None, *, every: bool
) -> tuple[Sequence[PlanSet], dict[str, str]]:
    """Return the plan set that is meant, or with `every` all that can run here, and why others cannot."""
    if every:
        return runnable_plan_sets(bundle, target, precision)
    return [select_plan_set(bundle.manifest.plan_sets, target, precision)], {}

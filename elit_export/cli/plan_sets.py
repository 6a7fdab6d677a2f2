"""Which plan sets of a bundle a command measures where it takes all that can run here."""

from __future__ import annotations

from elit_export.bundle.manifest import PlanSet
from elit_export.bundle.reading import Bundle
from elit_export.runtime.opening import check_verified, incompatibility, matching, select_plan_set
from elit_export.spec import Precision


def able_plan_sets(bundle: Bundle, target: str | None, precision: str | None) -> tuple[list[PlanSet], dict[str, str]]:
    """Those asked for that can run here, and why the others cannot; raises if none can or one was never verified."""
    asked = matching(bundle.manifest.plan_sets, target, precision)
    judged = [(plan_set, incompatibility(plan_set)) for plan_set in asked]
    able = [plan_set for plan_set, reason in judged if not reason]
    if not able:
        able = [select_plan_set(bundle.manifest.plan_sets, target, precision)]  # which says why not, here or in opening
    for plan_set in able:
        check_verified(plan_set, bundle.folder)
    order = list(Precision)
    skipped = {f"{plan_set.target} {plan_set.precision.value}": reason for plan_set, reason in judged if reason}
    return sorted(able, key=lambda plan_set: order.index(plan_set.precision)), skipped

"""Compares a bundle's engines with PyTorch, by stored reference outputs or by a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from elit_export.arrays import Arrays
from elit_export.bundle.manifest import PlanSet
from elit_export.bundle.reading import Bundle
from elit_export.bundle.store import check_recordable, writing
from elit_export.errors import BundleError
from elit_export.runtime.opening import open_bank
from elit_export.spec import covered_text
from elit_export.verify.compare import Comparison
from elit_export.verify.parity import compared, decoder_parity_of, load_reference, parity_of

if TYPE_CHECKING:
    from elit_export.models.elit import Elit


def verify_plan_set(
    bundle: Bundle,
    plan_set: PlanSet,
    *,
    checkpoint: str | Path | None,
    interface: str | Path | None = None,
    on_comparison: Callable[[Comparison], None],
) -> list[Comparison]:
    """Run every comparison, also after a miss; with `checkpoint`, against the model in PyTorch (needs torch).

    `interface` is the file of Read and Write for a checkpoint that is a folder.

    Raises BundleError if the checkpoint is not the one the bundle was built from.
    """
    if checkpoint:
        arrays = live_reference(bundle, plan_set, checkpoint, interface)
    else:
        arrays = load_reference(bundle, plan_set.reference)
    comparisons = []
    with open_bank(bundle, plan_set) as bank:
        for comparison in compared(bundle, plan_set, bank, arrays):
            on_comparison(comparison)
            comparisons.append(comparison)
    return comparisons


def live_reference(
    bundle: Bundle, plan_set: PlanSet, checkpoint: str | Path, interface: str | Path | None = None
) -> Arrays:
    """Compute the outputs of the checkpoint's own model at the bundle's cases."""
    from elit_export.models.upcast import upcast_on_use  # needs torch
    from elit_export.verify.reference import reference_arrays

    model = upcast_on_use(model_of(bundle, checkpoint, interface))
    reference = plan_set.reference
    text = covered_text([facts.profile for facts in plan_set.profiles])
    return reference_arrays(model, reference.cases, reference.cache_rows, reference.trajectories, text)


def model_of(bundle: Bundle, checkpoint: str | Path, interface: str | Path | None = None) -> Elit:
    """Load the model that the bundle was built from, weights as stored; raises BundleError for another checkpoint."""
    from elit_export.checkpoints.native import checkpoint_sha256, stored_checkpoint  # needs torch

    facts = bundle.manifest.model
    if checkpoint_sha256(checkpoint, interface) != facts.checkpoint_sha256:
        raise BundleError(
            f"{bundle.folder} was not built from {_checkpoint_name(checkpoint, interface)} (sha256 differs)",
            "give its own checkpoint, or build again from this one",
        )
    spec = facts.spec
    return stored_checkpoint(
        checkpoint,
        interface=interface,
        num_heads=spec.num_heads,
        head_depth=spec.head_depth,
        tail_depth=spec.tail_depth,
    )


def _checkpoint_name(checkpoint: str | Path, interface: str | Path | None) -> str:
    return f"{checkpoint} with {interface}" if interface else str(checkpoint)


def check_success_recordable(bundle: Bundle, plan_set: PlanSet) -> None:
    """Raise BundleError, before anything is compared, if a success is to be recorded and could not be."""
    if not _has_run(plan_set):
        check_recordable(bundle.folder)


def _has_run(plan_set: PlanSet) -> bool:
    return all(parity.ran for parity in plan_set.parities)


def record_success(bundle: Bundle, plan_set: PlanSet, comparisons: Sequence[Comparison]) -> bool:
    """Record profiles that were never run as passed; returns True if the manifest changed."""
    assert all(comparison.passed for comparison in comparisons)
    if _has_run(plan_set):
        return False
    parities = {facts.name: parity_of(facts.name, comparisons) for facts in plan_set.profiles}
    verified = plan_set.with_parity(parities, decoder_parity_of(comparisons))
    with writing(bundle.folder) as store:
        manifest = store.manifest  # another target may have been built meanwhile
        if manifest is None or plan_set not in manifest.plan_sets:
            raise BundleError(f"{bundle.folder} was built again meanwhile", "verify it again")
        plan_sets = tuple(verified if old == plan_set else old for old in manifest.plan_sets)
        store.commit(manifest.model_copy(update={"plan_sets": plan_sets}))
    return True

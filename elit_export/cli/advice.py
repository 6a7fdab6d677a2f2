"""The commands that lines with "next:" advise; a test runs each."""

from __future__ import annotations

import shlex
from pathlib import Path

from elit_export.bundle.manifest import Manifest, PlanSet
from elit_export.spec import ModelSpec

MAX_LABELS = 10


def after_build(folder: Path, manifest: Manifest, plan_set: PlanSet) -> str:
    """Say what to do with a plan set: sample, or verify it first where it was never run."""
    if all(parity.ran for parity in plan_set.parities):
        return sample_command(folder, manifest, plan_set)
    return shlex.join(["elit-export", "verify", str(folder), *choosing(manifest, plan_set)])


def sample_command(folder: Path, manifest: Manifest, plan_set: PlanSet, *more: str) -> str:
    """One call's worth of images; of a model with text, of a prompt that is still to be filled in."""
    spec = manifest.model.spec
    shown = ["--prompt", "TEXT", "--encoder", "FOLDER"] if spec.takes_text else ["--labels", _labels(spec, plan_set)]
    return shlex.join(["elit-export", "sample", str(folder), *choosing(manifest, plan_set), *shown, *more])


def choosing(manifest: Manifest, plan_set: PlanSet) -> list[str]:
    """The options that choose a plan set, also where the bundle has others."""
    precisions = [one.precision for one in manifest.plan_sets if one.target == plan_set.target]
    return [
        *("--target", plan_set.target),
        *(("--precision", plan_set.precision.value) if len(precisions) > 1 else ()),
    ]


def _labels(spec: ModelSpec, plan_set: PlanSet) -> str:
    """The first classes, as many as one call takes at every budget."""
    count = min(MAX_LABELS, spec.num_classes, *(facts.profile.rows.max for facts in plan_set.profiles))
    return "0" if count == 1 else f"0-{count - 1}"

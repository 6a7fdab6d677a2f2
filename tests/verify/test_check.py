"""`verify` on real bundles."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from elit_export import Pipeline
from elit_export.bundle.reading import MANIFEST, OWN_HASH, Bundle, manifest_text
from elit_export.bundle.store import writing
from elit_export.checkpoints.native import save_checkpoint
from elit_export.cli import main
from elit_export.errors import BundleError
from elit_export.verify.check import record_success, verify_plan_set
from elit_export.verify.compare import Comparison
from elit_export.verify.parity import comparison_count
from tests.helpers import tiny_model


def check(bundle: Bundle, checkpoint: Path | None = None) -> list[Comparison]:
    (plan_set,) = bundle.manifest.plan_sets
    return verify_plan_set(bundle, plan_set, checkpoint=checkpoint, on_comparison=lambda _: None)


def test_stored_and_live_answers_agree(tiny_bundle: Bundle, tiny_checkpoint: Path) -> None:
    stored, live = check(tiny_bundle), check(tiny_bundle, tiny_checkpoint)
    assert len(stored) == len(live) == comparison_count(tiny_bundle.manifest.plan_sets[0])
    assert all(comparison.passed for comparison in (*stored, *live))
    assert [(c.part, c.point) for c in stored] == [(c.part, c.point) for c in live]


def test_another_checkpoint_is_refused(tiny_bundle: Bundle, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "other.safetensors", tiny_model(core_depth=3))
    with pytest.raises(BundleError, match="was not built from"):
        check(tiny_bundle, tmp_path / "other.safetensors")


def test_success_opens_a_plan_that_was_never_run(tiny_bundle: Bundle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_bundle.folder, tmp_path / "copied"))
    values = json.loads((folder / MANIFEST).read_text())
    for profile in values["plan_sets"][0]["profiles"]:
        profile["parity"] = {"status": "not run", "reason": "built elsewhere"}
    del values[OWN_HASH]
    (folder / MANIFEST).write_text(manifest_text(values))
    bundle = Bundle.open(folder)
    with pytest.raises(BundleError, match="built elsewhere"):
        Pipeline.load(folder)
    with writing(folder):  # before anything is compared
        refused = CliRunner().invoke(main, ["verify", str(folder)])
    assert (refused.exit_code, "another build is writing" in refused.stderr, refused.stdout) == (2, True, "")
    assert record_success(bundle, bundle.manifest.plan_sets[0], check(bundle))
    Pipeline.load(folder).close()
    assert not record_success(Bundle.open(folder), Bundle.open(folder).manifest.plan_sets[0], check(bundle))

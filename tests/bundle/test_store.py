from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from elit_export import Pipeline, compile_bundle
from elit_export.bundle.manifest import SCHEMA
from elit_export.bundle.migrate import STEPS, migrated
from elit_export.bundle.reading import MANIFEST, OWN_HASH, Bundle, manifest_text
from elit_export.bundle.recipe import Recipe, recipe_from_values
from elit_export.bundle.store import LOCK, STAGING, WRITTEN, writing
from elit_export.compiler.build import NOTHING_CHANGED
from elit_export.errors import BundleError, CheckpointError, InputError, ParityError
from elit_export.models.sit import ElitSiT
from elit_export.verify import parity
from elit_export.verify.cases import corners
from elit_export.verify.tolerances import Tolerance
from tests.conftest import recipe_values


@pytest.fixture
def copied(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle.folder, tmp_path / "copied"))


@pytest.fixture
def recipe(tiny_checkpoint: Path) -> Recipe:
    return recipe_from_values(recipe_values(tiny_checkpoint), "test")


# Permissions do not bind the superuser, but nobody can read the memory at address 0.
UNREADABLE = Path("/proc/self/mem")
unreadable_file = pytest.mark.skipif(not UNREADABLE.exists(), reason="needs a file that opens and cannot be read")


def plan_file(folder: Path) -> Path:
    return next((folder / "plans").glob("*/step.onnx"))


def rewrite_manifest(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / MANIFEST).read_text())
    del values[OWN_HASH]
    (folder / MANIFEST).write_text(manifest_text(values | changes))


# ---------------------------------------------------------------- what is refused


def test_missing_plan_is_named_with_the_remedy(copied: Path) -> None:
    plan_file(copied).unlink()
    with pytest.raises(BundleError, match=r"step\.onnx: missing; copy the bundle again or build it again"):
        Pipeline.load(copied)


def test_altered_plan_is_refused_before_a_backend_sees_it(copied: Path) -> None:
    content = bytearray(plan_file(copied).read_bytes())
    content[len(content) // 2] ^= 1
    plan_file(copied).write_bytes(content)
    with pytest.raises(BundleError, match="altered since the build"):
        Pipeline.load(copied)


def test_truncated_weights_are_refused(copied: Path) -> None:
    weights = plan_file(copied).with_name("step.onnx.data")
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(BundleError, match=r"bytes, .* were written"):
        Pipeline.load(copied)


def test_newer_schema_says_to_upgrade(copied: Path) -> None:
    rewrite_manifest(copied, schema_version=99)
    with pytest.raises(BundleError, match=r"schema 99 is newer .*pip install -U"):
        Pipeline.load(copied)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"schema_version": "1"}', '{"schema_version": 1}'])
def test_damaged_manifest_is_refused(copied: Path, content: str) -> None:
    (copied / MANIFEST).write_text(content)
    with pytest.raises(BundleError, match="build it again"):
        Pipeline.load(copied)


@pytest.mark.parametrize("name", ["../outside", "a/b", "..", ".hidden", ""])
def test_artifact_names_cannot_leave_the_bundle(copied: Path, name: str) -> None:
    plan_sets = json.loads((copied / MANIFEST).read_text())["plan_sets"]
    plan_sets[0]["profiles"][0]["plan"]["artifact"]["name"] = name
    rewrite_manifest(copied, plan_sets=plan_sets)
    with pytest.raises(BundleError, match="damaged"):
        Pipeline.load(copied)


def test_an_edited_manifest_is_refused(copied: Path) -> None:
    """A pixel range that differs gives other pictures without any plan being touched."""
    text = (copied / MANIFEST).read_text()
    (copied / MANIFEST).write_text(text.replace('"low": -1.0', '"low": -9.0'))
    with pytest.raises(BundleError, match="altered since the build"):
        Pipeline.load(copied)


@unreadable_file
def test_a_manifest_that_cannot_be_read_is_refused_and_not_built_over(copied: Path, recipe: Recipe) -> None:
    (copied / MANIFEST).unlink()
    (copied / MANIFEST).symlink_to(UNREADABLE)
    before = sorted(copied.rglob("*"))
    with pytest.raises(BundleError, match=r"manifest\.json: cannot be read: .*; allow it \(chmod -R u\+rX"):
        Bundle.open(copied)
    with pytest.raises(BundleError, match=r"manifest\.json: cannot be read"):
        compile_bundle(recipe, "cpu", out=copied)
    assert sorted(copied.rglob("*")) == before


@unreadable_file
def test_a_plan_that_cannot_be_read_is_refused(copied: Path) -> None:
    bundle = Bundle.open(copied)
    plan = bundle.manifest.plan_sets[0].plans[0].artifact
    plan_file(copied).unlink()
    (copied / "plans" / plan.name / "step.onnx").symlink_to(UNREADABLE)
    of_its_size = plan.files["step.onnx"].model_copy(update={"size_bytes": 0})
    with pytest.raises(BundleError, match=r"step\.onnx: cannot be read: .*copy the bundle again"):
        bundle.verified(plan.model_copy(update={"files": {"step.onnx": of_its_size}}))


def test_a_folder_in_place_of_the_manifest_is_no_bundle(copied: Path, recipe: Recipe) -> None:
    (copied / MANIFEST).unlink()
    (copied / MANIFEST).mkdir()
    with pytest.raises(BundleError, match="no bundle at"):
        Bundle.open(copied)
    with pytest.raises(BundleError, match=r"holds other things \(manifest\.json\)"):
        compile_bundle(recipe, "cpu", out=copied)
    assert plan_file(copied).is_file()


def test_no_bundle_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no bundle at .*elit-export build RECIPE"):
        Pipeline.load(tmp_path)


def test_unknown_target_lists_what_there_is(copied: Path) -> None:
    with pytest.raises(InputError, match=r"target='gpu'.*target='cpu' precision='fp32'"):
        Pipeline.load(copied, target="gpu")


def test_never_verified_plan_needs_consent(copied: Path) -> None:
    plan_sets = json.loads((copied / MANIFEST).read_text())["plan_sets"]
    plan_sets[0]["profiles"][0]["parity"] = {"status": "not run", "reason": "built without its device"}
    rewrite_manifest(copied, plan_sets=plan_sets)
    with pytest.raises(BundleError, match=r"built without its device.*allow_unverified=True"):
        Pipeline.load(copied)
    Pipeline.load(copied, allow_unverified=True).close()


def test_plan_of_a_newer_onnxruntime_is_refused(copied: Path) -> None:
    plan_sets = json.loads((copied / MANIFEST).read_text())["plan_sets"]
    for profile in plan_sets[0]["profiles"]:
        profile["plan"]["versions"]["onnxruntime"] = "99.0.0"
    rewrite_manifest(copied, plan_sets=plan_sets)
    with pytest.raises(BundleError, match=r"built with onnxruntime 99\.0\.0"):
        Pipeline.load(copied)


# ---------------------------------------------------------------- what works


def test_moved_bundle_works(copied: Path, tmp_path: Path) -> None:
    moved = copied.rename(tmp_path / "moved")
    with Pipeline.load(moved) as pipeline:
        assert pipeline.sample([0], steps=2).latents.shape == (1, 1, 8, 8)


def test_copy_for_running_needs_no_graphs_and_no_reference(copied: Path) -> None:
    shutil.rmtree(copied / "graphs")
    shutil.rmtree(copied / "reference")
    with Pipeline.load(copied) as pipeline:
        assert pipeline.sample([0], steps=2).latents.shape == (1, 1, 8, 8)


def test_sampling_loads_neither_torch_nor_onnx(copied: Path) -> None:
    script = textwrap.dedent(
        f"""
        import sys
        from elit_export import Pipeline
        with Pipeline.load({str(copied)!r}) as pipeline:
            pipeline.sample([0, 1], steps=3, guidance="ccfg:2@1")
        print([name for name in ("torch", "onnx", "onnxscript", "safetensors") if name in sys.modules])
        """
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------- earlier schemas


def as_schema_6(folder: Path) -> None:
    """The manifest as an earlier version wrote it, where only the name of a graph told what it is."""
    graphs = json.loads((folder / MANIFEST).read_text())["graphs"]
    for graph in graphs.values():
        del graph["graph"], graph["precision"]
    rewrite_manifest(folder, schema_version=6, graphs=graphs)


def test_a_bundle_of_schema_6_is_read_as_todays(copied: Path, recipe: Recipe) -> None:
    today = Bundle.open(copied).manifest
    as_schema_6(copied)
    assert Bundle.open(copied).manifest == today
    with Pipeline.load(copied) as pipeline:
        assert pipeline.sample([0], steps=2).latents.shape == (1, 1, 8, 8)


def test_a_build_takes_what_schema_6_has(copied: Path, recipe: Recipe) -> None:
    as_schema_6(copied)
    stages: list[str] = []
    compile_bundle(recipe, "cpu", out=copied, progress=lambda stage, _: stages.append(stage))
    assert stages == [NOTHING_CHANGED]


@pytest.mark.parametrize(
    ("name", "graph", "precision"),
    [
        ("step-fp32", "step", "fp32"),
        ("step-int8-0123abcd", "step", "int8"),
        ("probe-fp32-program", "probe", "fp32"),
        ("decode-fp32", "decode", "fp32"),
    ],
)
def test_names_of_graphs_in_schema_6_tell_what_they_are(name: str, graph: str, precision: str) -> None:
    rest = {"plan_sets": [], "cache_calibration": None}
    made = migrated({"schema_version": 6, "graphs": {name: {"file": "f"}}, **rest}, 6)
    assert made["schema_version"] == SCHEMA
    assert made["graphs"] == {name: {"file": "f", "graph": graph, "precision": precision}}


def test_numbers_of_a_decoder_and_of_fits_in_schema_7_become_values() -> None:
    vae = {"channels": 1, "image_channels": 3, "scale": [0.5], "shift": [0.0], "factor": 8, "side": 4}
    fit = {"coefficients": [0, 1, 0, 0, 0], "low": 0.0, "high": 1.0}
    values = {
        "plan_sets": [{"target": "a", "decoder": {"class_name": "C", **vae}}, {"target": "b", "decoder": None}],
        "cache_calibration": {"seed": 1, "fits": [{"kept": None, **fit}]},
    }
    assert migrated(values, 7) == {
        "schema_version": SCHEMA,
        "plan_sets": [{"target": "a", "decoder": {"class_name": "C", "spec": vae}}, {"target": "b", "decoder": None}],
        "cache_calibration": {"seed": 1, "fits": [{"kept": None, "fit": fit}]},
    }


def test_every_schema_from_the_first_that_is_read_leads_to_todays() -> None:
    assert sorted(STEPS) == list(range(min(STEPS), SCHEMA))


@pytest.mark.parametrize("graphs", [{"step": {}}, {"step-fp33": {}}, {"step-fp32": []}, [], None])
def test_a_manifest_of_schema_6_that_cannot_be_is_damaged(copied: Path, graphs: Any) -> None:
    rewrite_manifest(copied, schema_version=6, graphs=graphs)
    with pytest.raises(BundleError, match=r"damaged: .*build it again"):
        Bundle.open(copied)


# ---------------------------------------------------------------- writing


def test_second_build_into_one_folder_is_refused(copied: Path, recipe: Recipe) -> None:
    with writing(copied), pytest.raises(BundleError, match="another build is writing into"):
        compile_bundle(recipe, "cpu", out=copied)


def test_failed_build_leaves_the_old_bundle(
    copied: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan is made and opened, but misses an impossible tolerance: nothing of it may count."""
    before = (copied / MANIFEST).read_bytes()
    impossible = {precision: Tolerance(step_db=1e4, trajectory_db=0.0) for precision in parity.TOLERANCES}
    monkeypatch.setattr(parity, "TOLERANCES", impossible)
    other_rows = recipe_values(tiny_checkpoint) | {"rows": {"min": 1, "opt": 1, "max": 4}}
    with pytest.raises(ParityError, match=r"profile full, .* would have passed"):
        compile_bundle(recipe_from_values(other_rows, "test"), "cpu", out=copied)
    assert (copied / MANIFEST).read_bytes() == before
    assert not (copied / STAGING).exists()
    Pipeline.load(copied).close()


def damage(folder: Path) -> None:
    content = bytearray((folder / MANIFEST).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / MANIFEST).write_bytes(content)


@pytest.mark.parametrize("is_old", [False, True])
def test_a_failed_build_deletes_no_artifacts_of_a_manifest_it_cannot_read(
    copied: Path, recipe: Recipe, tmp_path: Path, is_old: bool
) -> None:
    """What such a manifest names is not known, and a person may still mend it."""
    good = (copied / MANIFEST).read_bytes()
    if is_old:
        rewrite_manifest(copied, schema_version=0)
    else:
        damage(copied)
    with pytest.raises(BundleError, match="build it again"):
        Bundle.open(copied)
    before = sorted(copied.rglob("*"))
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        compile_bundle(recipe, "cpu", out=copied, checkpoint=tmp_path / "absent.pt")
    assert set(before) <= set(copied.rglob("*"))
    (copied / MANIFEST).write_bytes(good)
    Pipeline.load(copied).close()


@pytest.mark.parametrize("how", ["one byte", "cut off", "empty"])
def test_a_damaged_bundle_is_built_again_and_cleaned(copied: Path, recipe: Recipe, how: str) -> None:
    stale = copied / "plans" / "step-stale-0123456789ab"
    stale.mkdir()
    (copied / STAGING).mkdir()
    (copied / STAGING / WRITTEN).write_text(f"plans/{stale.name}\n")  # of a build that was killed
    if how == "one byte":
        damage(copied)
    else:
        (copied / MANIFEST).write_bytes((copied / MANIFEST).read_bytes()[: 90 if how == "cut off" else 0])
    compile_bundle(recipe, "cpu", out=copied)
    Pipeline.load(copied).close()
    assert not stale.exists()


def test_interrupted_build_leaves_no_bundle(recipe: Recipe, tmp_path: Path) -> None:
    def interrupt(stage: str, _share: float) -> None:
        if stage == "verify":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compile_bundle(recipe, "cpu", out=tmp_path / "bundle", progress=interrupt)
    with pytest.raises(BundleError, match="no bundle at"):
        Bundle.open(tmp_path / "bundle")


def test_rebuild_of_another_model_drops_what_the_manifest_no_longer_names(
    copied: Path, recipe: Recipe, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    from elit_export.checkpoints.native import save_checkpoint
    from tests.helpers import tiny_model

    old = {path.name for path in (copied / "plans").iterdir()}
    save_checkpoint(tmp_path / "other.safetensors", tiny_model(core_depth=1))
    bundle = compile_bundle(recipe, "cpu", out=copied, checkpoint=tmp_path / "other.safetensors")
    present = {path.name for kind in ("graphs", "plans", "reference") for path in (copied / kind).iterdir()}
    assert present == {artifact.name for artifact in bundle.manifest.artifacts()}
    steps = {name for name in old if name.startswith("step")}  # those of the cache happen to be the same
    assert steps
    assert present.isdisjoint(steps)


def test_targets_of_one_checkpoint_share_a_bundle(copied: Path, tiny_checkpoint: Path) -> None:
    values = recipe_values(tiny_checkpoint)
    values["targets"] = {"other": {"backend": "onnxruntime", "device": "cpu", "precision": "fp32"}}
    bundle = compile_bundle(recipe_from_values(values, "test"), "other", out=copied)
    assert [plan_set.target for plan_set in bundle.manifest.plan_sets] == ["cpu", "other"]
    with pytest.raises(InputError, match="several plan sets fit"):
        Pipeline.load(copied)
    Pipeline.load(copied, target="other").close()


def test_missing_checkpoint_leaves_nothing_but_the_lock(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        compile_bundle(recipe, "cpu", out=tmp_path / "bundle", checkpoint=tmp_path / "absent.pt")
    assert {path.name for path in (tmp_path / "bundle").iterdir()} <= {LOCK}


def test_folder_that_cannot_be_written_is_named(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BundleError, match="cannot write into"):
        compile_bundle(recipe, "cpu", out=tmp_path / "file")


# ---------------------------------------------------------------- what a build records


def test_every_profile_was_compared_at_its_corners(golden_g4_bundle: Bundle, golden_g4_model: ElitSiT) -> None:
    (plan_set,) = golden_g4_bundle.manifest.plan_sets
    assert [facts.name for facts in plan_set.profiles] == ["full", "half", "quarter", "sixteenth"]
    for facts in plan_set.profiles:
        cases = [(case.kept, case.rows, case.text) for case in plan_set.reference.cases if case.profile == facts.name]
        assert cases == list(dict.fromkeys(corners(facts.profile)))
        assert facts.parity.status == "passed"
        assert facts.parity.sqnr_db is not None
        assert facts.parity.sqnr_db > 120
    assert golden_g4_bundle.manifest.model.spec == golden_g4_model.spec


def test_profiles_of_onnxruntime_share_one_plan(tiny_bundle: Bundle) -> None:
    (plan_set,) = tiny_bundle.manifest.plan_sets
    assert len(plan_set.profiles) > 1
    assert len({facts.plan.artifact.name for facts in plan_set.profiles}) == 1


def test_a_folder_of_other_things_is_refused_and_left_alone(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "reference").mkdir()
    (tmp_path / "reference" / "book").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(BundleError, match=r"is not a bundle and holds other things \(notes.txt\)"):
        compile_bundle(recipe, "cpu", out=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"reference", "notes.txt"}


@pytest.mark.parametrize(
    ("manifest", "beside"),
    [
        pytest.param('{"name": "shop", "icons": [], "start_url": "/"}', ["icons"], id="web app"),
        pytest.param('{"name": "shop", "icons": []}', ["plans"], id="web app beside a folder like ours"),
        pytest.param('{"schema_version": 1, "model": "other"}', [], id="other schema"),
        pytest.param('{"schema_version": 1', ["notes"], id="damaged, with other things"),
        pytest.param("name = shop", [], id="no JSON, alone"),
    ],
)
def test_another_programs_manifest_is_not_written_over(
    recipe: Recipe, tmp_path: Path, manifest: str, beside: list[str]
) -> None:
    (tmp_path / MANIFEST).write_text(manifest)
    for name in beside:
        (tmp_path / name).mkdir()
    with pytest.raises(BundleError, match=r"is not a bundle and holds other things \((manifest\.json|icons|notes)\)"):
        compile_bundle(recipe, "cpu", out=tmp_path)
    assert (tmp_path / MANIFEST).read_text() == manifest
    assert {path.name for path in tmp_path.iterdir()} == {MANIFEST, *beside}


def test_notes_of_a_person_in_a_bundle_do_not_stop_a_build(copied: Path, recipe: Recipe) -> None:
    (copied / "README.md").write_text("mine")
    damage(copied)
    compile_bundle(recipe, "cpu", out=copied)
    assert (copied / "README.md").read_text() == "mine"


def test_only_artifacts_are_ever_deleted(copied: Path) -> None:
    (copied / "reference" / "my notes").mkdir()
    (copied / "plans" / ".DS_Store").write_text("")
    with writing(copied):
        pass
    assert (copied / "reference" / "my notes").is_dir()
    assert (copied / "plans" / ".DS_Store").is_file()
    Pipeline.load(copied).close()


def test_a_newer_bundle_is_not_built_over(copied: Path, recipe: Recipe) -> None:
    rewrite_manifest(copied, schema_version=99)
    before = sorted(copied.rglob("*"))
    with pytest.raises(BundleError, match="schema 99 is newer"):
        compile_bundle(recipe, "cpu", out=copied)
    assert sorted(copied.rglob("*")) == before


def test_an_interrupted_first_build_leaves_no_artifacts(recipe: Recipe, tmp_path: Path) -> None:
    def interrupt(stage: str, _share: float) -> None:
        if stage == "PyTorch reference":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compile_bundle(recipe, "cpu", out=tmp_path / "bundle", progress=interrupt)
    assert [path for path in (tmp_path / "bundle").rglob("*") if path.is_file()] == [tmp_path / "bundle" / LOCK]

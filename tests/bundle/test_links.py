"""What a bundle opens beyond its own files, and what it deletes: links, files without a hash, folders of others."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from elit_export import Pipeline, compile_bundle
from elit_export.bundle import reading
from elit_export.bundle.reading import MANIFEST, OWN_HASH, Bundle, manifest_text
from elit_export.bundle.recipe import Recipe, recipe_from_values
from elit_export.bundle.store import LOCK, STAGING, WRITTEN, writing
from elit_export.cli import main
from elit_export.compiler.build import NOTHING_CHANGED
from elit_export.errors import BundleError
from tests.conftest import recipe_values


@pytest.fixture
def copied(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle.folder, tmp_path / "copied"))


@pytest.fixture
def recipe(tiny_checkpoint: Path) -> Recipe:
    return recipe_from_values(recipe_values(tiny_checkpoint), "test")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def sampled(folder: Path) -> np.ndarray:
    with Pipeline.load(folder) as pipeline:
        return pipeline.sample([0, 1], steps=1).latents


# ---------------------------------------------------------------- linked folders


def artifact_of(folder: Path) -> str:
    return f"plans/{Bundle.open(folder).manifest.plan_sets[0].plans[0].artifact.name}"


@pytest.mark.parametrize("place", ["plans", "graphs", "reference", "an artifact", STAGING])
def test_linked_folders_are_refused_at_opening_and_at_building(copied: Path, recipe: Recipe, place: str) -> None:
    """Another's files lie where they lead, with a name like an artifact's."""
    name = artifact_of(copied) if place == "an artifact" else place
    disk = copied.parent / "disk"
    disk.mkdir() if place == STAGING else shutil.move(copied / name, disk)
    (disk / "photos-0123456789ab").mkdir()
    (disk / "photos-0123456789ab" / "holiday.jpg").write_text("x")
    (disk / WRITTEN).write_text("plans/photos-0123456789ab\n")
    (copied / name).symlink_to(disk)
    before = contents(disk)
    refusal = rf"{name}: a linked folder; .*copy the folder itself to that place, or move the whole bundle"
    with pytest.raises(BundleError, match=refusal):
        Pipeline.load(copied)
    with pytest.raises(BundleError, match=refusal):
        compile_bundle(recipe, "cpu", out=copied)
    with pytest.raises(BundleError, match=refusal), writing(copied):
        pass
    assert contents(disk) == before
    assert (copied / name).is_symlink()


def test_a_folder_that_becomes_a_link_while_it_is_open_is_neither_followed_nor_emptied(copied: Path) -> None:
    bundle = Bundle.open(copied)
    disk = copied.parent / "disk"
    with writing(copied) as store:
        store._note(["plans/photos-0123456789ab"])
        shutil.move(copied / "plans", disk)
        (disk / "photos-0123456789ab").mkdir()
        (copied / "plans").symlink_to(disk)
    assert (disk / "photos-0123456789ab").is_dir()
    with pytest.raises(BundleError, match="a linked folder"):
        bundle.verified(bundle.manifest.plan_sets[0].plans[0].artifact)


def test_a_bundle_that_is_itself_a_link_opens_and_is_built_into(copied: Path, recipe: Recipe) -> None:
    """The remedy: the whole bundle on the other disk, and a link to that."""
    link = copied.parent / "link"
    link.symlink_to(copied)
    expected = sampled(copied)
    np.testing.assert_array_equal(sampled(link), expected)
    stages: list[str] = []
    compile_bundle(recipe, "cpu", out=link, progress=lambda stage, _: stages.append(stage))
    assert stages == [NOTHING_CHANGED]
    assert link.is_symlink()


def test_a_lock_that_is_a_link_is_refused_and_what_it_leads_to_is_not_emptied(copied: Path) -> None:
    (copied / LOCK).unlink(missing_ok=True)
    (copied.parent / "letter").write_text("dear")
    (copied / LOCK).symlink_to(copied.parent / "letter")
    with pytest.raises(BundleError, match=r"a link; remove it \(rm\) and build again"), writing(copied):
        pass
    assert (copied.parent / "letter").read_text() == "dear"


def test_a_list_of_artifacts_that_is_a_link_is_refused_and_nothing_is_added_to_what_it_leads_to(copied: Path) -> None:
    (copied.parent / "letter").write_text("dear")
    (copied / STAGING).mkdir()
    (copied / STAGING / WRITTEN).symlink_to(copied.parent / "letter")
    with pytest.raises(BundleError, match=r"written: a link; remove it \(rm\) and build again"), writing(copied):
        pass
    (copied / STAGING / WRITTEN).unlink()
    with writing(copied) as store:
        (copied / STAGING / WRITTEN).symlink_to(copied.parent / "letter")
        with pytest.raises(OSError, match=f"{STAGING}/{WRITTEN}"):
            store.commit(Bundle.open(copied).manifest)
    assert (copied.parent / "letter").read_text() == "dear"


# ---------------------------------------------------------------- linked files: a content store


@pytest.fixture
def snapshot(copied: Path) -> Path:
    """As `huggingface_hub.snapshot_download` lays out a repository: every file is a link to ../…/blobs/HASH."""
    cache = copied.parent / "models--me--fashion"
    folder, blobs = cache / "snapshots" / "0123456789abcdef", cache / "blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(path for path in sorted(copied.rglob("*")) if path.is_file() and path.name != LOCK):
        link = folder / path.relative_to(copied)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = blobs / f"{number:040x}"
        shutil.copy(path, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return folder


def test_a_snapshot_of_a_content_store_opens(snapshot: Path, copied: Path) -> None:
    assert (snapshot / MANIFEST).is_symlink()
    np.testing.assert_array_equal(sampled(snapshot), sampled(copied))
    assert CliRunner().invoke(main, ["verify", str(snapshot)]).exit_code == 0


def test_writing_into_a_snapshot_changes_and_deletes_no_blob(
    snapshot: Path, tiny_checkpoint: Path, tiny_bundle: Bundle
) -> None:
    """A build with other rows supersedes plans and reference, whose files are links; so is the manifest."""
    blobs = snapshot.parent.parent / "blobs"
    before = contents(blobs)
    values = recipe_values(tiny_checkpoint) | {"rows": {"min": 1, "opt": 1, "max": 3}}
    compile_bundle(recipe_from_values(values, "test"), "cpu", out=snapshot)
    assert contents(blobs) == before
    assert not (snapshot / MANIFEST).is_symlink()
    assert Bundle.open(snapshot).manifest != tiny_bundle.manifest
    assert not any(path.is_symlink() and not path.exists() for path in snapshot.rglob("*"))
    assert sampled(snapshot).shape == (2, 1, 8, 8)


def test_a_link_to_a_file_of_another_content_is_refused(snapshot: Path, copied: Path) -> None:
    plan = next(snapshot.glob("plans/step*/*.onnx"))
    content = bytearray(plan.read_bytes())
    content[100] ^= 1
    plan.unlink()
    (snapshot.parent / "other").write_bytes(content)
    plan.symlink_to(snapshot.parent / "other")
    with pytest.raises(BundleError, match=r"altered since the build \(sha256\); copy the bundle again or build it"):
        Pipeline.load(snapshot)


@pytest.mark.parametrize("target", ["absent", "folder", "pipe", "/dev/zero"])
def test_a_link_to_no_regular_file_is_refused(snapshot: Path, target: str) -> None:
    (snapshot / "folder").mkdir()
    os.mkfifo(snapshot / "pipe")
    plan = next(snapshot.glob("plans/step*/*.onnx"))
    plan.unlink()
    plan.symlink_to(target if target.startswith("/") else snapshot / target)
    with pytest.raises(BundleError, match="copy the bundle again"):
        Pipeline.load(snapshot)


# ---------------------------------------------------------------- files without a hash


def plans_of(values: Any) -> list[Any]:
    return [profile["plan"] for profile in values["plan_sets"][0]["profiles"]]


@pytest.mark.parametrize(
    ("records", "file"),
    [
        (plans_of, "step.onnx"),
        (lambda values: [values["plan_sets"][0]["cache"]["probe"]], "probe.onnx"),
        (lambda values: [values["graphs"]["step-fp32"]], "step.onnx"),
        (lambda values: [values["plan_sets"][0]["reference"]], "reference.npz"),
    ],
    ids=["plan", "cache", "graph", "reference"],
)
def test_a_file_without_a_hash_is_refused_when_the_manifest_is_read(
    copied: Path, records: Callable[[Any], list[Any]], file: str
) -> None:
    """`forge`: the manifest's own hash is right, as anyone can recompute it; the file is there too."""
    values = json.loads((copied / MANIFEST).read_text())
    del values[OWN_HASH]
    for record in records(values):
        files = record["artifact"]["files"]
        if "file" in record:
            record["file"] = "other.onnx"
            folder = copied / record["artifact"]["kind"] / record["artifact"]["name"]
            shutil.copy(folder / file, folder / "other.onnx")
        else:
            files["other.npz"] = files.pop(file)
    (copied / MANIFEST).write_text(manifest_text(values))
    with pytest.raises(BundleError, match=r"is not among the files of .* whose hashes are kept.*build it again"):
        Bundle.open(copied)


def test_a_plan_altered_in_place_with_size_and_time_restored_is_refused(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once verified, hashes are remembered; inode and ctime tell what size and mtime do not."""
    monkeypatch.setattr(reading, "SETTLED_NS", 0)  # remember what was written just now, too
    Pipeline.load(copied).close()
    remembered = reading._remembered_sha256.cache_info().hits
    Pipeline.load(copied).close()
    assert reading._remembered_sha256.cache_info().hits > remembered
    plan = next(copied.glob("plans/step*/*.onnx"))
    before = plan.stat()
    with plan.open("r+b") as file:
        file.seek(100)
        (byte,) = file.read(1)
        file.seek(100)
        file.write(bytes([byte ^ 1]))
    while plan.stat().st_ctime_ns == before.st_ctime_ns:  # the clock of a file system ticks slowly
        os.utime(plan)
    os.utime(plan, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = plan.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)
    with pytest.raises(BundleError, match="altered since the build"):
        Pipeline.load(copied)


def test_what_was_written_just_now_is_not_remembered(copied: Path) -> None:
    """Within one tick of the file system's clock a file may change twice."""
    plan = next(copied.glob("plans/step*/*.onnx"))
    os.utime(plan)  # ctime is now
    remembered = reading._remembered_sha256.cache_info()
    reading._sha256_of(plan, plan.stat())
    assert reading._remembered_sha256.cache_info() == remembered


# ---------------------------------------------------------------- what is deleted


def test_only_what_this_bundle_wrote_is_deleted(copied: Path, recipe: Recipe) -> None:
    """A name like an artifact's does not make a folder ours, nor one like a temporary manifest's a file."""
    kept = ["plans/photos-0123456789ab/holiday.jpg", "graphs/mine-0123456789ab/notes.txt", ".manifest.mine.json"]
    for name in kept:
        (copied / name).parent.mkdir(exist_ok=True)
        (copied / name).write_text("x")
    compile_bundle(recipe, "cpu", out=copied)
    with writing(copied) as store:
        store.commit(Bundle.open(copied).manifest)
    assert [name for name in kept if not (copied / name).exists()] == []


def test_what_a_killed_build_wrote_goes_with_the_next(copied: Path) -> None:
    """It had moved an artifact to its place, and noted that before; half a line says nothing."""
    for name in ("plans/step-new-0123456789ab", "plans/half-0123456789ab", STAGING):
        (copied / name).mkdir()
    (copied / STAGING / WRITTEN).write_text(f"plans/step-new-0123456789ab\n../x-0123456789ab\n{artifact_of(copied)}\n")
    with (copied / STAGING / WRITTEN).open("a") as file:
        file.write("plans/half-0123456789ab")
    with writing(copied):
        pass
    assert not (copied / "plans" / "step-new-0123456789ab").exists()
    assert (copied / "plans" / "half-0123456789ab").is_dir()
    assert not (copied / STAGING).exists()
    sampled(copied)


@pytest.mark.parametrize("is_damaged", [False, True])
def test_superseded_artifacts_go_also_those_of_a_damaged_manifest(
    copied: Path, tiny_checkpoint: Path, is_damaged: bool
) -> None:
    old = {path.name for path in (copied / "reference").iterdir()}
    if is_damaged:
        text = (copied / MANIFEST).read_text()
        (copied / MANIFEST).write_text(text.replace('"low": -1.0', '"low": -9.0'))
    values = recipe_values(tiny_checkpoint) | {"rows": {"min": 1, "opt": 1, "max": 3}}
    compile_bundle(recipe_from_values(values, "test"), "cpu", out=copied)
    assert old.isdisjoint(path.name for path in (copied / "reference").iterdir())

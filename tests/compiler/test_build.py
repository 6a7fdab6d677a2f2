"""What a build does again and what it leaves alone. The shipped bundle's other promises are in test_bundle."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from elit_export import Pipeline, compile_bundle
from elit_export.backends import BACKENDS
from elit_export.bundle import keys
from elit_export.bundle.reading import MANIFEST, Bundle
from elit_export.bundle.recipe import Recipe, recipe_from_values
from elit_export.bundle.recording import record, record_presets
from elit_export.checkpoints.native import save_checkpoint
from elit_export.compiler.build import NOTHING_CHANGED
from elit_export.spec import CACHE_GRAPHS, STEP
from tests.conftest import recipe_values
from tests.helpers import a_solver, calibrate, fit_of, preset_of, tiny_model

READ, ANSWER, VERIFY = "read checkpoint", "PyTorch reference", "verify"
EXPORT = [f"export graph {graph}" for graph in (STEP, *CACHE_GRAPHS)]
BUILD = ["build step, full, half, quarter", *(f"build {graph}" for graph in CACHE_GRAPHS)]


@pytest.fixture
def copied(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle.folder, tmp_path / "copied"))


def build_again(folder: Path, checkpoint: Path, **changes: Any) -> list[str]:
    """The stages of a second build with a changed recipe, each once."""
    stages: list[str] = []
    recipe = recipe_from_values(recipe_values(checkpoint) | changes, "test")
    compile_bundle(recipe, "cpu", out=folder, progress=lambda stage, _: stages.append(stage))
    Pipeline.load(folder).close()
    return [stage for stage in dict.fromkeys(stages) if not stage.startswith("verified")]


def test_nothing_changed_does_nothing(copied: Path, tiny_checkpoint: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*") if path.is_file()}
    assert build_again(copied, tiny_checkpoint) == [NOTHING_CHANGED]
    after = {path: path.stat().st_mtime_ns for path in copied.rglob("*") if path.is_file()}
    assert {path: time for path, time in after.items() if path.name != ".build.lock"} == {
        path: time for path, time in before.items() if path.name != ".build.lock"
    }


def reads_of_a_build_that_does_nothing(folder: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> Counter[Path]:
    """How often it reads each file whole, when it is the first build of its process."""
    read_source, open_file, reads, heard = Path.read_bytes, os.open, Counter[Path](), []

    def counted(path: Path) -> bytes:
        reads[path] += 1
        return read_source(path)

    def counted_at_the_door(path: Any, flags: int, *mode: Any, **at: Any) -> int:
        reads[Path(path)] += 1
        return open_file(path, flags, *mode, **at)

    keys.code.cache_clear()
    keys._source_sha256.cache_clear()
    monkeypatch.setattr(Path, "read_bytes", counted)
    monkeypatch.setattr(os, "open", counted_at_the_door)
    compile_bundle(recipe, "cpu", out=folder, progress=lambda stage, _: heard.append(stage))
    assert heard == [NOTHING_CHANGED]
    return reads


def sources_in(reads: Counter[Path]) -> dict[str, int]:
    """The package's own files, of which keys have the hash."""
    return {
        str(path.relative_to(keys.PACKAGE)): times
        for path, times in reads.items()
        if path.is_relative_to(keys.PACKAGE) and path.suffix == ".py"
    }


def test_a_build_that_does_nothing_reads_the_manifest_and_every_source_file_once(
    copied: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_from_values(recipe_values(tiny_checkpoint), "test")
    reads = reads_of_a_build_that_does_nothing(copied, recipe, monkeypatch)
    assert reads[copied / MANIFEST] == 1
    sources = sources_in(reads)
    assert {Path(name).parts[0] for name in sources} >= {"backends", "compiler", "graphs", "models", "spec", "verify"}
    assert set(sources.values()) == {1}
    assert keys._source_sha256.cache_info().misses == len(sources)


def test_a_changed_target_builds_only_the_plan(copied: Path, tiny_checkpoint: Path) -> None:
    values = recipe_values(tiny_checkpoint)
    targets = {"cpu": {**values["targets"]["cpu"], "threads": 1}}  # type: ignore[index]
    assert build_again(copied, tiny_checkpoint, targets=targets) == [*BUILD, VERIFY]
    assert Bundle.open(copied).manifest.plan_sets[0].options == {"threads": 1}


def test_changed_rows_ask_pytorch_again_but_do_not_export(copied: Path, tiny_checkpoint: Path) -> None:
    assert build_again(copied, tiny_checkpoint, rows={"min": 1, "opt": 2, "max": 4}) == [READ, ANSWER, *BUILD, VERIFY]


def test_a_changed_checkpoint_makes_everything_again(copied: Path, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "other.safetensors", tiny_model(core_depth=1))
    stages = build_again(copied, tmp_path / "other.safetensors")
    assert stages == [READ, ANSWER, *EXPORT, *BUILD, VERIFY]  # also of the cache: graphs name their checkpoint


def test_a_newer_library_builds_the_plan_again(
    copied: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builder = type(BACKENDS["onnxruntime"].builder())
    monkeypatch.setattr(builder, "fingerprint", lambda _builder, _target: {"onnxruntime": "99"})
    assert build_again(copied, tiny_checkpoint) == [*BUILD, VERIFY]


@pytest.mark.parametrize(
    ("room", "stages"),
    [
        ("graphs", [READ, *EXPORT]),
        ("backends/onnxruntime", [*BUILD, VERIFY]),
        ("verify", [READ, ANSWER, VERIFY]),
    ],
)
def test_changed_code_makes_again_what_depends_on_it(
    copied: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, room: str, stages: list[str]
) -> None:
    """The graph comes out the same, so nothing behind it is made again."""
    real = keys.code
    monkeypatch.setattr(keys, "code", lambda *places: real(*places) + ("changed" if room in places else ""))
    assert build_again(copied, tiny_checkpoint) == stages


def test_what_was_measured_stays_as_long_as_its_checkpoint(copied: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    bundle = calibrate(copied, fit_of(None))
    checkpoint = bundle.manifest.model.checkpoint_sha256
    solvers = {"solvers": (a_solver(checkpoint_sha256=checkpoint),)}
    record(bundle, checkpoint, lambda manifest: manifest.model_copy(update=solvers), remedy="")
    measured = recorded_in(record_presets(bundle, [preset_of(bundle)]))
    assert all(measured)
    assert build_again(copied, tiny_checkpoint) == [NOTHING_CHANGED]
    assert recorded_in(Bundle.open(copied)) == measured
    build_again(copied, tiny_checkpoint, rows={"min": 1, "opt": 2, "max": 4})
    assert recorded_in(Bundle.open(copied)) == measured
    save_checkpoint(tmp_path / "other.safetensors", tiny_model(core_depth=1))
    compile_bundle(recipe_from_values(recipe_values(tmp_path / "other.safetensors"), "test"), "cpu", out=copied)
    assert recorded_in(Bundle.open(copied)) == (None, (), ())


def recorded_in(bundle: Bundle) -> tuple[object, object, object]:
    """What commands measured and wrote into the manifest."""
    return bundle.manifest.cache_calibration, bundle.manifest.solvers, bundle.manifest.presets


@pytest.mark.parametrize("kind", ["graphs", "plans", "reference"])
def test_what_is_gone_from_disk_is_made_again(copied: Path, tiny_checkpoint: Path, kind: str) -> None:
    shutil.rmtree(copied / kind)
    assert build_again(copied, tiny_checkpoint)[0] in (READ, BUILD[0])
    assert build_again(copied, tiny_checkpoint) == [NOTHING_CHANGED]


def test_a_damaged_manifest_is_built_over(copied: Path, tiny_checkpoint: Path) -> None:
    (copied / MANIFEST).write_text("{")
    assert build_again(copied, tiny_checkpoint) == [READ, ANSWER, *EXPORT, *BUILD, VERIFY]

"""What is left on disk when a process is killed, the disk is full or a folder is read-only.

The work runs in forked children, which need not import anything again. They die of what they were seen to have
done, not of the clock: in their own code before a file gets its name, or from outside in the middle of something.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import count, islice, pairwise
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from elit_export import Pipeline, compile_bundle
from elit_export.bundle import atomic as files
from elit_export.bundle import store as bundle
from elit_export.bundle.artifacts import KINDS
from elit_export.bundle.atomic import atomic_write
from elit_export.bundle.manifest import Manifest
from elit_export.bundle.reading import MANIFEST, Bundle
from elit_export.bundle.recipe import Recipe, recipe_from_values
from elit_export.bundle.store import LOCK, STAGING, Progress, Store
from elit_export.calibrate.step_cache import ProbingEngine
from elit_export.callbacks import noop
from elit_export.checkpoints.native import save_checkpoint
from elit_export.cli import main
from elit_export.errors import BundleError
from elit_export.graphs import export, formats
from elit_export.models.sit import ElitSiT
from elit_export.spec import PIXELS, ModelSpec, Precision
from elit_export.training.data import LabelledImages, load_images
from elit_export.training.trainer import TrainConfig, Trainer
from tests.conftest import recipe_values, unremembered_export
from tests.helpers import tiny_model, tiny_spec

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks processes that use threads"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]

FASHION = Path(__file__).parent / "data" / "fashion"
NOBODY = 65534
PATIENCE_S = 120  # of a child: one that gets nowhere ends itself, which fails its test
TINY_TRAINING = [
    *("--size", "32", "--patch", "8", "--group", "2", "--width", "16", "--heads", "2"),
    *("--split", "1-2-1", "--batch-size", "8", "--warmup-steps", "2", "--steps", "4"),
]


@pytest.fixture
def copied(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle.folder, tmp_path / "copied"))


@dataclass(frozen=True)
class Built:
    """A checkpoint, its bundle, and what that samples."""

    checkpoint: Path
    bundle: Bundle
    latents: np.ndarray

    @property
    def spec(self) -> ModelSpec:
        return self.bundle.manifest.model.spec

    def recipe(self, most_rows: int) -> Recipe:
        """Other rows make other plan sets, so that every build has something to write."""
        return recipe_from_values(
            recipe_values(self.checkpoint) | {"rows": {"min": 1, "opt": 2, "max": most_rows}}, "test"
        )


@pytest.fixture(scope="module")
def tiny(tiny_bundle: Bundle, tiny_checkpoint: Path) -> Built:
    return Built(tiny_checkpoint, tiny_bundle, sampled(tiny_bundle.folder))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Another model, so that its samples tell which of two bundles lies in a folder."""
    folder = tmp_path_factory.mktemp("other")
    save_checkpoint(folder / "other.safetensors", tiny_model(core_depth=1))
    recipe = recipe_from_values(recipe_values(folder / "other.safetensors"), "test")
    built = compile_bundle(recipe, "cpu", out=folder / "bundle")
    return Built(folder / "other.safetensors", built, sampled(built.folder))


@pytest.fixture
def ready_graphs(tiny: Built, other: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    """The export, which takes seconds in memory, gives way to a copy of what it writes."""

    def copy(model: ElitSiT, name: str, folder: Path, precision: Precision) -> Path:
        ready = tiny.bundle if model.spec == tiny.spec else other.bundle
        graph = ready.manifest.graphs[f"{name}-{precision.value}"]
        for path in ready.verified(graph.artifact).iterdir():
            shutil.copy(path, folder)
        return folder / graph.file

    monkeypatch.setattr(formats, "export_graph", copy)


# ---------------------------------------------------------------- children


def forked(work: Callable[[], object]) -> int:
    """A child that works, then waits to be killed; an exception ends it, and so does waiting too long."""
    child = os.fork()
    if child:
        return child
    try:
        signal.alarm(PATIENCE_S)
        work()
        signal.pause()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(1)


def kill_when(happened: Callable[[], bool], work: Callable[[], object]) -> None:
    """SIGKILL the work once something is seen to have happened, in the middle of what comes next."""
    child = forked(work)
    wait_until(happened, child)
    kill(child)


def wait_until(happened: Callable[[], bool], child: int) -> None:
    while not happened():
        ended, status = os.waitpid(child, os.WNOHANG)
        assert not ended, f"the work ended by itself before it was to be killed (wait status {status})"
        time.sleep(0.0005)


def kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    assert died_of_kill(child), "the work failed before it was killed"


def died_of_kill(child: int) -> bool:
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def die(*_: object) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def wait_to_be_killed(*_: object) -> NoReturn:
    while True:
        signal.pause()


def die_at_flush(number: int, of: str = "") -> None:
    """In a child: die when it has flushed a file, this many others before it, that does not have its name yet."""
    real, flushes = files.fsync, count()

    def flush(path: Path) -> None:
        real(path)
        if path.name.startswith(of) and next(flushes) == number:
            die()

    files.fsync = flush  # type: ignore[assignment]
    bundle.fsync = flush  # type: ignore[attr-defined]


class Watch:
    """Counts how often a folder is seen from outside to have changed, and notes whether a build had staged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.changes = 0
        self.has_staged = False
        self._last = set(entries(folder))

    def __call__(self) -> int:
        found = set(entries(self.folder))
        self.changes += found != self._last
        self._last = found
        self.has_staged |= any(STAGING in Path(path).parts for path, _ in found)
        return self.changes


def entries(folder: str | Path) -> Iterator[tuple[str, int]]:
    """Everything in a folder with its inode; what vanishes meanwhile is left out."""
    with suppress(FileNotFoundError), os.scandir(folder) as found:
        for entry in found:
            yield entry.path, entry.inode()
            if entry.is_dir(follow_symlinks=False):
                yield from entries(entry.path)


def is_seen(folder: Path, name: str) -> bool:
    return any(Path(path).name.startswith(name) for path, _ in entries(folder))


def command_in_child(*arguments: str | Path, before: Callable[[], object]) -> tuple[int, str]:
    """Exit status and output of a command that runs in a child after `before`."""
    reader, writer = os.pipe()

    def work() -> None:
        before()
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        escaped = "" if isinstance(result.exception, SystemExit | None) else repr(result.exception)
        os.write(writer, json.dumps([result.exit_code, " ".join(result.output.split()) + escaped]).encode())
        die()

    child = forked(work)
    os.close(writer)
    with open(reader, "rb") as pipe:  # noqa: PTH123 - a descriptor, not a path
        content = pipe.read()
    assert died_of_kill(child), "the command brought its process down"
    status, output = json.loads(content)
    return status, output


# ---------------------------------------------------------------- what must hold


def sampled(folder: Path) -> np.ndarray:
    with Pipeline.load(folder) as pipeline:
        return pipeline.sample([0, 1], steps=1).latents


def only_named(folder: Path) -> bool:
    """Does the bundle hold its manifest, what that names, the lock and nothing else?"""
    named = {MANIFEST} | {
        f"{artifact.kind}/{artifact.name}/{name}"
        for artifact in Bundle.open(folder).manifest.artifacts()
        for name in artifact.files
    }
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {path.name for path in folder.iterdir() if path.is_dir()} == set(KINDS)
    return found - {LOCK} == named


def require_only(built: Built, folder: Path) -> None:
    """The folder holds this model's bundle and nothing that it does not name."""
    np.testing.assert_array_equal(sampled(folder), built.latents)
    assert only_named(folder)


def require_no_bundle(folder: Path) -> None:
    with pytest.raises(BundleError, match="no bundle at"):
        Bundle.open(folder)


def require_one_of(choices: Sequence[Built], folder: Path) -> None:
    spec = Bundle.open(folder).manifest.model.spec
    (built,) = [choice for choice in choices if choice.spec == spec]
    np.testing.assert_array_equal(sampled(folder), built.latents)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---------------------------------------------------------------- killed builds

Build = Callable[..., object]  # (folder, progress) → never returns


def builds_without_end(first: Built, second: Built, folder: Path, progress: Progress = noop) -> None:
    """The two in turn, neither equal to a bundle of more than 8 rows."""
    for number in count():
        recipe = (first, second)[number % 2].recipe(3 + number % 5)
        compile_bundle(recipe, "cpu", out=folder, progress=progress)


def kill_before_the_commit(stage: str, folder: Path, build: Build) -> None:
    """In the middle of a stage, or after it: the manifest stays as it was."""
    reached = folder.with_name(f"{folder.name} reached {stage}")
    watch = Watch(folder)

    def note(found: str, _share: float) -> None:
        if found == stage:
            reached.touch()

    def work() -> None:
        Store.commit = wait_to_be_killed  # type: ignore[assignment,method-assign]
        build(folder, progress=note)

    kill_when(lambda: watch() > 0 and watch.has_staged and reached.exists(), work)
    reached.unlink()


def kill_at_change(number: int, folder: Path, build: Build) -> None:
    """Anywhere in a build, or in the next."""
    watch = Watch(folder)
    kill_when(lambda: watch() >= number and watch.has_staged, lambda: build(folder))


def kill_after_the_commit(number: int, folder: Path, build: Build) -> None:
    """At a later change: while the build cleans up, or in the next."""
    before = manifest_of(folder)
    watch = Watch(folder)
    kill_when(lambda: manifest_of(folder) != before and watch() >= number, lambda: build(folder))


def manifest_of(folder: Path) -> bytes:
    return (folder / MANIFEST).read_bytes() if (folder / MANIFEST).exists() else b""


BEFORE = [
    partial(kill_before_the_commit, stage)
    for stage in ("export graph step", "build reuse", "PyTorch reference", "verify")
]
AFTER = [partial(kill_after_the_commit, number) for number in (1, 2, 3, 4)]


@pytest.mark.usefixtures("ready_graphs")
def test_killed_rebuilds_leave_the_old_bundle_or_the_new_and_the_next_build_cleans_up(
    copied: Path, tiny: Built, other: Built
) -> None:
    """12 kills; the children build without end, so each kill falls into a build."""
    anywhere = [partial(kill_at_change, number) for number in (4, 10, 16, 22)]
    is_new = []
    for number, killed in enumerate((*BEFORE, *anywhere, *AFTER)):
        before = manifest_of(copied)
        killed(copied, partial(builds_without_end, other, tiny))
        is_new.append(manifest_of(copied) != before)
        require_one_of((other, tiny) if is_new[-1] else (tiny,), copied)
        compile_bundle(tiny.recipe(9 + number), "cpu", out=copied)
        require_only(tiny, copied)
    assert is_new[:4] == [False] * 4
    assert is_new[-4:] == [True] * 4


@pytest.mark.usefixtures("ready_graphs")
def test_killed_first_builds_leave_no_bundle_or_all_of_it(tiny: Built, other: Built, tmp_path: Path) -> None:
    """8 kills."""
    anywhere = [partial(kill_at_change, number) for number in (6, 18)]
    is_whole = []
    for number, killed in enumerate((*BEFORE, *anywhere, *AFTER[:2])):
        folder = tmp_path / str(number)
        killed(folder, partial(builds_without_end, other, tiny))
        is_whole.append((folder / MANIFEST).exists())
        if is_whole[-1]:
            require_one_of((other, tiny), folder)
        else:
            require_no_bundle(folder)
        compile_bundle(tiny.recipe(8), "cpu", out=folder)
        require_only(tiny, folder)
    assert is_whole[:4] == [False] * 4
    assert is_whole[-2:] == [True] * 2


@pytest.mark.parametrize("seen", ["artifact", "step.onnx"])
def test_a_kill_during_the_export_leaves_no_bundle(tiny: Built, tmp_path: Path, seen: str) -> None:
    """2 kills of the real export: when it begins, and when it has written something."""
    folder = tmp_path / "new"

    def work() -> None:
        Store.commit = wait_to_be_killed  # type: ignore[assignment,method-assign]
        compile_bundle(tiny.recipe(8), "cpu", out=folder)

    kill_when(lambda: is_seen(folder, seen), work)
    require_no_bundle(folder)
    assert (folder / STAGING).is_dir()


# One of the reference, four as graphs are described, eight files of the graphs, eight of the plans, and the manifest.
FLUSHES = 22


@pytest.mark.usefixtures("ready_graphs")
@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("flush", [0, 11, 12, 13, 20, -1])
def test_a_kill_before_anything_gets_its_name(
    copied: Path, tiny: Built, other: Built, tmp_path: Path, flush: int, is_first: bool
) -> None:
    """12 kills: a kill from outside seldom falls where a finished file still has its temporary name."""
    folder = tmp_path / "new" if is_first else copied
    number = flush % FLUSHES

    def build() -> None:
        die_at_flush(number)
        compile_bundle(other.recipe(5), "cpu", out=folder)

    assert died_of_kill(forked(build))
    assert (folder / STAGING).is_dir()
    assert is_seen(folder, f".{Path(MANIFEST).stem}.") == (flush == -1)
    if is_first:
        require_no_bundle(folder)
    else:
        require_one_of([tiny], folder)
    compile_bundle(other.recipe(5), "cpu", out=folder)
    require_only(other, folder)


@pytest.mark.usefixtures("ready_graphs")
@pytest.mark.parametrize("is_first", [True, False])
def test_a_kill_right_after_the_commit_leaves_the_new_bundle(
    copied: Path, other: Built, tmp_path: Path, is_first: bool
) -> None:
    """2 kills before what the manifest no longer names is gone."""
    folder = tmp_path / "new" if is_first else copied

    def build() -> None:
        Store.clean = die  # type: ignore[assignment,method-assign]
        compile_bundle(other.recipe(5), "cpu", out=folder)

    assert died_of_kill(forked(build))
    require_one_of([other], folder)
    assert (folder / STAGING).is_dir()
    compile_bundle(other.recipe(5), "cpu", out=folder)
    require_only(other, folder)


# ---------------------------------------------------------------- killed calibration


def die_after_commit() -> None:
    """Before what the manifest no longer names is gone."""
    commit = Store.commit

    def last(store: Store, manifest: Manifest) -> NoReturn:
        commit(store, manifest)
        die()

    Store.commit = last  # type: ignore[method-assign]


CALIBRATION = ("--images", "4", "--steps", "3", "--budget", "full", "--guidance", "none")


@pytest.mark.parametrize("moment", ["before its name", "after the commit", "while it measures"])
def test_a_killed_calibration_leaves_the_old_manifest_or_the_new(copied: Path, tiny: Built, moment: str) -> None:
    """3 kills."""
    before = manifest_of(copied)
    command = ["calibrate", "cache", str(copied), *CALIBRATION]

    def calibrate() -> None:
        if moment == "before its name":
            die_at_flush(0, of=f".{Path(MANIFEST).stem}.")
        elif moment == "after the commit":
            die_after_commit()
        else:
            ProbingEngine.__call__ = die  # type: ignore[assignment,method-assign]
        CliRunner().invoke(main, command)

    assert died_of_kill(forked(calibrate))
    assert (manifest_of(copied) != before) == (moment == "after the commit")
    assert is_seen(copied, f".{Path(MANIFEST).stem}.") == (moment == "before its name")
    np.testing.assert_array_equal(sampled(copied), tiny.latents)
    assert CliRunner().invoke(main, command).exit_code == 0
    require_only(tiny, copied)
    assert Bundle.open(copied).manifest.cache_calibration


# ---------------------------------------------------------------- killed training


@pytest.fixture(scope="module")
def fashion() -> LabelledImages:
    return load_images(FASHION, split="train", size=32)


def new_trainer(data: LabelledImages) -> Trainer:
    config = TrainConfig(
        steps=150,
        batch_size=8,
        learning_rate=1e-3,
        warmup_steps=10,
        ema_decay=0.99,
        label_dropout=0.1,
        min_kept=1,
        full_share=0.25,
        seed=4,
    )
    facts: dict[str, Any] = {"input_size": 32, "patch_size": 8, "num_classes": 10}
    return Trainer(tiny_spec(**facts), PIXELS, data, config)


def resumed(data: LabelledImages, state: Path) -> Trainer:
    trainer = new_trainer(data)
    if state.exists():
        trainer.resume(state)
    return trainer


def test_killed_training_resumes_bit_for_bit(fashion: LabelledImages, tmp_path: Path) -> None:
    """14 kills of a run that saves after every step, every other one while it writes, then the run to its end."""
    state = tmp_path / "state.pt"

    def train() -> None:
        trainer = resumed(fashion, state)
        for _ in islice(trainer.run(), 10):  # so that 14 of them do not reach the end
            trainer.save(state)
        while True:
            trainer.save(state)

    reached = [0]
    for number in range(14):
        before = inode_of(state)

        def is_saved(before: int = before, number: int = number) -> bool:
            return inode_of(state) != before and (number % 2 == 0 or is_seen(tmp_path, ".state."))

        kill_when(is_saved, train)
        reached.append(resumed(fashion, state).step)
    assert all(earlier < later < 150 for earlier, later in pairwise(reached)), reached
    trainer, uninterrupted = resumed(fashion, state), new_trainer(fashion)
    assert len(list(trainer.run())) == 150 - reached[-1]
    assert len(list(uninterrupted.run())) == 150
    for mine, theirs in ((trainer.model, uninterrupted.model), (trainer.ema, uninterrupted.ema)):
        for name, expected in theirs.state_dict().items():
            assert torch.equal(mine.state_dict()[name], expected), name
    trainer.save(state)
    assert list(tmp_path.iterdir()) == [state]


def inode_of(path: Path) -> int:
    return path.stat().st_ino if path.exists() else 0


@pytest.mark.parametrize("name", ["state.pt", "model.safetensors"])
def test_what_a_killed_training_was_writing_goes_with_the_next_run(tmp_path: Path, name: str) -> None:
    """2 kills."""
    command = [str(word) for word in ("train", FASHION, "--out", tmp_path / "run", *TINY_TRAINING)]

    def train() -> None:
        die_at_flush(0, of=f".{Path(name).stem}.")
        CliRunner().invoke(main, command)

    assert died_of_kill(forked(train))
    assert is_seen(tmp_path / "run", f".{Path(name).stem}.")
    assert not (tmp_path / "run" / name).exists()
    assert CliRunner().invoke(main, command).exit_code == 0
    assert (tmp_path / "run" / name).exists()
    assert not is_seen(tmp_path / "run", ".")


# ---------------------------------------------------------------- killed sampling


def sample_without_end(folder: Path, out: Path) -> None:
    for seed in count():
        options = ("--out", str(out), "--steps", "1", "--seed", str(seed))
        result = CliRunner().invoke(main, ["sample", str(folder), *options])
        assert result.exit_code == 0, result.output


def whole_files(out: Path) -> tuple[bool, bool]:
    """Is there an .npz, is there a picture? What is there is whole."""
    arrays = out.with_suffix(".npz")
    if arrays.exists():
        with np.load(arrays) as found:
            assert found["images"].shape == (3, 1, 8, 8)
    if out.exists():
        with Image.open(out) as picture:
            picture.load()
    return arrays.exists(), out.exists()


def test_killed_sampling_leaves_whole_files_or_none(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """14 kills of a command that samples again and again into the same files, each at a later change of them."""
    out = tmp_path / "out" / "s.png"
    out.parent.mkdir()
    for number in range(1, 15):
        out.unlink(missing_ok=True)
        out.with_suffix(".npz").unlink(missing_ok=True)
        watch = Watch(out.parent)
        kill_when(lambda: watch() >= number, lambda: sample_without_end(tiny_bundle.folder, out))  # noqa: B023
        found = whole_files(out)
        # The first sampling makes at most 10 changes: it tries both places, then cleans up and writes.
        assert number < 12 or found == (True, True)


@pytest.mark.parametrize(
    ("flush", "expected"), [(0, (False, False)), (1, (True, False)), (2, (True, True)), (3, (True, True))]
)
def test_a_kill_before_a_sample_gets_its_name_leaves_what_was(
    tiny_bundle: Bundle, tmp_path: Path, flush: int, expected: tuple[bool, bool]
) -> None:
    """4 kills, two of them at the second sampling; the next one takes away what they left."""
    out = tmp_path / "s.png"

    def sample() -> None:
        die_at_flush(flush)
        sample_without_end(tiny_bundle.folder, out)

    assert died_of_kill(forked(sample))
    assert whole_files(out) == expected
    assert is_seen(tmp_path, ".s.")
    assert CliRunner().invoke(main, ["sample", str(tiny_bundle.folder), "--out", str(out)]).exit_code == 0
    assert set(contents(tmp_path)) == {"s.npz", "s.png"}


# ---------------------------------------------------------------- killed export


def test_what_a_killed_export_leaves_goes_with_the_next(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1 kill, when something was written that has no name yet; an older graph is still whole."""
    out, mine = tmp_path / "graphs", tmp_path / "graphs" / ".export-notes"
    monkeypatch.setattr(export, "export_graph", unremembered_export)
    command = ["export", str(tiny_checkpoint), "--out", str(out)]
    assert CliRunner().invoke(main, command).exit_code == 0
    mine.mkdir()
    before = contents(out)

    def half(*_: object) -> NoReturn:
        (private,) = out.glob(".export.elit-*")
        (private / "step.onnx.data").write_text("half")
        die()

    def work() -> None:
        export.graph_model = half  # type: ignore[assignment]
        CliRunner().invoke(main, command)

    assert died_of_kill(forked(work))
    assert {name: content for name, content in contents(out).items() if not name.startswith(".")} == before
    assert is_seen(out, ".export.elit-")
    assert CliRunner().invoke(main, command).exit_code == 0
    assert {path.name for path in out.iterdir()} == {"step.onnx", "step.onnx.data", ".export-notes"}


# ---------------------------------------------------------------- temporary files


def test_only_what_a_dead_process_was_writing_is_removed(tmp_path: Path) -> None:
    """1 kill."""
    path, lookalike = tmp_path / "s.npz", tmp_path / ".s.template.npz"
    lookalike.write_text("mine")

    def write() -> None:
        with atomic_write(path) as temporary:
            temporary.write_text("unfinished")  # what tells that it is held
            wait_to_be_killed()

    child = forked(write)
    wait_until(lambda: b"unfinished" in contents(tmp_path).values(), child)
    with atomic_write(path) as mine, atomic_write(path) as at_the_same_time:
        assert len(contents(tmp_path)) == 4, "a living process lost its file"
        mine.write_text("mine")
        at_the_same_time.write_text("at the same time")
    assert path.read_text() == "mine"
    kill(child)
    assert len(contents(tmp_path)) == 3
    files.write_text(path, "next")
    assert contents(tmp_path) == {".s.template.npz": b"mine", "s.npz": b"next"}


@pytest.mark.parametrize("moment", ["before it is held", "while it is being held"])
def test_a_file_that_was_taken_for_abandoned_is_made_again(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another writer comes between the making of a temporary file and its lock."""
    path, hold = tmp_path / "s.npz", files._hold
    made: list[int] = []

    def taken(descriptor: int) -> bool | None:
        made.append(descriptor)
        if len(made) > 1:
            return hold(descriptor)
        next(tmp_path.iterdir()).unlink()
        return hold(descriptor) if moment == "before it is held" else False

    monkeypatch.setattr(files, "_hold", taken)
    with atomic_write(path) as temporary:
        assert temporary.exists()
        temporary.write_text("whole")
    assert contents(tmp_path) == {"s.npz": b"whole"}
    assert len(made) == 2


# ---------------------------------------------------------------- full disk


def fill_disk(limit_bytes: int) -> None:
    """From here on no file of this process grows beyond the limit."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))


def refused_on_full_disk(limit_bytes: int, *arguments: str | Path) -> str:
    """The message of a command that ends with status 2, not with a traceback."""
    status, output = command_in_child(*arguments, before=lambda: fill_disk(limit_bytes))
    assert status == 2, output
    assert "error: " in output
    assert "Traceback" not in output
    return output


@pytest.fixture
def recipe_file(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    path = tmp_path / "r.toml"
    path.write_text(
        f'name = "test"\ncheckpoint = "{tiny_checkpoint}"\nrows = {{ min = 1, opt = 2, max = 3 }}\n'
        '[targets.cpu]\nbackend = "onnxruntime"\ndevice = "cpu"\nprecision = "fp32"\nthreads = 2\n'
    )
    return path


@pytest.mark.usefixtures("ready_graphs")
@pytest.mark.parametrize(
    ("is_first", "limit_bytes"),
    [*((True, limit) for limit in (0, 1000, 30_000, 60_000, 98_000)), *((False, limit) for limit in (0, 1000, 30_000))],
)
def test_a_build_on_a_full_disk_leaves_what_was(
    copied: Path, recipe_file: Path, tmp_path: Path, is_first: bool, limit_bytes: int
) -> None:
    folder = tmp_path / "new" if is_first else copied
    before = contents(copied)
    refused_on_full_disk(limit_bytes, "build", recipe_file, "--out", folder)
    if is_first:
        assert set(contents(folder)) <= {LOCK}
    assert contents(copied) == before
    sampled(copied)


@pytest.mark.parametrize("limit_bytes", [0, 200, 1000])
def test_sampling_on_a_full_disk_leaves_what_was(tiny_bundle: Bundle, tmp_path: Path, limit_bytes: int) -> None:
    (tmp_path / "s.npz").write_bytes(b"old")
    options = ("--out", tmp_path / "s.png", "--steps", "1")
    refused_on_full_disk(limit_bytes, "sample", tiny_bundle.folder, *options)
    assert contents(tmp_path) == {"s.npz": b"old"}


@pytest.mark.parametrize("limit_bytes", [0, 1000, 50_000])
def test_training_on_a_full_disk_keeps_the_old_state(tmp_path: Path, limit_bytes: int) -> None:
    """The first run leaves a state at its second step, the other cannot save its fourth."""
    out = tmp_path / "run"
    command = ("train", FASHION, "--out", out, *TINY_TRAINING, "--save-every", "2")
    child = forked(lambda: stop_after_save(*command))
    assert died_of_kill(child)
    before = contents(out)
    assert "state.pt" in before
    refused_on_full_disk(limit_bytes, *command)
    assert contents(out) == before
    assert CliRunner().invoke(main, [str(word) for word in command]).output.startswith("resumed at step 2")


def stop_after_save(*command: str | Path) -> None:
    real = Trainer.save

    def save(trainer: Trainer, path: Path) -> None:
        real(trainer, path)
        die()

    Trainer.save = save  # type: ignore[method-assign]
    CliRunner().invoke(main, [str(word) for word in command])


@pytest.mark.parametrize("limit_bytes", [0, 1000, 50_000])
def test_weights_on_a_full_disk_are_a_clear_error(tmp_path: Path, limit_bytes: int) -> None:
    """The state fits as it is on disk already; only the final weights are new."""
    out = tmp_path / "run"
    command = ("train", FASHION, "--out", out, *TINY_TRAINING)
    assert CliRunner().invoke(main, [str(word) for word in command]).exit_code == 0
    before = contents(out)
    refused_on_full_disk(limit_bytes, *command)
    assert contents(out) == before


# ---------------------------------------------------------------- read-only folders


@pytest.fixture
def read_only(copied: Path) -> Iterator[Path]:
    """A folder that anyone may read and nobody write, with a bundle in it."""
    folder = Path(tempfile.mkdtemp())
    shutil.copytree(copied, folder / "bundle")
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield folder
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755)
    shutil.rmtree(folder)


def drop_rights() -> None:
    """Permissions do not bind the superuser."""
    if os.geteuid() == 0:
        os.setgid(NOBODY)
        os.setuid(NOBODY)


def test_a_read_only_bundle_samples_but_is_not_built_into(read_only: Path, recipe_file: Path) -> None:
    before = contents(read_only)
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    options = ("--steps", "1", "--out", folder / "s.png")
    assert command_in_child("sample", read_only / "bundle", *options, before=drop_rights)[0] == 0
    assert set(contents(folder)) == {"s.npz", "s.png"}
    shutil.copy(recipe_file, folder / "r.toml")
    (folder / "r.toml").chmod(0o644)
    for name in ("bundle", "new"):
        out = read_only / name
        status, output = command_in_child("build", folder / "r.toml", "--out", out, before=drop_rights)
        assert (status, "cannot write into" in output) == (2, True), output
    shutil.rmtree(folder)
    assert contents(read_only) == before


@pytest.mark.parametrize("command", ["sample", "train"])
def test_commands_name_the_folder_that_cannot_be_written(read_only: Path, command: str) -> None:
    arguments: dict[str, tuple[str | Path, ...]] = {
        "sample": (read_only / "bundle", "--steps", "1", "--out", read_only / "s.png"),
        "train": (FASHION, *TINY_TRAINING, "--out", read_only / "run"),
    }
    before = contents(read_only)
    status, output = command_in_child(command, *arguments[command], before=drop_rights)
    assert (status, f"error: {read_only}" in output) == (2, True), output
    assert contents(read_only) == before

"""What is left on disk when a process is killed, the disk is full or a folder is read-only.

The work runs in forked children, which need not import anything again, and dies at seeded random moments.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from elit_export import Pipeline, bundle, compile, compile_bundle, files
from elit_export.bundle import KINDS, LOCK, MANIFEST, Bundle
from elit_export.cli import main
from elit_export.errors import BundleError
from elit_export.models.sit import ElitSiT
from elit_export.recipe import Recipe, recipe_from_values
from elit_export.spec import PIXELS, Precision
from elit_export.training.data import LabelledImages, load_images
from elit_export.training.trainer import TrainConfig, Trainer
from tests.conftest import recipe_values
from tests.helpers import tiny_spec

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks processes that use threads"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]

FASHION = Path(__file__).parent / "data" / "fashion"
NOBODY = 65534
TINY_TRAINING = [
    *("--size", "32", "--patch", "8", "--group", "2", "--width", "16", "--heads", "2"),
    *("--split", "1-2-1", "--batch-size", "8", "--warmup-steps", "2", "--steps", "4"),
]


@pytest.fixture
def copied(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle.folder, tmp_path / "copied"))


@pytest.fixture
def ready_graph(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The export, which takes seconds in memory, gives way to a copy of what it writes."""
    graph = tiny_bundle.manifest.graphs["step-fp32"]

    def copy(_model: ElitSiT, folder: Path, _precision: Precision) -> Path:
        for path in tiny_bundle.verified(graph.artifact).iterdir():
            shutil.copy(path, folder)
        return folder / graph.file

    monkeypatch.setattr(compile, "export_step", copy)


# ---------------------------------------------------------------- children


def forked(work: Callable[[], object]) -> int:
    """A child that works, then waits to be killed; an exception ends it."""
    child = os.fork()
    if child:
        return child
    try:
        work()
        signal.pause()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(1)


def kill_after(seconds: float, work: Callable[[], object]) -> None:
    """SIGKILL the work at that moment, in the middle of it or right after it."""
    child = forked(work)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    assert died_of_kill(child), "the work failed before it was killed"


def died_of_kill(child: int) -> bool:
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


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


def rows_recipe(checkpoint: Path, most: int) -> Recipe:
    return recipe_from_values(recipe_values(checkpoint) | {"rows": {"min": 1, "opt": 2, "max": most}}, "test")


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


def is_absent_or_whole(folder: Path, expected: np.ndarray) -> bool:
    """A killed first build: no bundle, or all of it."""
    if (folder / MANIFEST).exists():
        return np.array_equal(sampled(folder), expected)
    with pytest.raises(BundleError, match="no bundle at"):
        Bundle.open(folder)
    return True


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---------------------------------------------------------------- killed builds


def test_killed_rebuilds_leave_the_old_bundle_and_the_next_build_cleans_up(copied: Path, tiny_checkpoint: Path) -> None:
    """16 kills; the children build without end, so each kill falls into a build."""
    moments = random.Random(1)
    expected = sampled(copied)
    for kill in range(16):

        def build(first: int = kill) -> None:
            for number in count(first):
                compile_bundle(rows_recipe(tiny_checkpoint, 3 + number % 5), "cpu", out=copied)

        kill_after(moments.uniform(0.0, 0.7), build)
        np.testing.assert_array_equal(sampled(copied), expected)
        compile_bundle(rows_recipe(tiny_checkpoint, 9 + kill), "cpu", out=copied)
        assert only_named(copied)
        np.testing.assert_array_equal(sampled(copied), expected)


@pytest.mark.usefixtures("ready_graph")
def test_killed_first_builds_leave_no_bundle_or_all_of_it(
    tiny_bundle: Bundle, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """10 kills from the first moment to after the last."""
    moments = random.Random(2)
    expected = sampled(tiny_bundle.folder)
    recipe = rows_recipe(tiny_checkpoint, 8)
    for kill in range(10):
        folder = tmp_path / str(kill)
        kill_after(moments.uniform(0.05 * kill, 0.05 * kill + 0.05), lambda: compile_bundle(recipe, "cpu", out=folder))  # noqa: B023
        assert is_absent_or_whole(folder, expected)
        compile_bundle(recipe, "cpu", out=folder)
        assert only_named(folder)
        np.testing.assert_array_equal(sampled(folder), expected)


def test_a_kill_during_the_export_leaves_no_bundle(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """2 kills of the real export."""
    for seconds in (0.3, 2.0):
        folder = tmp_path / str(seconds)
        kill_after(seconds, lambda: compile_bundle(rows_recipe(tiny_checkpoint, 8), "cpu", out=folder))  # noqa: B023
        with pytest.raises(BundleError, match="no bundle at"):
            Bundle.open(folder)


@pytest.mark.usefixtures("ready_graph")
@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("flush", range(6))
def test_a_kill_before_anything_gets_its_name(  # the last flush is the manifest's
    copied: Path, tiny_checkpoint: Path, tmp_path: Path, flush: int, is_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """12 kills: random moments seldom fall where a finished file still has its temporary name."""
    folder = tmp_path / "new" if is_first else copied
    expected = sampled(copied)
    recipe = rows_recipe(tiny_checkpoint, 5)
    flushes = count()
    real = files.flush_to_disk

    def flush_then_die(path: Path) -> None:
        real(path)
        if next(flushes) == flush or path.name.startswith(f".{Path(MANIFEST).stem}"):
            die()

    def build() -> None:
        monkeypatch.setattr(files, "flush_to_disk", flush_then_die)
        monkeypatch.setattr(bundle, "flush_to_disk", flush_then_die)
        compile_bundle(recipe, "cpu", out=folder)

    assert died_of_kill(forked(build))
    assert is_absent_or_whole(folder, expected)
    compile_bundle(recipe, "cpu", out=folder)
    assert only_named(folder)
    np.testing.assert_array_equal(sampled(folder), expected)


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
    """14 kills of a run that saves after every step, then the run to its end."""
    moments = random.Random(3)
    state = tmp_path / "state.pt"

    def train() -> None:
        trainer = resumed(fashion, state)
        for _ in trainer.run():
            trainer.save(state)

    reached = [0]
    for _ in range(14):
        kill_after(moments.uniform(0.02, 0.2), train)
        reached.append(resumed(fashion, state).step)
    assert reached == sorted(reached)
    assert 0 < reached[-1] < 150, reached
    trainer, uninterrupted = resumed(fashion, state), new_trainer(fashion)
    assert len(list(trainer.run())) == 150 - reached[-1]
    assert len(list(uninterrupted.run())) == 150
    for mine, theirs in ((trainer.model, uninterrupted.model), (trainer.ema, uninterrupted.ema)):
        for name, expected in theirs.state_dict().items():
            assert torch.equal(mine.state_dict()[name], expected), name


# ---------------------------------------------------------------- killed sampling


def test_killed_sampling_leaves_whole_files_or_none(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """14 kills of a command that samples again and again into the same files."""
    moments = random.Random(5)
    out = tmp_path / "s.png"

    def sample() -> None:
        for seed in count():
            result = CliRunner().invoke(
                main, ["sample", str(tiny_bundle.folder), "--out", str(out), "--steps", "1", "--seed", str(seed)]
            )
            assert result.exit_code == 0, result.output

    found = 0
    for _ in range(14):
        out.unlink(missing_ok=True)
        out.with_suffix(".npz").unlink(missing_ok=True)
        kill_after(moments.uniform(0.0, 0.2), sample)
        if out.with_suffix(".npz").exists():
            with np.load(out.with_suffix(".npz")) as arrays:
                assert arrays["latents"].shape == (3, 1, 8, 8)
            found += 1
        if out.exists():
            with Image.open(out) as picture:
                picture.load()
    assert 0 < found < 14


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


@pytest.mark.usefixtures("ready_graph")
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

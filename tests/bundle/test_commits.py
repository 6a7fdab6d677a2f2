"""A bundle that is loaded while another process builds into it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner

from elit_export import Pipeline
from elit_export.bundle import reading
from elit_export.bundle.reading import MANIFEST, Bundle
from elit_export.bundle.store import writing
from elit_export.cli import main
from elit_export.errors import BundleError
from elit_export.runtime import opening


@pytest.fixture
def copied(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle.folder, tmp_path / "copied"))


def commit(folder: Path, note: str) -> None:
    """A build's commit: the plan of `step` lies beside another note, and so has another name; the old one goes."""
    with writing(folder) as store:
        assert store.manifest
        (plan_set,) = store.manifest.plan_sets
        old = plan_set.profiles[0].plan
        with store.staged() as staged:
            for name in old.artifact.files:
                shutil.copy(folder / "plans" / old.artifact.name / name, staged / name)
            (staged / "note.txt").write_text(note)
            plan = old.model_copy(update={"artifact": store.adopt(staged, "plans", "step")})
        profiles = tuple(facts.model_copy(update={"plan": plan}) for facts in plan_set.profiles)
        plan_sets = (plan_set.model_copy(update={"profiles": profiles}),)
        store.commit(store.manifest.model_copy(update={"plan_sets": plan_sets}))


def commit_without_end(folder: Path) -> None:
    """Some times in a second; a load takes less than one, and one without any pause would never come to its end."""
    for number in count():
        commit(folder, str(number))
        if number == 0:
            sys.stdout.write("committed\n")
            sys.stdout.flush()
        time.sleep(0.2)


class CommitBefore:
    """A step of loading, before which another process commits: the first times, or always."""

    def __init__(self, patch: pytest.MonkeyPatch, place: ModuleType, step: str, folder: Path, times: float) -> None:
        self.real, self.folder, self.times, self.calls = getattr(place, step), folder, times, 0
        patch.setattr(place, step, self)

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        if self.calls <= self.times:
            commit(self.folder, str(self.calls))
        return self.real(*arguments)


MOMENTS = pytest.mark.parametrize(
    ("place", "step"), [(reading, "verified_folder"), (opening, "_opened")], ids=["before hashes", "after hashes"]
)


@MOMENTS
def test_a_load_during_a_commit_opens_what_is_there_then(
    copied: Path, monkeypatch: pytest.MonkeyPatch, place: ModuleType, step: str
) -> None:
    at = CommitBefore(monkeypatch, place, step, copied, times=2)
    with Pipeline.load(copied) as pipeline:
        assert pipeline.sample([0], steps=1).latents.shape == (1, 1, 8, 8)
    assert at.calls > 2
    (folder,) = (copied / "plans").glob("step-*")
    assert (folder / "note.txt").read_text() == "2"


@MOMENTS
def test_a_command_during_a_commit_samples(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: ModuleType, step: str
) -> None:
    CommitBefore(monkeypatch, place, step, copied, times=1)
    result = CliRunner().invoke(main, ["sample", str(copied), "--steps", "1", "--out", str(tmp_path / "s.png")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "s.png").exists()


def test_commits_without_end_are_an_error(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "REOPENINGS", 3)
    at = CommitBefore(monkeypatch, reading, "verified_folder", copied, times=float("inf"))
    with pytest.raises(BundleError, match="written again and again; wait until nothing builds into it"):
        Pipeline.load(copied)
    assert at.calls == 3


def test_a_bundle_that_is_held_open_tells_that_it_was_built_again(copied: Path) -> None:
    bundle = Bundle.open(copied)
    assert not bundle.is_replaced
    commit(copied, "new")
    assert bundle.is_replaced
    with pytest.raises(BundleError, match="was built again meanwhile; load it again"):
        Pipeline.of(bundle, bundle.manifest.plan_sets[0])


def test_loads_while_a_process_commits_without_end(copied: Path) -> None:
    """Some of them meet a commit: that is not to be seen."""
    code = f"from pathlib import Path; from {__name__} import *; commit_without_end(Path({str(copied)!r}))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == b"committed\n"
            seen = set()
            for _ in range(20):
                Pipeline.load(copied).close()
                seen.add((copied / MANIFEST).read_bytes())
            assert process.poll() is None
        finally:
            process.kill()
    assert len(seen) > 2
    with writing(copied):  # cleans up after the kill
        pass
    Pipeline.load(copied).close()


COMMANDS = [
    ["sample", "BUNDLE", "--steps", "1", "--out", "OUT/s.png"],
    ["demo", "--bundle", "BUNDLE", "--out", "OUT"],
    ["verify", "BUNDLE"],
    ["inspect", "BUNDLE"],
    ["bench", "soak", "BUNDLE", "--samplings", "20"],
    ["calibrate", "samples", "BUNDLE", "--recipe", "OUT/r.toml", "--out", "OUT/s.npz"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command[:2]))
def test_a_command_opens_the_bundle_once(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    """What it checks is what it runs."""
    opened, real = [], Bundle.open.__func__  # type: ignore[attr-defined]

    def counted(cls: type[Bundle], folder: Path, **options: Any) -> Bundle:
        opened.append(folder)
        return real(cls, folder, **options)

    monkeypatch.setattr(Bundle, "open", classmethod(counted))
    (tmp_path / "r.toml").write_text(
        'images = 12\nsteps = 8\nsampler = "euler"\nguidance = ["none"]\nsamples = 64\nseed = 4\nrows = 4\n'
    )
    words = [word.replace("BUNDLE", str(tiny_bundle.folder)).replace("OUT", str(tmp_path)) for word in command]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert len(opened) == 1

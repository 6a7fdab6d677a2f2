"""Saved programs can run code: they are opened if this user built them here, or says to trust them.

What builds read of others is in `tests/backends/test_torch_tensorrt.py`.
"""

from __future__ import annotations

import io
import os
import shutil
import stat
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from elit_export import Pipeline
from elit_export.backends import BACKENDS, Backend
from elit_export.backends.protocols import FunctionEngine
from elit_export.backends.target import TargetFacts
from elit_export.backends.tensorrt.options import TensorRTTarget
from elit_export.bundle.artifacts import Artifact, FileFacts
from elit_export.bundle.manifest import Plan
from elit_export.bundle.reading import Bundle
from elit_export.bundle.store import Made, Stage, writing
from elit_export.bundle.trust import check_trusted, remember, trusted_list
from elit_export.cli import main
from elit_export.errors import BundleError
from elit_export.runtime.opening import open_fused
from elit_export.spec import Precision

TOLD = (
    r"a saved program, which can run any code when it is opened, and this user did not build it here; "
    r"build it again here, or if you trust whoever built it: --trust \(in Python: trust=True\)"
)

# What torch says of a hostile program that ran; the second is a slip in its own log line.
TORCH_SAYS = (AssertionError, TypeError)


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user who trusts nothing yet."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


# ---------------------------------------------------------------- a hostile program


class Hostile:
    """Unpickled, it runs a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.marker}'",)


def write_hostile(path: Path, marker: Path) -> None:
    """A real program in torch's older format, whose constants are a pickle."""
    good, pickled = path.with_suffix(".good"), io.BytesIO()
    torch.export.save(torch.export.export(torch.nn.ReLU(), (torch.ones(1),)), good)
    torch.save(Hostile(marker), pickled)
    record = torch._C.PyTorchFileReader(str(good)).get_record("models/model.json")
    good.unlink()
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("version", "8.14")
        file.writestr("serialized_exported_program.json", record)
        for name in ("state_dict", "constants", "example_inputs"):
            file.writestr(f"serialized_{name}.pt", pickled.getvalue())


class ProgramLoader:
    """Opens plans as torch opens saved programs, and runs nothing of them."""

    def open_engines(self, plans: Any, target: Any) -> Any:
        for plan in plans.values():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.export.load(plan.path)
        return dict.fromkeys(plans, FunctionEngine(dict))

    def incompatibility(self, plans: Any, target: Any) -> str:
        return ""

    def library_version(self) -> str:
        return "0"

    def device_problem(self, device: str) -> tuple[str, str]:
        return "", ""


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """What the hostile program makes where it runs."""
    return tmp_path / "it ran"


@pytest.fixture
def hostile(tiny_bundle: Bundle, tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """A bundle whose plans are such programs, of a backend whose facts say that they are programs."""
    facts = TargetFacts(devices=("cpu",), precisions=tuple(Precision), plans_are_programs=True)
    options = type("Options", (BACKENDS["onnxruntime"].options,), {"facts": facts})
    backend = Backend(name="onnxruntime", folder="onnxruntime", options=options, library="torch", extra="none")
    monkeypatch.setattr(Backend, "loader", lambda _self: ProgramLoader())
    monkeypatch.setitem(BACKENDS, "onnxruntime", backend)
    monkeypatch.setattr("elit_export.runtime.opening.plan_set_target", lambda _: options.model_construct())
    folder = Path(shutil.copytree(tiny_bundle.folder, tmp_path / "bundle"))
    with writing(folder) as store:
        manifest = store.manifest
        assert manifest
        with store.staged() as staged:
            write_hostile(staged / "step.pt2", marker)
            artifact = store.adopt(staged, "plans", "step")
        plan = Plan(artifact=artifact, key="k", file="step.pt2", versions={}, built_on={})
        old = manifest.plan_sets[0]
        profiles = tuple(facts.model_copy(update={"plan": plan}) for facts in old.profiles)
        plan_set = old.model_copy(update={"profiles": profiles, "cache": {}, "fused": plan})
        return store.commit(manifest.model_copy(update={"plan_sets": (plan_set,)}))


def test_a_hostile_program_does_not_run(hostile: Bundle, marker: Path) -> None:
    with pytest.raises(BundleError, match=f"^target cpu: .*step-.*: {TOLD}"):
        Pipeline.load(hostile.folder)
    with pytest.raises(BundleError, match=TOLD):
        open_fused(hostile, hostile.manifest.plan_sets[0])
    assert not marker.exists()


def test_it_does_where_the_user_says_to_trust_it(hostile: Bundle, marker: Path) -> None:
    """Without this the test above could not fail."""
    with pytest.raises(TORCH_SAYS):
        Pipeline.load(hostile.folder, trust=True)
    assert marker.exists()


def test_it_does_where_its_hash_is_in_the_list(hostile: Bundle, marker: Path) -> None:
    remember(hostile.manifest.plan_sets[0].profiles[0].plan.artifact)
    with pytest.raises(TORCH_SAYS):
        Pipeline.load(hostile.folder)
    assert marker.exists()


COMMANDS = (
    "sample BUNDLE",
    "verify BUNDLE",
    "demo --bundle BUNDLE",
    "calibrate cache BUNDLE --images 1",
    "calibrate samples BUNDLE --out FILE",
    "bench engines BUNDLE --rows 1",
    "bench samplers BUNDLE",
    "bench soak BUNDLE --samplings 10",
    "bench backends BUNDLE --rows 1",
    "tune BUNDLE --latency 1s --classifier none --guidance none --study FILE",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_opens_plans_refuses_it_and_takes_trust(
    hostile: Bundle, marker: Path, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`bench memory` opens them in another process; `evaluate` and `bench cache` refuse this bundle for less."""
    monkeypatch.setattr("elit_export.bench.memory.resident_bytes", lambda: None)
    words = command.replace("BUNDLE", str(hostile.folder)).replace("FILE", str(tmp_path / "samples.npz")).split()
    refused = CliRunner().invoke(main, words)
    assert (refused.exit_code, "--trust (in Python" in refused.stderr) == (2, True), refused.output
    assert not marker.exists()
    CliRunner().invoke(main, [*words, "--trust"])
    assert marker.exists()


# ---------------------------------------------------------------- the list


def artifact_of(*hashes: str) -> Artifact:
    files = {f"file{number}": FileFacts(size_bytes=1, sha256=sha256) for number, sha256 in enumerate(hashes)}
    return Artifact(kind="plans", name="step-0123456789ab", files=files)


ONE, OTHER = "1" * 64, "2" * 64


def test_every_file_of_a_program_must_be_known(tmp_path: Path) -> None:
    remember(artifact_of(ONE))
    check_trusted(tmp_path, artifact_of(ONE), trust=False)
    with pytest.raises(BundleError, match=TOLD):
        check_trusted(tmp_path, artifact_of(ONE, OTHER), trust=False)
    check_trusted(tmp_path, artifact_of(ONE, OTHER), trust=True)


def test_the_list_is_its_users_alone_and_grows_by_what_is_new(state: Path) -> None:
    remember(artifact_of(ONE))
    remember(artifact_of(ONE, OTHER))
    path = trusted_list()
    assert path == state / "elit_export" / "trusted.txt"
    assert path.read_text().split() == [ONE, OTHER]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.skipif(os.name != "posix", reason="elsewhere these bits say nothing")
def test_a_list_that_others_may_write_into_is_refused_with_the_remedy() -> None:
    remember(artifact_of(ONE))
    trusted_list().chmod(0o666)
    with pytest.raises(BundleError, match=r"others may write into this list of trusted files; delete it: rm .*trusted"):
        check_trusted(Path(), artifact_of(ONE), trust=False)


def test_a_relative_state_folder_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bundle's own folder could be the current one."""
    monkeypatch.setenv("XDG_STATE_HOME", "state")
    assert trusted_list() == Path.home() / ".local" / "state" / "elit_export" / "trusted.txt"


def test_builds_note_programs_and_nothing_else(tmp_path: Path) -> None:
    def make(folder: Path) -> Made:
        (folder / "step.bin").write_bytes(b"plan")
        return Made({"file": "step.bin", "versions": {}, "built_on": {}})

    def write(key: str, *, is_program: bool) -> Artifact:
        with writing(tmp_path / key) as store:
            plan = store.artifact(Plan, "step", key, make, stage=Stage("build", 0.5), is_program=is_program)
            return plan.artifact

    check = {"folder": tmp_path, "trust": False}
    artifact = write("plain", is_program=False)
    with pytest.raises(BundleError, match=TOLD):
        check_trusted(artifact=artifact, **check)  # type: ignore[arg-type]
    check_trusted(artifact=write("program", is_program=True), **check)  # type: ignore[arg-type]


# ---------------------------------------------------------------- which plans are programs


def test_plans_that_are_programs_say_so() -> None:
    """A version-compatible plan of TensorRT brings code for the host."""
    named = {name for name, backend in BACKENDS.items() if backend.facts.plans_are_programs}
    assert named == {"torch-tensorrt"}
    assert {name for name, backend in BACKENDS.items() if backend.facts.input_format.is_program} == named
    given: dict[str, Any] = {"backend": "tensorrt", "precision": Precision.FP32, "compute_capabilities": ["8.9"]}
    compatible = {kind: TensorRTTarget(**given, compatibility=kind).plans_are_programs for kind in ("none", "version")}
    assert compatible == {"none": False, "version": True}

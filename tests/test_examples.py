"""The examples do what their docstrings say."""

from __future__ import annotations

import ast
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TextIO

import numpy as np
import pytest
from PIL import Image

from elit_export import Pipeline
from elit_export.bundle.reading import Bundle
from elit_export.bundle.store import writing
from elit_export.calibrate.solver import record as record_solvers
from elit_export.spec import Precision, SolverTable
from tests.helpers import a_solver, calibrate, fit_of, max_relative

EXAMPLES = Path(__file__).parent.parent / "examples"
APP, HOST = EXAMPLES / "app.py", EXAMPLES / "fused_host.py"


# ---------------------------------------------------------------- an application


def start(*arguments: str | Path, stderr: int | TextIO = subprocess.PIPE) -> subprocess.Popen[str]:
    command = [sys.executable, str(APP), *(str(argument) for argument in arguments)]
    return subprocess.Popen(command, stderr=stderr, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    """Exit status and the lines of standard error."""
    _, said = process.communicate(timeout=60)
    return process.returncode, said.splitlines()


def wait_for(path: Path, process: subprocess.Popen[str], log: Path, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.02)


def test_it_draws_a_picture_and_tells_every_step(tiny_bundle: Bundle, tmp_path: Path) -> None:
    status, said = finish(start(tiny_bundle.folder, tmp_path / "a.png", "--steps", "7"))
    assert status == 0, said
    assert [line.split(" at ")[0] for line in said] == [f"step {step} of 7" for step in range(1, 8)]
    assert said[0].endswith("1of4")
    assert said[-1].endswith("4of4")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width > picture.height > 8


def test_large_pictures_are_not_made_larger(
    tmp_path: Path, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    app = import_module("app")
    large = np.zeros((3, 512, 512, 3), np.uint8)
    monkeypatch.setattr(Pipeline, "decode", lambda _pipeline, _latents: large)
    app.paint(tiny_bundle.folder, tmp_path / "a.png", 2)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (3 * (512 + 2) + 2, 512 + 2 + 2)


def test_ctrl_c_stops_it_and_keeps_the_last_preview(tiny_bundle: Bundle, tmp_path: Path) -> None:
    log = tmp_path / "said"
    with log.open("w") as stderr:  # a pipe would fill up
        process = start(tiny_bundle.folder, tmp_path / "a.png", "--steps", "10000", stderr=stderr)
    wait_for(tmp_path / "a.preview.png", process, log)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    *steps, last = log.read_text().splitlines()
    assert last == "stopped"
    assert all(line.startswith("step ") for line in steps)
    assert {path.name for path in tmp_path.iterdir()} == {"a.preview.png", "said"}
    with Image.open(tmp_path / "a.preview.png") as picture:
        picture.load()


@pytest.mark.parametrize(
    ("bundle", "options", "told"),
    [("nowhere", (), "nowhere"), ("", ("--steps", "0"), "at least 1 steps")],
)
def test_an_error_is_one_line_and_status_2(
    bundle: str, options: tuple[str, ...], told: str, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    folder = tmp_path / bundle if bundle else tiny_bundle.folder
    status, said = finish(start(folder, tmp_path / "a.png", *options))
    assert status == 2
    assert len(said) == 1
    assert said[0].startswith("error: ")
    assert told in said[0]
    assert list(tmp_path.iterdir()) == []


def test_a_picture_that_cannot_be_written_is_one_line_too(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """No error of the package: the file is the application's own."""
    status, said = finish(start(tiny_bundle.folder, tmp_path / "nowhere" / "a.png"))
    assert status == 2
    assert said[-1].startswith("error: ")
    assert "nowhere" in said[-1]
    assert list(tmp_path.iterdir()) == []


def test_it_is_short() -> None:
    assert len(APP.read_text(encoding="utf-8").splitlines()) < 60


# ---------------------------------------------------------------- a host without the runtime


@pytest.fixture(scope="module")
def calibrated(fused_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """With a fit of its own for the full budget, and another for the rest."""
    folder = Path(shutil.copytree(fused_bundle.folder, tmp_path_factory.mktemp("calibrated") / "bundle"))
    return calibrate(folder, fit_of(1, slope=9.0), fit_of(fused_bundle.manifest.model.spec.full.kept))


def run_host(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(HOST), *(str(argument) for argument in arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("threshold", [None, 0.04])
def test_a_host_of_numpy_and_onnxruntime_samples_as_the_runtime(
    calibrated: Bundle, tmp_path: Path, threshold: float | None
) -> None:
    host = run_host(calibrated.folder, tmp_path / "made.npy", *([str(threshold)] if threshold else []))
    assert host.returncode == 0, host.stderr
    found = np.load(tmp_path / "made.npy")
    with Pipeline.load(calibrated.folder) as pipeline:
        sample = pipeline.sample(
            [image % pipeline.spec.num_classes for image in range(len(found))],
            steps=50,
            sampler="euler",
            cache=f"teacache:{threshold or 0.1}",
            noise=np.random.default_rng(0).standard_normal(found.shape),
        )
    mask = "".join("10"[record.calls[0].reused] for record in sample.records)
    assert host.stdout == mask
    assert 2 < mask.count("1") < 40
    assert max_relative(found, sample.latents) <= 1e-5


def test_the_host_samples_by_a_solver_table(calibrated: Bundle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(calibrated.folder, tmp_path / "bundle"))
    weights = ((-0.4,), (0.1, -0.45), (0.0, 0.2, -0.45))
    table = SolverTable((1.0, 0.6, 0.25, 0.0), weights)
    model = calibrated.manifest.model
    facts = a_solver(table=table, guidance="none", checkpoint_sha256=model.checkpoint_sha256)
    mixed = replace(facts, table=replace(table, weights=((-0.1,), *weights[1:]), budgets=(1, 1, 4)))
    of_half = replace(facts, table=replace(table, weights=((-0.2,), *weights[1:])), schedule="half")
    of_half = replace(of_half, target="other", precision=Precision.BF16)  # the pipeline prefers its own precision
    record_solvers(Bundle.open(folder), [mixed, of_half, facts])
    host = run_host(folder, tmp_path / "made.npy", "0", "3")
    assert (host.returncode, host.stdout) == (0, "111"), host.stderr
    found = np.load(tmp_path / "made.npy")
    noise = np.random.default_rng(0).standard_normal(found.shape)
    labels = [image % model.spec.num_classes for image in range(len(found))]
    with Pipeline.load(folder) as pipeline:
        sample = pipeline.sample(labels, sampler="solver:3", noise=noise)
    assert max_relative(found, sample.latents) <= 1e-5
    other = run_host(folder, tmp_path / "made.npy", "0", "4")
    assert (other.returncode, other.stderr.strip().endswith("--calls 4 --guidance none")) == (2, True)


def test_the_plan_set_that_holds_the_graph_is_found(calibrated: Bundle, tmp_path: Path) -> None:
    """Though another target of the same device comes first."""
    folder = Path(shutil.copytree(calibrated.folder, tmp_path / "bundle"))
    (plan_set,) = calibrated.manifest.plan_sets
    without = plan_set.model_copy(update={"target": "plain", "fused": None})
    with writing(folder) as writer:
        writer.commit(calibrated.manifest.model_copy(update={"plan_sets": (without, plan_set)}))
    host = run_host(folder, tmp_path / "made.npy")
    assert host.returncode == 0, host.stderr


def test_another_threshold_reuses_otherwise(calibrated: Bundle, tmp_path: Path) -> None:
    masks = {run_host(calibrated.folder, tmp_path / "made.npy", told).stdout for told in ("0.04", "0.1")}
    assert len(masks) == 2


@pytest.mark.parametrize("missing", ["calibration", "plan"])
def test_a_bundle_that_is_not_ready_is_told_how_to_become_it(
    tiny_bundle: Bundle, fused_bundle: Bundle, tmp_path: Path, missing: str
) -> None:
    bundle = tiny_bundle if missing == "plan" else fused_bundle
    host = run_host(bundle.folder, tmp_path / "made.npy")
    assert host.returncode == 2
    (said,) = host.stderr.splitlines()
    assert said.startswith(f"error: {bundle.folder}: build it with `fused = true`")
    assert said.endswith(f"elit-export calibrate cache {bundle.folder}")
    assert list(tmp_path.iterdir()) == []


def test_it_needs_nothing_else_and_is_short() -> None:
    text = HOST.read_text(encoding="utf-8")
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    names |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    assert names - set(sys.stdlib_module_names) == {"numpy", "onnxruntime"}
    assert len(text.splitlines()) < 55

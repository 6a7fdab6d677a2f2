"""Every line with "next:" that a command prints works when it is typed."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import elit_export
from elit_export.bundle.manifest import Parity, PlanSet
from elit_export.bundle.reading import Bundle
from elit_export.bundle.store import writing
from elit_export.cli import main
from elit_export.cli.advice import after_build

PACKAGE = Path(elit_export.__file__).parent
# Where such a line is printed, and how often; each has a test here, or where it is said.
PLACES = {
    "cli/init.py": 1,
    "cli/build.py": 1,  # of a model with text: tests/test_text_to_image.py
    "cli/calibrate.py": 2,
    "cli/calibrate_solver.py": 1,  # tests/calibrate/test_solver.py
    "cli/verify.py": 1,  # tests/verify/test_polygraphy.py
}


FEW = """
images = 5
steps = 8
sampler = "euler"
guidance = ["none", "cfg:2"]
samples = 96
seed = 4
rows = 3
"""


def test_the_lines_are_these() -> None:
    found = {
        str(path.relative_to(PACKAGE)): count
        for path in PACKAGE.rglob("*.py")
        if (count := len(re.findall(r"; next: ", path.read_text(encoding="utf-8"))))
    }
    assert found == PLACES


def typed(line: str) -> str:
    """The output of a command, typed as a shell would take it."""
    program, *words = shlex.split(line)
    assert program == "elit-export"
    done = CliRunner().invoke(main, words, catch_exceptions=False)
    assert done.exit_code == 0, f"{line}\n{done.output}"
    return done.output


def next_in(said: str) -> str:
    """The line's command, which is the last thing that is said."""
    return said.strip().splitlines()[-1].partition("next: ")[2]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a name that a shell would take apart."""
    folder = tmp_path / "my models"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_from_a_checkpoint_to_images(place: Path, tiny_checkpoint: Path) -> None:
    shutil.copy(tiny_checkpoint, place / "a model.safetensors")
    said = typed("elit-export init 'a model.safetensors' --out 'a recipe.toml'")
    line = next_in(said)
    assert line == "elit-export build 'a recipe.toml' --target cpu"
    line = next_in(typed(f"{line} --out 'a bundle'"))
    assert line == "elit-export sample 'a bundle' --target cpu --labels 0-2"
    assert "wrote samples.png" in typed(line)
    line = next_in(typed("elit-export calibrate cache 'a bundle' --images 8 --steps 4 --rows 4"))
    assert line.startswith("elit-export sample 'a bundle' --target cpu --labels 0-2 --cache ")
    assert "wrote samples.png" in typed(line)


def test_as_many_labels_as_one_call_takes(golden_g4_bundle: Bundle, place: Path) -> None:
    """It has more classes than rows."""
    manifest = golden_g4_bundle.manifest
    assert manifest.model.spec.num_classes > 8
    line = after_build(golden_g4_bundle.folder, manifest, manifest.plan_sets[0])
    assert line.endswith(" --labels 0-7")
    typed(line)
    with np.load("samples.npz") as file:
        assert file["labels"].tolist() == list(range(8))


def test_every_plan_set_of_several_is_chosen(openvino_bundle: Bundle, place: Path) -> None:
    """By its precision too, where two plan sets have one target."""
    manifest = openvino_bundle.manifest
    assert len(manifest.plan_sets) > 1
    for plan_set in manifest.plan_sets:
        line = after_build(openvino_bundle.folder, manifest, plan_set)
        assert f"--target {plan_set.target} --labels" in line
        typed(line)
    first, second, *_ = manifest.plan_sets
    twins = manifest.model_copy(
        update={"plan_sets": (first, second.model_copy(update={"target": first.target, "precision": "bf16"}))}
    )
    assert "--target cpu --precision fp32 --labels" in after_build(openvino_bundle.folder, twins, first)


def test_a_plan_set_that_never_ran_is_verified_first(tiny_bundle: Bundle, place: Path) -> None:
    folder = Path(shutil.copytree(tiny_bundle.folder, place / "bundle"))
    not_run = Parity(status="not run", reason="its device was not there")
    (plan_set,) = tiny_bundle.manifest.plan_sets
    facts: PlanSet = plan_set.with_parity({one.name: not_run for one in plan_set.profiles}, not_run)
    with writing(folder) as store:
        store.commit(tiny_bundle.manifest.model_copy(update={"plan_sets": (facts,)}))
    line = after_build(folder, Bundle.open(folder).manifest, facts)
    assert line == f"elit-export verify {shlex.quote(str(folder))} --target cpu"
    typed(line)
    manifest = Bundle.open(folder).manifest
    line = after_build(folder, manifest, manifest.plan_sets[0])
    assert line.startswith("elit-export sample ")
    typed(line)


def test_samples_go_into_a_build_of_8_bits(openvino_bundle: Bundle, tiny_checkpoint: Path, place: Path) -> None:
    """RECIPE and TARGET are to be filled in."""
    if not any(one.precision.value == "int8" for one in openvino_bundle.manifest.plan_sets):
        pytest.skip("this CPU has no int8")
    folder = Path(shutil.copytree(openvino_bundle.folder, place / "bundle"))
    (place / "few.toml").write_text(FEW)
    said = typed("elit-export calibrate samples bundle --recipe few.toml --out 'my samples.npz' --target cpu")
    line = next_in(said)
    assert line == "elit-export build RECIPE --target TARGET --samples 'my samples.npz'"
    written = f'name = "test"\ncheckpoint = "{tiny_checkpoint}"\nrows = {{ min = 1, opt = 2, max = 8 }}\n'
    written += '[targets.ov-int8]\nbackend = "openvino"\nprecision = "int8"\nthreads = 1\n'
    (place / "recipe.toml").write_text(written)
    line = line.replace("RECIPE", "recipe.toml").replace("TARGET", "ov-int8")
    typed(f"{line} --out {shlex.quote(str(folder))}")

"""The wheel as a person installs it, without this checkout: to run a bundle without torch or onnx, and to build."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from elit_export import Pipeline
from elit_export.bundle.reading import Bundle

pytestmark = pytest.mark.wheel
ROOT = Path(__file__).parent.parent
NEEDED = ("elit_export", "engines", "tests", "pyproject.toml", "README.md", "LICENSE", "constraints.txt")
# What pip says where it has no package index, or this environment no pip.
NO_INDEX = ("connection broken", "(from versions: none)", "No module named pip")
SECONDS = 300


def run(*command: str | Path, where: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=where, env=environment, capture_output=True, text=True, timeout=SECONDS)


def pip(*arguments: str | Path, where: Path) -> None:
    """Skips where there is no package index."""
    done = run(sys.executable, "-m", "pip", "--quiet", "--retries", "2", *arguments, where=where)
    said = done.stdout + done.stderr
    if done.returncode and any(reason in said for reason in NO_INDEX):
        pytest.skip(f"pip reaches no package index: {said.strip().splitlines()[-1]}")
    assert done.returncode == 0, said


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing is left in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    copied = folder / "copied"
    copied.mkdir()
    for name in NEEDED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copied / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copied)
    pip("wheel", copied, "--no-deps", "--wheel-dir", folder, where=folder)
    (built,) = folder.glob("*.whl")
    return built


def new_environment(folder: Path) -> Path:
    """The Python of a new and empty environment."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=SECONDS)
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def scripts(wheel: Path) -> Path:
    """The scripts of an environment that holds the wheel and what running needs."""
    python = new_environment(wheel.parent / "env")
    pip(
        *("--python", python, "install", "--constraint", ROOT / "constraints.txt", f"{wheel}[onnxruntime]"),
        where=wheel.parent,
    )
    return python.parent


@pytest.fixture(scope="module")
def building_scripts(wheel: Path) -> Path:
    """The same with what building needs: the libraries of these tests, seen from a new environment."""
    environment = wheel.parent / "building"
    python = new_environment(environment)
    pip("--python", python, "install", "--no-deps", wheel, where=wheel.parent)
    own = Path(sysconfig.get_path("purelib", "venv", {"base": str(environment)}))
    libraries = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (own / "libraries.pth").write_text("".join(f"{path}\n" for path in libraries))
    return python.parent


# ---------------------------------------------------------------- what is inside


def test_wheel_holds_the_package_and_the_shipped_model(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {
        "elit_export/py.typed",
        "elit_export/cli/__init__.py",
        "elit_export/engines/fashion.toml",
        "elit_export/assets/fashion.safetensors",
        "elit_export/assets/fashion.md",
    } <= names
    packaged = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "elit_export").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    inside = {name for name in names if ".dist-info/" not in name}
    assert inside == packaged | {"elit_export/engines/fashion.toml"}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_running_needs_no_library_of_building(scripts: Path) -> None:
    libraries = ["torch", "onnx", "onnx_ir", "onnxscript", "safetensors", "matplotlib", "pytest"]
    code = f"from importlib.util import find_spec; print([name for name in {libraries} if find_spec(name)])"
    done = run(scripts / "python", "-c", code, where=scripts)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


# ---------------------------------------------------------------- what runs


def ok(scripts: Path, *arguments: str | Path, where: Path) -> str:
    done = run(scripts / "elit-export", *arguments, where=where)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_command_samples_what_the_checkout_samples(scripts: Path, tiny_bundle: Bundle, tmp_path: Path) -> None:
    options = ("--labels", "0,2", "--steps", "4", "--schedule", "0-1:half,2-3:full", "--guidance", "cfg:2")
    said = ok(scripts, "sample", tiny_bundle.folder, "--out", tmp_path / "s.png", *options, where=tmp_path)
    assert "2 images in 4 steps" in said
    assert (tmp_path / "s.png").exists()
    with Pipeline.load(tiny_bundle.folder) as pipeline:
        here = pipeline.sample([0, 2], steps=4, schedule="0-1:half,2-3:full", guidance="cfg:2").latents
    with np.load(tmp_path / "s.npz") as arrays:
        np.testing.assert_allclose(arrays["images"], here, atol=1e-5)


EMBEDDED = """
import sys
from pathlib import Path
import elit_export
from elit_export import ElitExportError, Pipeline
assert Path(elit_export.__file__).is_relative_to(sys.prefix), elit_export.__file__
with Pipeline.load(sys.argv[1]) as pipeline:
    print(pipeline.sample([0, 1], steps=3, guidance="ccfg:2@1").latents.shape)
"""


def test_an_application_embeds_the_pipeline(scripts: Path, tiny_bundle: Bundle, tmp_path: Path) -> None:
    done = run(scripts / "python", "-W", "error", "-c", EMBEDDED, tiny_bundle.folder, where=tmp_path)
    assert (done.stdout.strip(), done.stderr) == ("(2, 1, 8, 8)", "")


def test_a_bundle_is_shown_and_verified_without_torch(scripts: Path, tiny_bundle: Bundle, tmp_path: Path) -> None:
    copied = shutil.copytree(tiny_bundle.folder, tmp_path / "copied")
    assert "onnxruntime on cpu" in ok(scripts, "inspect", copied, where=tmp_path)
    assert "trajectories against PyTorch" in ok(scripts, "verify", copied, where=tmp_path)


def test_the_demo_draws_from_a_bundle_without_torch(scripts: Path, tiny_bundle: Bundle, tmp_path: Path) -> None:
    copied = shutil.copytree(tiny_bundle.folder, tmp_path / "copied")
    said = ok(scripts, "demo", "--bundle", copied, "--out", tmp_path / "drawn", where=tmp_path)
    assert "quarter, then full" in said
    with Image.open(tmp_path / "drawn" / "demo.png") as picture:
        assert picture.size == (3 * (3 * 10 + 2), 3 * (4 * 10 + 2))  # three classes; three budgets and the mixed row


SHIPPED = """
import sys
from elit_export.bundle.recipe import load_recipe, shipped_recipe
assert shipped_recipe().is_relative_to(sys.prefix), shipped_recipe()
print(load_recipe(shipped_recipe()).name)
"""


def test_the_shipped_recipe_is_installed(scripts: Path, tmp_path: Path) -> None:
    done = run(scripts / "python", "-c", SHIPPED, where=tmp_path)
    assert (done.stdout.strip(), done.stderr) == ("fashion", "")


def test_doctor_says_what_is_missing(scripts: Path, tmp_path: Path) -> None:
    said = ok(scripts, "doctor", where=tmp_path)
    assert "backend onnxruntime" in said
    assert "elit-export[export]" in said


def test_the_demo_builds_the_shipped_model_and_draws_it(building_scripts: Path, tmp_path: Path) -> None:
    """The package of the wheel beside the libraries of these tests."""
    code = "import elit_export, sys; sys.exit(not elit_export.__file__.startswith(sys.prefix))"
    assert run(building_scripts / "python", "-c", code, where=tmp_path).returncode == 0
    said = ok(building_scripts, "demo", where=tmp_path)
    assert "quarter, then full" in said
    made = tmp_path / "elit-export-demo"
    with Image.open(made / "demo.png") as picture:
        assert picture.size == (3 * (10 * 34 + 2), 3 * (6 * 34 + 2))  # ten classes; five budgets and the mixed row
    assert Bundle.open(made / "bundle").manifest.model.name == "fashion"


# ---------------------------------------------------------------- what does not, and says what to install


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (("demo",), "export"),
        (("build", ROOT / "engines" / "fashion.toml"), "export"),
        (("export", "shipped:fashion", "--out", "graph"), "export"),
        (("train", ROOT / "tests" / "data" / "fashion", "--out", "run"), "export"),
        (("inspect", "shipped:fashion"), "export"),
        (("evaluate", "BUNDLE"), "export"),
        (("train-classifier", ROOT / "tests" / "data" / "fashion", "--out", "c.safetensors"), "export"),
        (("bench", "engines", "BUNDLE", "--rows", "2", "--rounds", "1", "--plot", "p.png"), "report"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else value,
)
def test_a_command_that_needs_more_names_the_extra(
    arguments: tuple[str | Path, ...], extra: str, scripts: Path, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    words = [tiny_bundle.folder if word == "BUNDLE" else word for word in arguments]
    done = run(scripts / "elit-export", *words, where=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert f"pip install 'elit-export[{extra}]'" in done.stderr
    assert ("elit-export demo --bundle BUNDLE" in done.stderr) == (arguments == ("demo",))
    assert list(tmp_path.iterdir()) == []

"""The rooms of the package and what each may import, and other promises about its structure."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from elit_export.models.backbones import BACKBONES, FAMILIES
from elit_export.spec import RELEASED_BACKBONE

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "elit_export"

# room → what it may import beside itself, `errors` and `files`. A file belongs to the longest name that fits.
ROOMS: dict[str, set[str]] = {
    "errors": set(),
    "files": set(),
    "spec": {"models"},  # for `ModelSpec.named` alone, which reads the table of backbones
    "backends": set(),
    "machine": set(),
    "keys": {"spec", "recipe", "backends", "manifest", "samples"},
    "manifest": {"spec", "samples"},
    "recipe": {"spec", "backends"},
    "bundle": {"spec", "manifest"},
    "samples": {"spec"},
    "weights": {"spec", "models"},
    "checkpoint_diffusers": {"spec", "models", "weights"},
    "checkpoint": {"spec", "models", "weights", "checkpoint_diffusers"},
    "decoder_folder": {"spec"},
    "decoder": {"decoder_folder"},
    "judge": {"models", "checkpoint", "weights"},
    "models": {"spec"},
    "training": {"spec", "models", "checkpoint"},
    "graphs": {"spec", "models"},
    "build": {"spec", "recipe", "bundle", "manifest", "backends", "samples", "machine"},
    "runtime": {"spec", "bundle", "manifest", "backends", "machine"},
    "text": {"spec", "runtime"},
    "verify": {"spec", "bundle", "manifest", "runtime", "models", "checkpoint"},
    "calibrate": {"backends", "spec", "manifest", "bundle", "runtime", "samples", "models", "verify"},
    "report": {"calibrate", "spec", "bundle", "manifest", "verify", "models", "checkpoint"},
    "compile_decoder": {
        *("spec", "bundle", "manifest", "backends", "decoder", "decoder_folder", "graphs", "keys", "verify"),
    },
    "compile": {
        *(
            "spec",
            "recipe",
            "bundle",
            "manifest",
            "backends",
            "checkpoint",
            "compile_decoder",
            "decoder",
            "decoder_folder",
            "models",
            "graphs",
            "build",
            "runtime",
            "verify",
            "samples",
            "keys",
            "calibrate",
        ),
    },
    "demo": {"spec", "recipe", "bundle", "compile", "models", "runtime"},
    "doctor": {"backends"},
    "bisect": {"backends", "bundle", "manifest", "recipe", "runtime", "spec", "verify"},
    "cli": {"*"},
    "__main__": {"cli"},
    "__init__": {"*"},
}
# library → the only places that may name it
LIBRARIES: dict[str, set[str]] = {
    "onnxruntime": {"build/onnxruntime.py", "runtime/onnxruntime_engine.py"},
    "cuda": {"runtime/cuda.py"},
    "tensorrt": set(),  # imported under the name that the table of backends gives, as they share their modules
    "tensorrt_rtx": set(),
    "openvino": {"build/openvino.py", "runtime/openvino_engine.py"},
    "nncf": {"build/openvino.py"},
    "onnx": {"graphs/", "bisect.py", "calibrate/quantize.py"},
    "modelopt": {"calibrate/quantize.py"},
    "onnx_ir": {"graphs/"},
    "onnxscript": {"graphs/"},
    # Torch-TensorRT engines are torch modules: with that backend alone, torch runs.
    "torch": {
        *("models/", "training/", "graphs/", "checkpoint.py", "checkpoint_diffusers.py", "weights.py"),
        *("decoder.py", "verify/reference.py", "cli/train.py", "text/encoder.py"),
        *("build/torch_tensorrt.py", "runtime/torch_tensorrt_engine.py"),
    },
    "torch_tensorrt": {"build/torch_tensorrt.py", "runtime/torch_tensorrt_engine.py"},
    "safetensors": {"weights.py", "checkpoint_diffusers.py"},
    "diffusers": {"decoder.py"},
    "transformers": {"text/encoder.py"},
    "click": {"cli/"},
    "filelock": {"bundle.py"},
    "matplotlib": {"report/plots.py"},
}
BACKBONE_MODULES = [row.module.removeprefix("elit_export.") for row in BACKBONES.values()]
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Every module a file imports, also inside functions and under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_file_imports_only_what_its_room_may(path: Path) -> None:
    room = room_of(path)
    allowed = ROOMS[room] | {room, "errors", "files"}
    names = set(imports(path))
    used = {name.split(".")[1] for name in names if name.startswith("elit_export.")}
    assert "elit_export" not in names, "import from the modules themselves"
    assert "*" in allowed or used <= allowed


@pytest.mark.parametrize("library", LIBRARIES)
def test_library_is_named_only_where_it_belongs(library: str) -> None:
    users = {
        str(path.relative_to(PACKAGE)) for path in FILES if any(name.split(".")[0] == library for name in imports(path))
    }
    assert all(any(user.startswith(place) for place in LIBRARIES[library]) for user in users), users


# What only `models/` and what reads checkpoints may say, and the one place more: what a spec is that names no backbone.
BACKBONE_WORDS = re.compile(
    "|".join(
        [
            *(re.escape(name.removeprefix("ELIT-")) for name in (*BACKBONES, *FAMILIES)),
            *(row.class_name for row in BACKBONES.values()),
            *BACKBONE_MODULES,
        ]
    )
)
NAMED_ELSEWHERE = {("spec/model.py", f'RELEASED_BACKBONE = "{RELEASED_BACKBONE}"')}


def test_no_backbone_is_named_outside_its_rooms() -> None:
    found = {
        (str(path.relative_to(PACKAGE)), line.split("  #")[0])
        for path in FILES
        if room_of(path) not in ("models", "checkpoint", "checkpoint_diffusers")
        for line in path.read_text(encoding="utf-8").splitlines()
        if BACKBONE_WORDS.search(line)
    }
    assert found == NAMED_ELSEWHERE


def test_what_one_backbone_has_alone_is_read_by_models_and_the_spec() -> None:
    """Everything else goes by `spec.budgets`."""
    pattern = re.compile(r"spec\.(merge|coarse_depth)\b")
    users = {room_of(path) for path in FILES if pattern.search(path.read_text(encoding="utf-8"))}
    assert users == {"models"}


def test_every_backbone_has_a_file_of_its_own() -> None:
    assert len({row.module for row in BACKBONES.values()}) == len(BACKBONES)
    assert all((PACKAGE / "models" / f"{module.rpartition('.')[2]}.py").is_file() for module in BACKBONE_MODULES)


def test_only_the_command_line_prints_or_exits() -> None:
    pattern = re.compile(r"(?<![\w.])(print|exit)\(|sys\.exit|console\.print")
    users = [path for path in FILES if pattern.search(path.read_text(encoding="utf-8")) and room_of(path) != "cli"]
    assert users == []


HEAVY = (
    "torch",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "safetensors",
    "matplotlib",
    "tensorrt_rtx",
    "cuda",
    "modelopt",
    "openvino",
    "nncf",
    "diffusers",
    "transformers",
)


def modules_after(code: str) -> set[str]:
    script = f"{code}\nimport sys; print('\\n'.join(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in done.stdout.split()}


@pytest.mark.parametrize(
    "code",
    [
        "import elit_export",
        "from elit_export import Budget, ModelSpec, ElitExportError, Pipeline",
        "import elit_export.cli",
        "import elit_export.runtime.pipeline, elit_export.verify.check",
        "from elit_export.report.inspection import bundle_facts",
    ],
)
def test_importing_loads_no_heavy_library(code: str) -> None:
    assert modules_after(code).isdisjoint(HEAVY)


def test_every_module_has_a_docstring() -> None:
    empty_packages = [path for path in FILES if path.name == "__init__.py" and not path.read_text().strip()]
    silent = [path for path in FILES if ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) is None]
    assert set(silent) == set(empty_packages)


def test_readme_tree_names_every_file_of_the_package() -> None:
    tree = (ROOT / "README.md").read_text(encoding="utf-8").split("<!-- tree -->")[1]
    named = set(re.findall(r"[\w/-]+\.(?:py|toml|safetensors|md)\b", tree))
    present = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*")
        if path.is_file() and path.suffix in {".py", ".safetensors", ".md"} and path.read_bytes().strip()
    }
    present |= {f"engines/{path.name}" for path in (ROOT / "engines").glob("*.toml")}
    assert named == present

"""The rooms of the package and what each may import, and other promises about its structure."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from elit_export.backends import BACKENDS
from elit_export.cli import COMMANDS
from elit_export.models.registry import BACKBONES, FAMILIES
from elit_export.spec import RELEASED_BACKBONE

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "elit_export"

# room → what it may import beside itself and what may be imported ANYWHERE.
ROOMS: dict[str, set[str]] = {
    "errors": set(),
    "arrays": set(),
    "callbacks": set(),
    "spec": set(),
    "backends": {"spec"},
    "bundle": {"spec", "backends"},
    "models": {"spec"},
    "cost": {"spec", "models"},  # `models.registry`, which needs no torch
    "checkpoints": {"spec", "models"},
    "training": {"spec", "models", "checkpoints", "evaluate"},
    "graphs": {"spec", "models", "cost", "bundle", "backends"},
    "runtime": {"spec", "bundle", "backends"},
    "text": {"spec", "runtime", "checkpoints"},
    "verify": {"spec", "bundle", "backends", "runtime", "models", "checkpoints"},
    "calibrate": {"spec", "bundle", "backends", "runtime", "models", "cost", "graphs", "verify"},
    "bench": {"spec", "bundle", "backends", "runtime", "cost", "verify"},
    "evaluate": {"spec", "bundle", "runtime", "checkpoints", "verify", "bench"},
    "tune": {"spec", "bundle", "backends", "runtime", "bench", "evaluate"},
    "integrations": {"spec", "bundle", "backends", "runtime", "verify"},
    "report": {
        "spec",
        "bundle",
        "backends",
        "runtime",
        "models",
        "cost",
        "checkpoints",
        "graphs",
        "calibrate",
        "verify",
        "bench",
        "tune",
    },
    "compiler": {
        *("spec", "bundle", "backends", "models", "cost", "checkpoints", "graphs", "runtime", "verify"),
    },
    "cli": {"*"},
    "__main__": {"cli"},
    "__init__": {"arrays", "backends", "spec", "bundle", "checkpoints", "compiler", "runtime"},
}
# Values and helpers without a room, and the files of `bundle` that know no bundle.
ANYWHERE = {"errors", "arrays", "callbacks", "bundle.atomic", "bundle.readers"}
# What each kind of file of a backend may import beside its own folder.
BACKEND_FILES: dict[str, set[str]] = {
    "options": {"spec", "backends.target"},
    "build": {"spec", "errors", "backends.protocols", "backends.versions"},
    "engine": {"spec", "errors", "arrays", "backends.ports", "backends.protocols", "backends.versions"},
}
# library → the only places that may name it
LIBRARIES: dict[str, set[str]] = {
    "onnxruntime": {"backends/onnxruntime/"},
    "cuda": {"backends/tensorrt/cuda.py"},
    "tensorrt": set(),  # imported under the name that its flavour gives, as the two share their modules
    "tensorrt_rtx": set(),
    "openvino": {"backends/openvino/"},
    "nncf": {"backends/openvino/build.py"},
    "onnx": {"graphs/", "verify/bisect.py"},
    "modelopt": {"graphs/quantize.py"},
    "onnx_ir": {"graphs/"},
    "onnxscript": {"graphs/"},
    # Torch-TensorRT engines are torch modules: with that backend alone, torch runs.
    "torch": {
        *("models/", "training/", "graphs/", "checkpoints/", "evaluate/classifier.py"),
        *("bench/peaks.py", "verify/reference.py", "cli/train.py", "text/encoder.py", "backends/torch_tensorrt/"),
    },
    "torch_tensorrt": {"backends/torch_tensorrt/"},
    "safetensors": {"checkpoints/"},
    "diffusers": {"checkpoints/vae_decoder.py"},
    "transformers": {"text/encoder.py"},
    "click": {"cli/"},
    "rich": {"cli/"},
    "filelock": {"bundle/store.py"},
    "matplotlib": {"report/plots.py"},
    "optuna": {"tune/study.py"},
    "polygraphy": {"verify/polygraphy.py", "integrations/polygraphy.py"},
}
# The one door for files that are read, and who else opens some: (file, call) → why it may.
DOOR = "bundle/readers.py"
OPENS_ITSELF: dict[tuple[str, str], str] = {
    ("bundle/atomic.py", "path.open"): "hashes files of any size by parts; the caller knows that they are regular",
    ("bundle/atomic.py", "os.open"): "locks and syncs files that it writes",
    ("bundle/calibration_inputs.py", "temporary.open"): "writes",
    ("bundle/trust.py", "os.open"): "writes into the user's own list",
    ("compiler/usual_recipe.py", "tomllib.loads"): "text that it wrote itself",
    ("graphs/about.py", "onnx.load"): "a graph that the build made",
    ("bundle/keys.py", "path.read_bytes"): "source of the package",
    ("backends/openvino/cpu.py", "CPU_FACTS.read_text"): "a file of the system",
    ("bench/timing.py", "STATUS.read_text"): "a file of the system",
    ("backends/openvino/engine.py", "plan.read_bytes"): "a plan, verified by size and hash",
    ("backends/openvino/build.py", "ov.Core().read_model"): "a graph that the build made or verified",
    ("backends/tensorrt/opened.py", "path.read_bytes"): "a plan, verified by size and hash",
    (
        "backends/tensorrt/opened.py",
        "self._cache_file.read_bytes",
    ): "kernels that the engine keeps in a folder of its own",
    ("backends/tensorrt/build.py", "path.read_bytes"): "timings that the build keeps in a folder of its own",
    ("backends/torch_tensorrt/build.py", "torch.export.load"): "a graph that the build made or verified",
    ("checkpoints/diffusers.py", "safetensors.safe_open"): "of a file that `check_regular` passed",
    ("checkpoints/stored.py", "safetensors.safe_open"): "of a file that `check_regular` passed",
    ("checkpoints/weights.py", "load_file"): "of a file that `check_regular` passed",
    ("checkpoints/released.py", "torch.load"): "of a file that `check_saved_by_torch` passed",
    ("training/state.py", "torch.load"): "of a file that `check_saved_by_torch` passed",
    ("training/data.py", "Image.open"): "of bytes that the door gave",
    ("graphs/check.py", "onnx.load"): "a graph that the build made or verified",
    ("graphs/reading.py", "onnx.load"): "of a file that `check_regular` passed",
    ("graphs/quantize.py", "onnx.load"): "a graph that the build made or verified",
    ("verify/bisect.py", "onnx.load"): "a graph, verified by size and hash",
    ("bundle/atomic.py", "open"): "writes",
    ("bundle/atomic.py", "temporary.open"): "what was written, to copy it into a stream",
    ("runtime/sample.py", "temporary.open"): "writes",
    ("report/plots.py", "temporary.open"): "writes",
    ("text/files.py", "temporary.open"): "writes",
    ("cli/streams.py", "os.open"): "the null device",
}
OPENING = re.compile(
    r"(os|path|temporary|[a-z_]*file)\.open|open|.*\.(read_text|read_bytes|safe_open|read_model|fromfile|memmap)"
    r"|(json|np|numpy|torch|torch\.export|onnx|tomllib|pickle)\.load|tomllib\.loads|(gzip|zipfile|Image)\.\w+|load_file"
)
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


def own_imports(path: Path) -> set[str]:
    """What a file imports of the package, without the package's name."""
    names = set(imports(path))
    assert "elit_export" not in names, f"{path}: import from the modules themselves"
    return {name.removeprefix("elit_export.") for name in names if name.startswith("elit_export.")}


def is_below(name: str, allowed: set[str]) -> bool:
    return any(name == one or name.startswith(f"{one}.") for one in allowed)


def test_rooms_are_few_and_are_those_of_the_package() -> None:
    assert len(ROOMS) <= 24
    rooms = {room_of(path) for path in FILES}
    assert rooms == set(ROOMS)
    assert [room for room, allowed in ROOMS.items() if "*" in allowed] == ["cli"]


def test_files_import_only_what_their_rooms_may() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in FILES
        for name in own_imports(path)
        if "*" not in ROOMS[room_of(path)] and not is_below(name, ROOMS[room_of(path)] | ANYWHERE | {room_of(path)})
    ]
    assert wrong == []


def test_files_of_a_backend_meet_in_values_alone() -> None:
    """Neither names a manifest, and what builds and what runs never import each other."""
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in (PACKAGE / "backends").glob("*/*.py")
        if path.stem in BACKEND_FILES
        for name in own_imports(path)
        if not is_below(name, BACKEND_FILES[path.stem] | {"bundle.atomic"})
        and not (name.startswith(f"backends.{path.parent.name}") and not name.endswith((".build", ".engine")))
    ]
    wrong += [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in (PACKAGE / "backends").glob("*/*.py")
        if path.stem != "build"
        for name in own_imports(path)
        if name.startswith("backends.") and name.endswith(".build")
    ]
    assert wrong == []


def test_libraries_are_named_only_where_they_belong() -> None:
    users = {(name.split(".")[0], str(path.relative_to(PACKAGE))) for path in FILES for name in imports(path)}
    wrong = [
        f"{user} imports {library}"
        for library, user in sorted(users)
        if library in LIBRARIES and not any(user.startswith(place) for place in LIBRARIES[library])
    ]
    assert wrong == []


FOLDERS_OF_BACKENDS = {backend.folder for backend in BACKENDS.values()}


def calls(path: Path) -> set[str]:
    """Everything a file calls, as it is written there."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return {ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)}


def test_files_are_opened_for_reading_by_the_door_alone() -> None:
    """It refuses special files and bounds what it reads; who opens some itself is named with the reason."""
    opened = {
        (str(path.relative_to(PACKAGE)), call) for path in FILES for call in calls(path) if OPENING.fullmatch(call)
    }
    harmless = {call for call in opened if call[1].startswith(("Image.new", "Image.fromarray", "Image.alpha"))}
    assert {call for call in opened - harmless if call[0] != DOOR} == set(OPENS_ITSELF)


def test_no_backend_is_asked_for_by_name_outside_its_folder() -> None:
    """What a backend needs, its facts say; ONNX Runtime alone serves as a tool, to try 8-bit graphs."""
    names = "|".join(re.escape(name) for name in BACKENDS if name != "onnxruntime")
    pattern = re.compile(rf"""(==|!=|\bin\b)\s*[\[("']*({names})["']""")
    found = [
        f"{path.relative_to(PACKAGE)}: {line.strip()}"
        for path in FILES
        if not any(folder in path.parts for folder in FOLDERS_OF_BACKENDS)
        for line in path.read_text(encoding="utf-8").splitlines()
        if pattern.search(line)
    ]
    assert found == []


def test_no_rule_of_step_caching_is_named_outside_its_file_and_the_table() -> None:
    """What a rule needs and decides, it is asked; `tests/runtime/test_step_cache_added.py` adds one."""
    of_all = {f"runtime.step_cache.{name}" for name in ("base", "policy", "fit", "ready")}
    users = {
        str(path.relative_to(PACKAGE))
        for path in FILES
        for name in own_imports(path)
        if name.startswith("runtime.step_cache.") and name not in of_all
    }
    assert users == {"runtime/step_cache/__init__.py"}


def test_files_and_functions_are_short() -> None:
    """350 lines a file and 60 a function; options of a command count, as they are its interface."""
    long = [f"{path.relative_to(PACKAGE)}: {lines}" for path in FILES if (lines := lines_of(path)) > 350]
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
                length = node.end_lineno - node.lineno + 1
                if length > 60:
                    long.append(f"{path.relative_to(PACKAGE)}: {node.name} has {length} lines")
    assert long == []


def lines_of(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


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
        if room_of(path) not in ("models", "checkpoints")
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


# Calls that make, change or remove files; `open` counts where its mode says so.
WRITERS = re.compile(
    r"(.*\.)?(write_text|write_bytes|savez|savez_compressed|savefig|save_file|save|touch|unlink|rename|rmdir|mkstemp|"
    r"NamedTemporaryFile|symlink_to|hardlink_to|rmtree|copytree|copyfile|truncate)|"
    r"shutil\.(copy|copy2|move)|os\.(replace|remove|open|link|symlink)"
)
OWN_PLACES = {
    "atomic_write",
    "private_folder",
    "staged",
    "TemporaryDirectory",
}  # in whose `with` anything may be written
# Everything else that writes: what is given a folder from one of OWN_PLACES, and what builds do under their lock.
WRITES_IN_A_PRIVATE_FOLDER = {
    *("backends/openvino/build.py", "backends/tensorrt/build.py", "backends/torch_tensorrt/build.py"),
    *("compiler/stages.py", "compiler/decoder.py", "graphs/quantize.py", "verify/bisect.py", "bundle/store.py"),
}
NAMES_NO_FILE_OF_A_USER = {
    "cli/streams.py: os.open(os.devnull, os.O_WRONLY)",
    "bundle/readers.py: os.open(path, flags)",  # which reads
    "calibrate/solver_state.py: (folder / NAME).unlink(missing_ok=True)",  # its own
    "bundle/trust.py: os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, PRIVATE)",  # the list in the state folder
}
OWN_WRITERS = {"trainer.save", "write_text", "write_bytes", "append_text"}  # which use bundle.atomic themselves


def test_whatever_names_a_file_it_is_written_by_the_one_writer() -> None:
    """`bundle.atomic` knows devices, links, modes and full disks; nobody else needs to."""
    found = {
        f"{path.relative_to(PACKAGE)}: {call}"
        for path in FILES
        if str(path.relative_to(PACKAGE)) not in {"bundle/atomic.py", *WRITES_IN_A_PRIVATE_FOLDER}
        for call in writing_calls(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert found == NAMES_NO_FILE_OF_A_USER


def test_what_is_not_written_by_the_one_writer_is_found() -> None:
    bad = ["p.write_text('x')", "np.savez(p, x=1)", "open(p, 'w')", "p.open('ab')", "a.replace(b)", "shutil.move(a, b)"]
    good = ["open(p)", "p.open('rb')", "text.replace('a', 'b')", "replace(spec, a=1)", "array.copy()"]
    inside = "with atomic_write(p) as t, t.open('wb') as f:\n    np.savez(f, x=1)"
    assert [list(writing_calls(ast.parse(line))) for line in bad] == [[line] for line in bad]
    assert [list(writing_calls(ast.parse(line))) for line in (*good, inside)] == [[]] * (len(good) + 1)


def writing_calls(node: ast.AST) -> Iterator[str]:
    """Calls that write outside of OWN_PLACES."""
    if isinstance(node, ast.With) and any(_name_of(item.context_expr) in OWN_PLACES for item in node.items):
        return
    if isinstance(node, ast.Call) and _writes(node):
        yield ast.unparse(node)
    for child in ast.iter_child_nodes(node):
        yield from writing_calls(child)


def _name_of(node: ast.AST) -> str:
    return ast.unparse(node.func).rpartition(".")[2] if isinstance(node, ast.Call) else ""


def _writes(call: ast.Call) -> bool:
    name = ast.unparse(call.func)
    if name in OWN_WRITERS:
        return False
    if name == "open" or name.endswith(".open"):
        words = [
            str(word.value)
            for word in (*call.args, *(k.value for k in call.keywords))
            if isinstance(word, ast.Constant)
        ]
        return name == "os.open" or any(re.fullmatch(r"[rbtwax+]+", word) and set(word) & set("wax+") for word in words)
    if name.endswith(".replace"):
        return len(call.args) == 1 and not call.keywords
    return bool(WRITERS.fullmatch(name))


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
    "polygraphy",
    "optuna",
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


HELP_OF = """
import contextlib, io
from elit_export.cli import main
with contextlib.redirect_stdout(io.StringIO()) as said:
    for command in {commands}:
        assert main([*command.split(), "--help"], standalone_mode=False) == 0
assert said.getvalue().count("Usage: ") == len({commands})
"""
# The types of `sample` are still those of the pipeline, which it imports at once.
LIGHT_COMMANDS = sorted({*COMMANDS} - {"sample"})


@pytest.mark.parametrize(
    ("code", "unloaded"),
    [
        ("from elit_export import Pipeline", ("click", "rich", "filelock")),
        (HELP_OF.format(commands=[""]), ("numpy", "PIL", "pydantic", "rich", "filelock")),
        (HELP_OF.format(commands=LIGHT_COMMANDS), ("PIL", "pydantic", "filelock")),
    ],
    ids=["sampling", "help", "help of commands"],
)
def test_starting_loads_little(code: str, unloaded: tuple[str, ...]) -> None:
    """What a start does not need. Commands of `bench` and `calibrate` are in the files of their groups."""
    assert modules_after(code).isdisjoint((*HEAVY, *unloaded))


def test_every_module_has_a_docstring_and_packages_have_cards() -> None:
    docstrings = {path: ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) for path in FILES}
    silent = {path for path, docstring in docstrings.items() if not docstring}
    assert silent == set((PACKAGE / "backends").glob("*/__init__.py"))
    rooms = [PACKAGE / room / "__init__.py" for room in ROOMS if (PACKAGE / room).is_dir()]
    assert [path for path in rooms if "May touch:" not in str(docstrings[path])] == []


def test_the_tree_in_the_docs_names_every_file_of_the_package() -> None:
    tree = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("<!-- tree -->")[1]
    assert tree.strip() == f"```\n{package_tree()}\n```"


def package_tree() -> str:
    """Every file with the first line of its docstring; `python -m tests.test_architecture` prints it."""
    lines = []
    for folder in [PACKAGE, *sorted(path for path in PACKAGE.rglob("*") if path.is_dir())]:
        if "__pycache__" in folder.parts:
            continue
        own = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in SUFFIXES)
        name = folder.relative_to(PACKAGE)
        lines.append(f"{'elit_export' if folder == PACKAGE else name}/{_said(folder / '__init__.py')}")
        lines += [f"    {path.name}{_said(path)}" for path in own if path.name != "__init__.py"]
    return "\n".join(lines)


SUFFIXES = (".py", ".safetensors", ".md")


def _said(path: Path) -> str:
    if path.suffix != ".py" or not path.is_file():
        return ""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    first = " ".join(docstring.split("\n\n")[0].split())
    return f"  — {first}" if first else ""


if __name__ == "__main__":
    sys.stdout.write(f"{package_tree()}\n")

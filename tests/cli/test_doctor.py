"""Findings about a machine on which something is broken: in a child, with stand-ins put before the real libraries."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from elit_export.backends import BACKENDS
from elit_export.cli.tools import TOOLS
from elit_export.errors import BackendUnavailable, pip_install

ROOT = Path(__file__).parent.parent.parent
NO_LIBRARY = "libgone.so.1: cannot open shared object file: No such file or directory"


def doctor(folder: Path, *options: str, modules: Mapping[str, str]) -> list[str]:
    """Write modules of these contents, which hide the installed ones, and give the command that then asks doctor."""
    for name, content in modules.items():
        (folder / f"{name}.py").write_text(content)
    return [sys.executable, "-m", "elit_export", "doctor", *options]


def beside(folder: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "COLUMNS": "80"}


def said_beside(folder: Path, *options: str, modules: Mapping[str, str]) -> str:
    command = doctor(folder, *options, modules=modules)
    done = subprocess.run(command, env=beside(folder), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def findings_beside(folder: Path, **modules: str) -> dict[str, Any]:
    """What doctor says, by name, where modules of these contents hide the installed ones."""
    return {finding["what"]: finding for finding in json.loads(said_beside(folder, "--json", "-", modules=modules))}


def test_what_is_installed_but_broken_is_a_finding_and_the_rest_is_still_found(tmp_path: Path) -> None:
    broken = f"raise ImportError({NO_LIBRARY!r})"
    found = findings_beside(
        tmp_path,
        onnxruntime=broken,
        onnx_ir=broken,
        matplotlib="import os; os.abort()",
        onnxscript="import no_such_module",
    )
    backend = found["backend onnxruntime"]
    assert backend["problem"] == f"backend onnxruntime: onnxruntime is installed but broken, {NO_LIBRARY}"
    assert backend["remedy"] == pip_install("onnxruntime", "--force-reinstall")
    assert found["onnx_ir"]["problem"] == f"installed but broken: ImportError: {NO_LIBRARY}"
    assert found["onnx_ir"]["remedy"] == pip_install("export", "--force-reinstall")
    assert found["matplotlib"]["problem"] == "installed but broken: the process ended with status -6"
    assert "No module named 'no_such_module'" in found["onnxscript"]["problem"]
    assert found["torch"]["works"]
    assert found["safetensors"]["works"]


ALL_QUICK = dict.fromkeys(TOOLS, "")


def test_a_line_is_printed_before_a_slow_tool_is_done(tmp_path: Path) -> None:
    """The slow one is the first in the table, so that nothing behind it is printed before it."""
    gate, first = tmp_path / "gate", next(iter(TOOLS))
    command = doctor(tmp_path, modules={**ALL_QUICK, first: WAITS.format(path=str(gate))})
    with subprocess.Popen(command, env=beside(tmp_path), stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout
        before = child.stdout.readline()
        gate.touch()
        after = child.stdout.read()
    assert child.returncode == 0
    assert "backend onnxruntime" in before
    tools = [line.split()[1] for line in after.splitlines() if line.split()[1] in TOOLS]
    assert tools == list(TOOLS)
    assert f"works  {first}" in after


WAITS = """
import pathlib, time
until = time.monotonic() + 60
while not pathlib.Path({path!r}).exists():
    assert time.monotonic() < until, "waited in vain"
    time.sleep(0.02)
"""


def test_two_tools_are_asked_at_once(tmp_path: Path) -> None:
    """The first waits for the second."""
    gate, (first, second, *_) = str(tmp_path / "gate"), TOOLS
    modules = {first: WAITS.format(path=gate), second: f"import pathlib; pathlib.Path({gate!r}).touch()"}
    assert findings_beside(tmp_path, **{**ALL_QUICK, **modules})[first]["works"]


def test_quick_tells_versions_and_loads_nothing(tmp_path: Path) -> None:
    libraries = [*TOOLS, *(backend.library for backend in BACKENDS.values())]
    said = said_beside(tmp_path, "--quick", modules=dict.fromkeys(libraries, "import os; os.abort()"))
    assert f"found  torch                   {version('torch')}, for export, build, train" in said
    assert "found  backend torch-tensorrt  unknown version, for cuda" in said
    assert "works" not in said


def test_remedies_are_whole_on_lines_of_their_own(tmp_path: Path) -> None:
    """To be copied, however narrow the terminal is."""
    broken = f"raise ImportError({NO_LIBRARY * 3!r})"
    facts = tmp_path / "facts.json"
    lines = said_beside(tmp_path, "--json", str(facts), modules=dict.fromkeys(TOOLS, broken)).splitlines()
    remedies = [finding["remedy"] for finding in json.loads(facts.read_text()) if not finding["works"]]
    assert len(remedies) >= len(TOOLS)
    assert [line.strip() for line in lines if line.startswith(" ")] == remedies
    assert f"no     torch                   {version('torch')}, for export, build, train: installed" in "\n".join(lines)


@pytest.mark.parametrize(
    "error", ["ImportError('no symbol')", "OSError('no symbol')", "AttributeError('no symbol\\nand more')"]
)
def test_a_broken_library_makes_its_backend_unavailable_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str
) -> None:
    (tmp_path / "onnxruntime.py").write_text(f"raise {error}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    with pytest.raises(BackendUnavailable, match=r"is installed but broken, no symbol; pip install --force-reinstall"):
        BACKENDS["onnxruntime"].loader()


def test_a_missing_library_makes_its_backend_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendUnavailable, match=r"needs onnxruntime; pip install -e '.*\[onnxruntime\]'"):
        BACKENDS["onnxruntime"].loader()


def libraries(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=\[]", requirement)[0].replace("-", "_") for requirement in requirements}


def test_the_tools_are_the_libraries_of_the_extras() -> None:
    """What every command needs comes with the package itself."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extra in ("export", "report"):
        assert {library for library, tool in TOOLS.items() if tool.extra == extra} == libraries(
            project["optional-dependencies"][extra]
        )
    assert libraries(project["dependencies"]).isdisjoint(TOOLS)
    assert "filelock" in libraries(project["dependencies"])  # `verify` records a success under the bundle's lock

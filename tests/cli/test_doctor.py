"""Findings about a machine on which something is broken: in a child, with stand-ins put before the real libraries."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from elit_export.backends import BACKENDS
from elit_export.cli.tools import TOOLS
from elit_export.errors import BackendUnavailable

ROOT = Path(__file__).parent.parent.parent
NO_LIBRARY = "libgone.so.1: cannot open shared object file: No such file or directory"


def findings_beside(folder: Path, **modules: str) -> dict[str, Any]:
    """What doctor says, by name, where modules of these contents hide the installed ones."""
    for name, content in modules.items():
        (folder / f"{name}.py").write_text(content)
    done = subprocess.run(
        [sys.executable, "-m", "elit_export", "doctor", "--json", "-"],
        env={**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return {finding["what"]: finding for finding in json.loads(done.stdout)}


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
    assert backend["remedy"] == "pip install --force-reinstall 'elit-export[onnxruntime]'"
    assert found["onnx_ir"]["problem"] == f"installed but broken: ImportError: {NO_LIBRARY}"
    assert found["onnx_ir"]["remedy"] == "pip install --force-reinstall 'elit-export[export]'"
    assert found["matplotlib"]["problem"] == "installed but broken: the process ended with status -6"
    assert "No module named 'no_such_module'" in found["onnxscript"]["problem"]
    assert found["torch"]["works"]
    assert found["safetensors"]["works"]


@pytest.mark.parametrize(
    "error", ["ImportError('no symbol')", "OSError('no symbol')", "AttributeError('no symbol\\nand more')"]
)
def test_a_broken_library_makes_its_backend_unavailable_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str
) -> None:
    (tmp_path / "onnxruntime.py").write_text(f"raise {error}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    with pytest.raises(BackendUnavailable, match=r"is installed but broken, no symbol: pip install --force-reinstall"):
        BACKENDS["onnxruntime"].loader()


def test_a_missing_library_makes_its_backend_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendUnavailable, match=r"needs onnxruntime: pip install 'elit-export\[onnxruntime\]'"):
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

"""What works on this machine, what does not, why, and what to type.

Takes: nothing.  Gives: Findings.  May touch: nothing; loads the backends that are installed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from elit_export.backends import BACKENDS, Backend
from elit_export.errors import BackendUnavailable

# What commands beside sampling need: library → (used for, extra).
TOOLS = {
    "torch": ("export, build, train", "export"),
    "onnx": ("export, build", "export"),
    "onnxscript": ("export, build", "export"),
    "safetensors": ("checkpoints", "export"),
    "filelock": ("build", "export"),
    "matplotlib": ("plots", "report"),
}


@dataclass(frozen=True)
class Finding:
    """One thing that works, or `problem` and the `remedy` to type."""

    what: str
    detail: str
    problem: str = ""
    remedy: str = ""

    @property
    def works(self) -> bool:
        return not self.problem


def findings() -> Iterator[Finding]:
    """Backends with each of their devices first, then the tools."""
    for backend in BACKENDS.values():
        yield from _backend_findings(backend)
    for library, (used_for, extra) in TOOLS.items():
        yield _tool_finding(library, used_for, extra)


def _backend_findings(backend: Backend) -> Iterator[Finding]:
    try:
        version_here = backend.library_version()
    except BackendUnavailable as error:
        problem, _, remedy = str(error).partition(": ")
        yield Finding(f"backend {backend.name}", ", ".join(backend.devices), problem, remedy)
        return
    for device in backend.devices:
        problem, remedy = backend.device_problem(device)
        yield Finding(f"backend {backend.name}", f"{device}, {version_here}", problem, remedy)


def _tool_finding(library: str, used_for: str, extra: str) -> Finding:
    if find_spec(library) is None:
        return Finding(library, f"for {used_for}", "not installed", f"pip install 'elit-export[{extra}]'")
    try:
        return Finding(library, f"{version(library)}, for {used_for}")
    except PackageNotFoundError:
        return Finding(library, f"for {used_for}")

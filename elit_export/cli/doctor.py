"""What works on this machine, what does not, why, and what to type.

Backends that are installed are loaded here, each tool in a process of its own, so that a broken one brings nothing
else down.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import click

from elit_export.backends import BACKENDS, Backend
from elit_export.cli.common import JSON_OPTION, show, write_json
from elit_export.cli.tables.inspect import table
from elit_export.cli.tools import TOOLS, Tool
from elit_export.errors import BackendUnavailable

IMPORT_SECONDS = 120  # of one tool; torch takes two on an idle machine


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
    for library, tool in TOOLS.items():
        yield _tool_finding(library, tool)


def _backend_findings(backend: Backend) -> Iterator[Finding]:
    try:
        loader = backend.loader()
        version_here = loader.library_version()
    except BackendUnavailable as error:
        problem, _, remedy = str(error).rpartition(": ")
        yield Finding(f"backend {backend.name}", ", ".join(backend.devices), problem, remedy)
        return
    for device in backend.devices:
        problem, remedy = loader.device_problem(device)
        yield Finding(f"backend {backend.name}", f"{device}, {version_here}", problem, remedy)


def _tool_finding(library: str, tool: Tool) -> Finding:
    install, use = f"'elit-export[{tool.extra}]'", f"for {tool.used_for}"
    if find_spec(library) is None:
        return Finding(library, use, "not installed", f"pip install {install}")
    try:
        use = f"{version(tool.package or library)}, {use}"
    except PackageNotFoundError:
        use = f"unknown version, {use}"
    problem = _import_problem(library)
    return Finding(library, use, problem, f"pip install --force-reinstall {install}" if problem else "")


def _import_problem(library: str) -> str:
    """Why a library does not import, or nothing."""
    command = [sys.executable, "-P", "-c", f"import {library}"]  # -P: a file of that name in this folder is not it
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=IMPORT_SECONDS)
    except subprocess.TimeoutExpired:
        return f"installed but broken: not imported within {IMPORT_SECONDS} s"
    if not done.returncode:
        return ""
    last = (done.stderr.strip().splitlines() or [f"the process ended with status {done.returncode}"])[-1]
    return f"installed but broken: {last}"


# ---------------------------------------------------------------- the command


@click.command()
@JSON_OPTION
def doctor(json_to: str | None) -> None:
    """Show which backends and tools work on this machine, which do not, why, and what to type."""

    found = list(findings())
    rows = [(f.what, f.detail, "works" if f.works else f.problem, f.remedy) for f in found]
    show(table("this machine", ("what", "detail", "state", "what to do"), rows), json_to=json_to)
    write_json([asdict(finding) | {"works": finding.works} for finding in found], json_to)

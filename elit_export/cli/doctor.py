"""What works on this machine, what does not, why, and what to type.

Backends that are installed are loaded here, each tool in a process of its own, so that a broken one brings nothing
else down. With `--quick` nothing is loaded.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from typing import TYPE_CHECKING

import click

from elit_export.cli.common import JSON_OPTION, say, write_json
from elit_export.cli.tools import TOOLS, Tool
from elit_export.errors import BackendUnavailable, pip_install

if TYPE_CHECKING:
    from elit_export.backends import Backend

IMPORT_SECONDS = 120  # of one tool; torch takes two on an idle machine
TOOLS_AT_ONCE = 2  # each keeps a core busy and may hold a gigabyte


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

    def lines(self, good: str) -> list[str]:
        """A line that begins with `good` or `no`, and the remedy whole on a line of its own."""
        state, problem = ("no", f": {self.problem}") if self.problem else (good, "")
        remedy = [f"{'':<7}{self.remedy}"] if self.remedy else []
        return [f"{state:<7}{self.what:<24}{self.detail}{problem}", *remedy]


# ---------------------------------------------------------------- what works


def working() -> Iterator[Finding]:
    """Backends with each of their devices first, then the tools; each as soon as it and those before it are known."""
    from elit_export.backends import BACKENDS

    for backend in BACKENDS.values():
        yield from _backend_findings(backend)
    with ThreadPoolExecutor(TOOLS_AT_ONCE) as pool:
        yield from pool.map(_tool_finding, TOOLS, TOOLS.values())


def _backend_findings(backend: Backend) -> Iterator[Finding]:
    try:
        loader = backend.loader()
        version_here = loader.library_version()
    except BackendUnavailable as error:
        yield Finding(f"backend {backend.name}", ", ".join(backend.devices), error.problem, error.remedy)
        return
    for device in backend.devices:
        problem, remedy = loader.device_problem(device)
        yield Finding(f"backend {backend.name}", f"{device}, {version_here}", problem, remedy)


def _tool_finding(library: str, tool: Tool) -> Finding:
    finding = _installed(library, (library,), tool.used_for, tool.extra)
    if not finding.problem and (problem := _import_problem(library)):
        return replace(finding, problem=problem, remedy=pip_install(tool.extra, "--force-reinstall"))
    return finding


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


# ---------------------------------------------------------------- what is installed


def installed() -> Iterator[Finding]:
    """Yield a finding for each backend and tool from its version alone; no library is loaded, broken ones pass."""
    from elit_export.backends import BACKENDS

    for backend in BACKENDS.values():
        libraries, devices = (backend.library, *backend.needs), ", ".join(backend.devices)
        yield _installed(f"backend {backend.name}", libraries, devices, backend.extra)
    for library, tool in TOOLS.items():
        yield _installed(library, (library,), tool.used_for, tool.extra)


def _installed(what: str, libraries: Sequence[str], used_for: str, extra: str) -> Finding:
    """The version of the first library, or that one of them is missing."""
    for library in libraries:
        if find_spec(library.partition(".")[0]) is None:
            return Finding(what, f"for {used_for}", f"{library} is not installed", pip_install(extra))
    return Finding(what, f"{_version_of(libraries[0])}, for {used_for}")


def _version_of(library: str) -> str:
    """That of the package which brings the library, whatever its name for pip."""
    packages = _packages().get(library)
    return version(packages[0]) if packages else "unknown version"


@cache
def _packages() -> Mapping[str, Sequence[str]]:
    """Library → packages. Reads the list of files of every package that is installed."""
    return packages_distributions()


# ---------------------------------------------------------------- the command


@click.command()
@click.option("--quick", is_flag=True, help="Versions alone, at once: nothing is loaded, so nothing broken is found.")
@JSON_OPTION
def doctor(quick: bool, json_to: str | None) -> None:
    """Show which backends and tools work on this machine, which do not, why, and what to type."""
    facts = []
    for finding in installed() if quick else working():
        for line in finding.lines(good="found" if quick else "works"):
            say(line, json_to=json_to)
        facts.append(asdict(finding) | ({} if quick else {"works": finding.works}))
    write_json(facts, json_to)

"""Every error a user can cause or meet.

ElitExportError
├── CheckpointError      a weights file cannot be read or does not describe a model
├── RecipeError          a recipe is wrong; the message names the key
├── ExportError          a model does not become a sound graph
├── BuildError           a graph does not become a plan
├── BundleError          what lies on disk is missing, altered or of another version
├── BackendUnavailable   a backend, provider or device is not there
├── EngineError          an engine failed or gave numbers that are not finite
├── ParityError          an engine misses its tolerance
├── CalibrationError     a calibration cannot be made or does not fit
└── InputError           an argument is wrong (also a ValueError)

Messages say what is wrong in the user's own words and numbers, then what to do about it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

CHECKOUT = Path(__file__).parent.parent  # of the package's sources, where there is a pyproject.toml


class ElitExportError(Exception):
    """Base of all errors below; the command line turns it into exit status 2.

    `problem` says what is wrong, `remedy` what to type or do; where an error has no remedy of its own, `problem` is the
    whole message.
    """

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(f"{problem}; {remedy}" if remedy else problem)
        self.problem, self.remedy = problem, remedy


class CheckpointError(ElitExportError):
    """A weights file cannot be read or does not describe a model."""


class RecipeError(ElitExportError):
    """A recipe is wrong; the message names the key."""


class ExportError(ElitExportError):
    """A model does not become a sound graph."""


class BuildError(ElitExportError):
    """A graph does not become a plan."""


class BundleError(ElitExportError):
    """What lies on disk is missing, altered or of another version."""


class BackendUnavailable(ElitExportError):
    """A backend, provider or device is not there."""


class EngineError(ElitExportError):
    """An engine failed or gave numbers that are not finite."""


class ParityError(ElitExportError):
    """An engine misses its tolerance."""


class CalibrationError(ElitExportError):
    """A calibration cannot be made or does not fit."""


class InputError(ElitExportError, ValueError):
    """An argument is wrong."""


def pip_install(extra: str, *options: str) -> str:
    """Return the command that installs an extra of this package, from its checkout or else from the registry."""
    package = "elit-export"
    if (CHECKOUT / "pyproject.toml").is_file():
        package = "." if Path().samefile(CHECKOUT) else str(CHECKOUT)
        options = (*options, "-e")  # so that it goes on running from there
    return " ".join(["pip install", *options, f"'{package}[{extra}]'"])


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The known name that is meant by another one, as a question; empty where none is near."""
    names = list(known)
    beginning = [candidate for candidate in names if name and candidate.startswith(name)]
    near = beginning or difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]!r}?" if near else ""


def summary(error: BaseException, *, lines: int = 1, last: bool = False) -> str:
    """The first `lines` of another library's error as one line; with `last`, its last ones.

    Two lines where the second names the weights of another shape; the last where a library first says where it failed,
    and then why.
    """
    text = str(error).strip().splitlines() or [type(error).__name__]
    part = text[-lines:] if last else text[:lines]
    return " ".join(line.strip() for line in part).rstrip(".")

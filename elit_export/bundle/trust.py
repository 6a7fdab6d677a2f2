"""Which saved programs may be opened: what this user built here, by its hashes in a list of the user's own.

The hashes of a manifest protect from damage, not from intent: whoever alters a bundle writes new ones. The list lies
outside of every bundle, and nobody else may write into it.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from elit_export.bundle.artifacts import Artifact
from elit_export.bundle.readers import CONFIG_BYTES, open_regular
from elit_export.errors import BundleError

PRIVATE = 0o600


def trusted_list() -> Path:
    """The file that `build` keeps in the user's state folder: a SHA-256 a line."""
    state = Path(os.environ.get("XDG_STATE_HOME", ""))
    folder = state if state.is_absolute() else Path.home() / ".local" / "state"
    return folder / "elit_export" / "trusted.txt"


def remember(artifact: Artifact) -> None:
    """Note that this user built the files of an artifact here."""
    known, path = _trusted(), trusted_list()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, PRIVATE)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:  # one write: builds at the same time lose no line
        file.write("".join(f"{sha256}\n" for sha256 in sorted(_hashes(artifact) - known)))


def check_trusted(folder: Path, artifact: Artifact, *, trust: bool) -> None:
    """Raise BundleError for a saved program that was not built here, unless it is trusted by `trust`.

    Its hashes are those of the manifest, so its files must have been verified. `folder` is the bundle.
    """
    if not trust and not _hashes(artifact) <= _trusted():
        raise BundleError(
            f"{folder / artifact.kind / artifact.name}: a saved program, which can run any code when it is opened, "
            f"and this user did not build it here",
            "build it again here, or if you trust whoever built it: --trust (in Python: trust=True)",
        )


def _hashes(artifact: Artifact) -> set[str]:
    return {facts.sha256 for facts in artifact.files.values()}


def _trusted() -> set[str]:
    """The hashes of the list, none where there is no list; raises BundleError if others may write into it."""
    path = trusted_list()
    try:
        with open_regular(path, what="a list of hashes", error=BundleError, limit_bytes=CONFIG_BYTES) as file:
            _check_private(path, os.fstat(file.fileno()))
            return set(file.read(CONFIG_BYTES).decode("ascii", errors="replace").split())
    except FileNotFoundError:
        return set()


def _check_private(path: Path, status: os.stat_result) -> None:
    if os.name != "posix":  # elsewhere these bits say nothing
        return
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise BundleError(f"{path}: others may write into this list of trusted files", f"delete it: rm {path}")

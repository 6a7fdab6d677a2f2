"""What a backend's build module gives for each plan it writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from elit_export.spec import Profile


@dataclass(frozen=True)
class BuiltPlan:
    """A folder that holds one plan (`file` in it), and the profiles it serves."""

    folder: Path
    file: str
    profiles: tuple[Profile, ...]
    versions: dict[str, str]
    built_on: dict[str, str]

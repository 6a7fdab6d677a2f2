"""What a backend's build module gives for each plan it writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

OnShare = Callable[[float], None]  # hears the share of one plan's build that is done, 0 to 1


@dataclass(frozen=True)
class BuiltPlan:
    """The folder it was given now holds one plan; `file` in it is what an engine opens.

    `label` says in the plan's name what distinguishes it: profile, library, device.
    """

    file: str
    label: str
    versions: dict[str, str]
    built_on: dict[str, str]

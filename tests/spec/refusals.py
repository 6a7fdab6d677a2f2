"""Many refusals in one test, where a failure still names every case that went wrong."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from elit_export.errors import InputError


def wrong_refusals(work: Callable[[Any], object], cases: Iterable[tuple[Any, str]]) -> dict[str, str]:
    """The cases (value, pattern) that `work` does not refuse with an InputError that matches; and what it said."""
    wrong = {}
    for value, told in cases:
        try:
            work(value)
        except InputError as error:
            if not re.search(told, str(error)):
                wrong[repr(value)] = f"refused, but not as {told!r}: {error}"
        except Exception as error:  # whatever else it is, the case must be named
            wrong[repr(value)] = f"no InputError: {error!r}"
        else:
            wrong[repr(value)] = "not refused"
    return wrong

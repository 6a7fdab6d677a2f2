"""Version strings as numbers."""

from __future__ import annotations

import re


def version_numbers(version: str, parts: int = 3) -> tuple[int, ...]:
    """Return the leading numbers of a version: `1.24.4+cu12` → (1, 24, 4), up to the first part without one."""
    numbers = []
    for part in version.split(".")[:parts]:
        match = re.match("[0-9]{1,9}", part)
        if not match:
            break
        numbers.append(int(match[0]))
    return tuple(numbers)

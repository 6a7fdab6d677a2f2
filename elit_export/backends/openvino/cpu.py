"""The instruction sets of this machine's processor."""

from __future__ import annotations

import platform
import re
from pathlib import Path

CPU_FACTS = Path("/proc/cpuinfo")  # Linux
ARITHMETIC = re.compile(r"(avx|amx|sse4|fma|f16c|asimd|sve|sme|i8mm|bf16).*")


def cpu_features() -> str:
    """Return the instruction sets for arithmetic, sorted, or the kind of processor if the system does not list them."""
    text = CPU_FACTS.read_text(encoding="utf-8") if CPU_FACTS.exists() else ""
    listed = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    names = sorted(name for name in listed[1].split() if ARITHMETIC.fullmatch(name)) if listed else []
    return " ".join(names) or platform.machine()

"""What this machine's processor can do, as its system tells."""

from __future__ import annotations

import platform
import re
from pathlib import Path

CPU_FACTS = Path("/proc/cpuinfo")  # Linux
ARITHMETIC = re.compile(r"(avx|amx|sse4|fma|f16c|asimd|sve|sme|i8mm|bf16).*")


def cpu_features() -> str:
    """The instruction sets for arithmetic, sorted; the kind of processor where the system does not list them."""
    text = CPU_FACTS.read_text(encoding="utf-8") if CPU_FACTS.exists() else ""
    listed = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    names = sorted(name for name in listed[1].split() if ARITHMETIC.fullmatch(name)) if listed else []
    return " ".join(names) or platform.machine()

"""What a processor can do, from texts as its system gives them."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from elit_export.backends.openvino import cpu

X86 = """processor\t: 0
vendor_id\t: GenuineIntel
flags\t\t: fpu vme sse sse2 ssse3 sse4_1 sse4_2 fma avx f16c avx2 avx512f avx512_bf16 amx_tile amx_int8 avx_vnni ht
bugs\t\t: spectre_v1
processor\t: 1
flags\t\t: fpu avx
"""
ARM = """processor\t: 0
Features\t: fp asimd evtstrm aes sve asimddp i8mm bf16 sme crc32
CPU part\t: 0xd40
"""


@pytest.mark.parametrize(
    ("text", "features"),
    [
        (X86, "amx_int8 amx_tile avx avx2 avx512_bf16 avx512f avx_vnni f16c fma sse4_1 sse4_2"),
        (ARM, "asimd asimddp bf16 i8mm sme sve"),
        ("flags : avx2 avx\n", "avx avx2"),
    ],
)
def test_instruction_sets_for_arithmetic_are_named_in_order(
    text: str, features: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(cpu, "CPU_FACTS", tmp_path / "cpuinfo")
    assert cpu.cpu_features() == features


@pytest.mark.parametrize("text", [None, "", "flags\t: fpu ht\n", "processor : 0\nmodel name : avx2 perhaps\n"])
def test_where_none_are_listed_it_is_the_kind_of_processor(
    text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(cpu, "CPU_FACTS", tmp_path / "cpuinfo")
    assert cpu.cpu_features() == platform.machine()

"""A rule of step caching is added by one file and one row: done here to a copy of the package, by its command line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from elit_export.bundle.reading import Bundle
from tests.test_architecture import PACKAGE

IMPORTS = """
from dataclasses import dataclass
from elit_export.runtime.step_cache.base import Rule, threshold_of
"""
FIXED = """
@dataclass(frozen=True)
class Added(Rule):
    count: int

    @classmethod
    def parse(cls, text):
        return cls(int(text.value)) if text.value.isdecimal() else None

    def due(self, steps, time_changes):
        return lambda step, last: step < self.count

    def __str__(self):
        return f"static:early@{self.count}"
"""
MEASURED = """
@dataclass(frozen=True)
class Added(Rule):
    needs = frozenset({"reuse", "probe"})

    threshold: float

    @classmethod
    def parse(cls, text):
        return cls(threshold_of(text))

    def due(self, steps, time_changes):
        return lambda step, last: False

    def is_reached(self, accumulated):
        return bool(accumulated.sum() >= self.threshold)

    def __str__(self):
        return f"distance:{self.threshold}"
"""


def with_rule(folder: Path, source: str, row: str) -> Path:
    """A folder with a copy of the package that has one rule more."""
    shutil.copytree(PACKAGE, folder / "elit_export", ignore=shutil.ignore_patterns("__pycache__", "assets"))
    rules = folder / "elit_export" / "runtime" / "step_cache"
    (rules / "added.py").write_text(f"{IMPORTS}{source}")
    table = (rules / "__init__.py").read_text(encoding="utf-8")
    assert "\nFORMS = (\n" in table
    row_too = f"\nfrom elit_export.runtime.step_cache.added import Added\nFORMS = (\n    {row},\n"
    (rules / "__init__.py").write_text(table.replace("\nFORMS = (\n", row_too), encoding="utf-8")
    return folder


def sample(package: Path, bundle: Path, cache: str) -> subprocess.CompletedProcess[str]:
    """Eight steps of Euler's method by the command line of the copy."""
    choices = ["--labels", "0,1", "--steps", "8", "--sampler", "euler", "--out", str(package / "samples.png")]
    command = [sys.executable, "-m", "elit_export", "sample", str(bundle), "--cache", cache, *choices]
    environment = {**os.environ, "PYTHONPATH": str(package), "COLUMNS": "1000"}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=package, env=environment)


@pytest.mark.parametrize(
    ("source", "row", "summaries"),
    [
        (
            FIXED,
            'Form("static:early@", "N", Added.parse)',
            {
                "static:early@3": "4 of 8 calls reused after 0 probes; computed: 4 fixed before sampling",
                "static:early@3,max_skip=2": "3 of 8 calls reused after 0 probes",
                "static:every@2": "3 of 8 calls reused after 0 probes",
            },
        ),
        (
            MEASURED,
            'Form("distance:", "THRESHOLD", Added.parse)',
            {
                "distance:0": "0 of 8 calls reused after 7 probes; computed: 2 fixed before sampling, 6 threshold",
                "distance:1e9,max_skip=9": "6 of 8 calls reused after 7 probes; computed: 2 fixed before sampling",
            },
        ),
    ],
    ids=["fixed before sampling", "measured without a calibration"],
)
def test_a_rule_is_added_by_a_file_and_a_row(
    tiny_bundle: Bundle, tmp_path: Path, source: str, row: str, summaries: dict[str, str]
) -> None:
    package = with_rule(tmp_path, source, row)
    for cache, summary in summaries.items():
        sampled = sample(package, tiny_bundle.folder, cache)
        assert f"cache {cache}: {summary}" in sampled.stdout, sampled.stdout + sampled.stderr
    refused = sample(package, tiny_bundle.folder, "other")
    assert refused.returncode == 2
    assert row.split('"')[1] in refused.stderr

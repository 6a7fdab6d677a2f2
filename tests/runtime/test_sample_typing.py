"""Type checkers know the arguments of `Pipeline.sample`, `steps` and `request`, `labels` by position and by name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

api = pytest.importorskip("mypy.api", reason="needs mypy")
ROOT = Path(__file__).parents[2]
HEAD = """
from elit_export import Pipeline, Sample, StepRecord

def sampled(pipeline: Pipeline) -> None:
    sample: Sample
    record: StepRecord
"""
ACCEPTED = [
    'sample = pipeline.sample([0, "boot"], steps=3, on_step=print)',
    'sample = pipeline.sample(labels=[1], schedule="full", guidance_interval=(0.2, 0.8))',
    'sample = pipeline.sample([1], preset="fast", seed=3)',
    "record = next(pipeline.steps([1]))",
    'record = next(pipeline.steps(labels=[1], cache="none"))',
    "sample = pipeline.run(pipeline.request(labels=[1]))",
]
REFUSED = [
    ("sample = pipeline.sample([1], stepz=3)", "call-arg"),
    ('sample = pipeline.sample([1], steps="three")', "arg-type"),
    ("sample = pipeline.sample(steps=3)", "call-arg"),
    ("sample = pipeline.sample([1], preset=3)", "arg-type"),
    ("record = next(pipeline.steps([1], on_step=print))", "call-arg"),
    ("record = pipeline.sample([1])", "assignment"),
]


def test_arguments_are_checked_and_labels_may_be_named(tmp_path: Path) -> None:
    lines = [*ACCEPTED, *(line for line, _ in REFUSED)]
    snippet = tmp_path / "snippet.py"
    snippet.write_text(HEAD + "".join(f"    {line}\n" for line in lines))
    found, errors, _ = api.run(
        ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache"), str(snippet)]
    )
    assert not errors
    first = HEAD.count("\n") + 1 + len(ACCEPTED)
    expected = [(first + index, kind) for index, (_, kind) in enumerate(REFUSED)]
    reported = re.findall(r"^\S+snippet\.py:(\d+): error: .*\[([\w-]+)\]$", found, re.MULTILINE)
    assert [(int(line), kind) for line, kind in reported] == expected, found

"""Adding a sampler: one new file in `runtime/samplers/` and one row of its table, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import elit_export
from tests.helpers import tiny_spec

PACKAGE = Path(elit_export.__file__).parent
MIDPOINT = '''
"""The midpoint method, order 2: a velocity at the start leads to the middle, the one there to the end."""

from collections.abc import Iterator
from itertools import pairwise

from elit_export.arrays import Float64
from elit_export.runtime.samplers.base import Noise, Sampler, Velocity


def midpoint(velocity: Velocity, x: Float64, times: Float64, _noise: Noise) -> Iterator[Float64]:
    for step, (t, t_next) in enumerate(pairwise(times)):
        middle, h = (t + t_next) / 2, t_next - t
        x = x + h * velocity(x + h / 2 * velocity(x, t, step, 0), middle, step, 1)
        yield x


MIDPOINT = Sampler("midpoint", midpoint, accuracy=2, nodes=lambda _step, _steps: (0.0, 0.5))
'''
# Samples v = −x from t = 1 to 0, which is exp(1) times the start, guided in an interval and with a step cache.
SCRIPT = """
import json
import numpy as np
import elit_export
from elit_export.backends.protocols import FunctionEngine
from elit_export.bench.samplers import COMPARED
from elit_export.runtime.bank import EngineBank, Slot
from elit_export.runtime.pipeline import Pipeline
from elit_export.runtime.samplers import SAMPLERS
from elit_export.spec import PIXELS, ModelSpec, Precision, Range, default_profiles

spec = ModelSpec(**json.loads(input()))
given = []

def step(inputs):
    given.append((float(inputs["t"][0]), len(inputs["x"])))
    return {"velocity": -inputs["x"], "residual": np.zeros((len(inputs["x"]), 1, 1), np.float32)}

slots = [Slot(profile, FunctionEngine(step)) for profile in default_profiles(spec.latents, Range(1, 2, 4))]
reuse = FunctionEngine(lambda inputs: {"velocity": -inputs["x"]})
pipeline = Pipeline(EngineBank(slots, spec.budgets, Precision.FP32, {"reuse": reuse}), spec, PIXELS)
choices = {"sampler": "midpoint", "guidance": "cfg:2", "guidance_interval": (0.9, 1.0)}
start = pipeline.request([0], **choices).start
errors = []
for steps in (4, 8):
    given.clear()
    sample = pipeline.sample([0], steps=steps, **choices)
    errors.append(float(np.abs(sample.latents - np.e * start).max()))
asked = list(given)
cached = pipeline.sample([0], steps=8, cache="static:every@2", **choices)
sampler = SAMPLERS["midpoint"]
print(json.dumps({
    "package": elit_export.__file__,
    "facts": [sampler.order(), sampler.calls(8), len(asked)],
    "first": asked[:3],
    "ratio": errors[0] / errors[1],
    "cached": "".join("01"[call.reused] for call in cached.calls),
    "compared": [steps for name, steps in COMPARED if name == "midpoint"],
}))
"""


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A folder with a copy of the package that has one file and one row more."""
    package = Path(shutil.copytree(PACKAGE, tmp_path / "elit_export", ignore=shutil.ignore_patterns("__pycache__")))
    samplers = package / "runtime" / "samplers"
    (samplers / "midpoint.py").write_text(MIDPOINT, encoding="utf-8")
    table = (samplers / "__init__.py").read_text(encoding="utf-8")
    line, row = "from elit_export.runtime.samplers.heun import HEUN\n", "        HEUN,\n"
    assert line in table
    assert row in table
    table = table.replace(line, line + "from elit_export.runtime.samplers.midpoint import MIDPOINT\n")
    (samplers / "__init__.py").write_text(table.replace(row, row + "        MIDPOINT,\n"), encoding="utf-8")
    return tmp_path


def test_a_sampler_is_a_file_and_a_row(copied: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps(tiny_spec().to_dict()),
        capture_output=True,
        text=True,
        cwd=copied,
        env={**os.environ, "PYTHONPATH": str(copied)},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert Path(found["package"]) == copied / "elit_export" / "__init__.py"
    assert found["facts"] == [2, 16, 16]
    assert found["first"] == [[1.0, 2], [0.9375, 2], [0.875, 1]]
    assert found["ratio"] == pytest.approx(4, abs=0.5)
    # each stage has its own memory, which begins again where guidance ends; the last step computes
    assert found["cached"] == "0000" + "0011" * 2 + "0000"
    assert found["compared"] == [7, 10, 12]

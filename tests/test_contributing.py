"""As CONTRIBUTING.md says: a backend is a folder and a row. One is added for real, to a copy of the package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import elit_export
from elit_export.bundle.reading import Bundle

PACKAGE = Path(elit_export.__file__).parent

OPTIONS = '''
"""What a recipe may say of a target of ONNX's reference evaluator."""

from typing import ClassVar, Literal

from elit_export.backends.target import Target, TargetFacts
from elit_export.spec import Precision


class EvaluatorTarget(Target):
    """No options of its own."""

    facts: ClassVar = TargetFacts(devices=("cpu",), precisions=(Precision.FP32,))

    backend: Literal["evaluator"]
'''
BUILD = '''
"""Graph → plan: the graph itself."""

import shutil

import onnx

from elit_export.backends.protocols import BuiltPlan


class EvaluatorBuilder:
    """One plan for all profiles."""

    def check(self, target):
        """Runs anywhere."""

    def fingerprint(self, target):
        return {"onnx": onnx.__version__}

    def group_profiles(self, profiles, target):
        return [tuple(profiles)]

    def build_plan(self, graph, folder, profiles, target, inputs, progress):
        for file in graph.path.parent.glob(f"{graph.path.name}*"):
            shutil.copy(file, folder)
        progress(1.0)
        return BuiltPlan(graph.path.name, "evaluator", self.fingerprint(target), {"system": "any"})


BUILDERS = {"evaluator": EvaluatorBuilder()}
'''
ENGINE = '''
"""Plan → engine: NumPy, node by node."""

import onnx
from onnx.reference import ReferenceEvaluator

from elit_export.backends.protocols import FunctionEngine


class EvaluatorLoader:
    def open_engines(self, plans, target):
        return {name: opened(plan) for name, plan in plans.items()}

    def incompatibility(self, plans, target):
        return ""

    def library_version(self):
        return f"onnx {onnx.__version__}"

    def device_problem(self, device):
        return "", ""


def opened(plan):
    evaluator, outputs = ReferenceEvaluator(str(plan.path)), [tensor.name for tensor in plan.graph.outputs]
    return FunctionEngine(lambda inputs: dict(zip(outputs, evaluator.run(outputs, inputs))), plan.graph)


LOADERS = {"evaluator": EvaluatorLoader()}
'''
ROW = """        Backend(
            name="evaluator", folder="evaluator", options=EvaluatorTarget, library="onnx.reference", extra="export"
        ),
"""
USE = """
import sys

import numpy as np

from elit_export import Pipeline, compile_bundle
from elit_export.bundle.recipe import recipe_from_values

folder, checkpoint = sys.argv[1:]
target = {"backend": "evaluator", "device": "cpu", "precision": "fp32"}
cpu = {"backend": "onnxruntime", "device": "cpu", "precision": "fp32", "threads": 2}
values = {"name": "test", "checkpoint": checkpoint, "rows": {"min": 1, "opt": 2, "max": 8}}
recipe = recipe_from_values(values | {"targets": {"cpu": cpu, "evaluator": target}}, "test")
built = compile_bundle(recipe, "evaluator", out=folder)
assert all(parity.status == "passed" for parity in built.manifest.plan_sets[-1].parities)
with Pipeline.load(folder, target="evaluator") as one, Pipeline.load(folder, target="cpu") as other:
    given = {"steps": 4, "guidance": "ccfg:2@1", "cache": "static:every@2"}
    found, expected = (pipeline.sample([0, 1], **given).latents for pipeline in (one, other))
assert np.abs(found - expected).max() < 1e-4
print("same")
"""


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The package, to be added to."""
    ignored = shutil.ignore_patterns("__pycache__")
    return Path(shutil.copytree(PACKAGE, tmp_path / "elit_export", ignore=ignored))


def said_by(script: str, package: Path, *arguments: str | Path) -> str:
    """What a new process prints that runs a copy of the package."""
    environment = os.environ | {"PYTHONPATH": str(package.parent)}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=package.parent, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_backend_is_a_folder_and_a_row(
    copied: Path, tiny_bundle: Bundle, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Built, compared with PyTorch, and sampled beside ONNX Runtime."""
    folder = copied / "backends" / "evaluator"
    folder.mkdir()
    for name, text in {"__init__": "", "options": OPTIONS, "build": BUILD, "engine": ENGINE}.items():
        (folder / f"{name}.py").write_text(text.lstrip())
    table = copied / "backends" / "__init__.py"
    row_before, first_class = '        Backend(\n            name="openvino"', "\n\n\n@dataclass"
    imported = "\nfrom elit_export.backends.evaluator.options import EvaluatorTarget"
    text = table.read_text()
    assert row_before in text
    assert first_class in text
    table.write_text(text.replace(row_before, ROW + row_before).replace(first_class, imported + first_class, 1))
    bundle = shutil.copytree(tiny_bundle.folder, tmp_path / "bundle")
    assert said_by(USE, copied, bundle, tiny_checkpoint) == "same"

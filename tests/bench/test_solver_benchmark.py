"""benchmarks/solver.py: on which plan sets it measures, and what it refuses."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from elit_export.bundle.reading import Bundle
from elit_export.bundle.store import writing
from elit_export.errors import InputError
from elit_export.spec import Precision
from tests.helpers import a_solver

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.fixture
def solver(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return import_module("solver")


def test_a_table_of_plans_that_do_not_run_here(solver: Any, capsys: pytest.CaptureFixture[str]) -> None:
    facts = a_solver(target="gpu", precision=Precision.BF16)
    assert solver.own_plan_set(facts, ["cpu fp32", "gpu bf16"]) == "gpu bf16"
    assert capsys.readouterr().out == ""
    assert solver.own_plan_set(facts, ["cpu fp32"]) == "cpu fp32"
    assert "gpu bf16, which does not run here: measured on cpu fp32, the only one" in capsys.readouterr().out
    with pytest.raises(InputError, match="does not run here; cpu fp32, cpu bf16 do") as caught:
        solver.own_plan_set(facts, ["cpu fp32", "cpu bf16"])
    assert caught.value.remedy.endswith("elit-export calibrate solver BUNDLE --calls 2")


def test_without_plans_in_fp32_it_has_no_reference(solver: Any) -> None:
    with pytest.raises(InputError, match="none of  is in fp32") as caught:
        solver.exact_plan_set({})
    assert caught.value.remedy == "build a target in fp32 too"


def test_a_refusal_is_one_line_and_status_2(tiny_bundle: Bundle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_bundle.folder, tmp_path / "bundle"))
    with writing(folder) as store:
        assert store.manifest
        facts = a_solver(checkpoint_sha256=store.manifest.model.checkpoint_sha256)
        store.commit(store.manifest.model_copy(update={"solvers": (facts,)}))
    command = [sys.executable, str(BENCHMARKS / "solver.py"), str(folder), "--seed", str(facts.seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: solver:2 was calibrated on images of seed {facts.seed}; give another --seed\n"

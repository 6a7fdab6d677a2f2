"""A server that loads, then forks: its workers end, and what they inherited they neither call nor close."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from elit_export import Pipeline
from elit_export.backends.protocols import Array, Engine, LateEngine, OpenedEngine
from elit_export.bundle.reading import Bundle
from elit_export.bundle.store import writing
from elit_export.errors import EngineError
from elit_export.runtime.bank import EngineBank
from elit_export.spec import Budget, DataFacts, Precision
from tests.helpers import tiny_spec

# Newer Pythons warn of every fork where threads run, which is what is tried here.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")

# Three workers, one after another: one closes, one only ends, one calls and then loads for itself.
FORKING = """
import os, signal, sys
from elit_export import EngineError, Pipeline

folder, target = sys.argv[1:]

def closes():
    pipeline.close()

def ends():
    pass

def calls():
    try:
        pipeline.sample([1], steps=1)
    except EngineError as error:
        assert error.problem.endswith("opened in another process"), error
        assert error.remedy == "load the pipeline after the fork", error
    else:
        raise AssertionError("it sampled")
    with Pipeline.load(folder, target=target) as own:
        own.sample([1], steps=1)

pipeline = Pipeline.load(folder, target=target)
expected = pipeline.sample([2], steps=1).latents
for work in (closes, ends, calls):
    if (child := os.fork()) == 0:
        signal.alarm(20)  # a hang becomes a signal
        work()
        sys.exit(0)
    print(work.__name__, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
assert (pipeline.sample([2], steps=1).latents == expected).all()
pipeline.close()
"""


def said_by_workers(folder: Path, target: str) -> list[str]:
    command = [sys.executable, "-c", FORKING, str(folder), target]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def with_threads(bundle: Bundle, folder: Path, threads: int) -> Path:
    """A copy whose engines start so many threads, which a fork leaves behind."""
    shutil.copytree(bundle.folder, folder)
    with writing(folder) as store:
        assert store.manifest
        plan_sets = [
            plan_set.model_copy(update={"options": plan_set.options | {"threads": threads}})
            for plan_set in store.manifest.plan_sets
        ]
        store.commit(store.manifest.model_copy(update={"plan_sets": tuple(plan_sets)}))
    return folder


@needs_fork
def test_workers_of_onnx_runtime_end(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """That of OpenVINO is in `test_openvino.py`."""
    folder = with_threads(tiny_bundle, tmp_path / "bundle", threads=4)
    assert said_by_workers(folder, "cpu") == ["closes 0", "ends 0", "calls 0"]


# ---------------------------------------------------------------- in the child, without a library


class Opened(OpenedEngine):
    """Gives what it takes, and notes what is asked of it."""

    def __init__(self) -> None:
        super().__init__()
        self.released = 0

    def _run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        return {"velocity": inputs["x"]}

    def _release(self) -> None:
        self.released += 1


def in_a_child(work: Callable[[], object]) -> int:
    """The exit status of a child made by fork; 0 if the work does not raise."""
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(10)
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@needs_fork
def test_a_child_neither_calls_nor_closes_an_engine() -> None:
    engine = Opened()

    def work() -> None:
        with pytest.raises(EngineError, match="opened in another process; load the pipeline after the fork"):
            engine({"x": np.zeros(1)})
        engine.close()
        assert engine.released == 0
        with Opened() as own:
            assert own({"x": np.ones(1)}) == {"velocity": np.ones(1)}
        assert own.released == 1

    assert in_a_child(work) == 0
    engine.close()
    engine.close()
    assert engine.released == 1


@needs_fork
def test_a_child_does_not_wait_for_the_lock_of_a_thread_that_is_not_there() -> None:
    bank = EngineBank([], (Budget(1, 1),), Precision.FP32, decoder=Opened())

    def work() -> None:
        with pytest.raises(EngineError, match="load the pipeline after the fork"):
            bank.decode(np.zeros((1, 1, 1, 1), np.float32))
        bank.close()

    with bank._lock:  # as a call in another thread holds it
        assert in_a_child(work) == 0


@needs_fork
def test_a_child_opens_nothing_for_its_parent() -> None:
    """What a decoder's first call opens would share threads with what the parent opened."""

    def opener() -> Engine:
        raise AssertionError("it was opened")

    late = LateEngine(opener)

    def work() -> None:
        with pytest.raises(EngineError, match="opened in another process"):
            late({})
        late.close()

    assert in_a_child(work) == 0


# ---------------------------------------------------------------- pickling


def test_pipelines_banks_and_engines_refuse_pickling_by_a_sentence() -> None:
    engine = Opened()
    bank = EngineBank([], (Budget(1, 1),), Precision.FP32, decoder=engine)
    pipeline = Pipeline(bank, tiny_spec(), DataFacts(kind="pixels"))
    told = r"engines belong to the process .*load it there: Pipeline\.load\(BUNDLE\)"
    for made in (engine, bank, pipeline):
        for copied in (pickle.dumps, copy.deepcopy):
            with pytest.raises(TypeError, match=told):
                copied(made)  # type: ignore[operator]

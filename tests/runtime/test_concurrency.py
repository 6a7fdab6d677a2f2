"""Real engines under several threads, cancelled requests and closed pipelines: the same numbers or a clear error."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from elit_export.arrays import Float64
from elit_export.bundle.reading import Bundle
from elit_export.errors import EngineError
from elit_export.runtime.pipeline import Pipeline, Sample

THREADS = 4
REPEATS = 3  # of every thread, so that they meet at different points
STEPS = 6
Work = dict[str, Any]
# One a thread: they share budgets and rows with one another, and nothing else.
WORKS: tuple[Work, ...] = (
    {"labels": [0], "schedule": "full", "sampler": "ab3", "seed": 1},
    {"labels": [1, 2], "schedule": "0-2:quarter,3-5:full", "guidance": "cfg:3", "sampler": "heun", "seed": 2},
    {"labels": [2, 0, 1], "schedule": "half", "guidance": "ccfg:2@1", "sampler": "euler", "seed": 3},
    {"labels": [0, 1], "schedule": "0-4:1,5:3", "guidance": "autoguidance:2@2", "sampler": "euler-maruyama", "seed": 4},
)


@pytest.fixture(scope="module")
def pipeline(tiny_bundle: Bundle) -> Iterator[Pipeline]:
    with Pipeline.load(tiny_bundle.folder) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def alone(pipeline: Pipeline) -> list[Float64]:
    """What each work gives with nothing beside it."""
    return [run(pipeline, work).latents for work in WORKS]


def run(pipeline: Pipeline, work: Work) -> Sample:
    return pipeline.sample(steps=STEPS, **work)


def at_once(pipelines: Sequence[Pipeline]) -> list[list[Float64]]:
    """Work i in thread i on pipeline i, several times, all starting together."""
    together = threading.Barrier(THREADS, timeout=30)

    def repeat(pipeline: Pipeline, work: Work) -> list[Float64]:
        together.wait()
        return [run(pipeline, work).latents for _ in range(REPEATS)]

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(repeat, pipelines, WORKS))


def all_equal(found: list[list[Float64]], expected: list[Float64]) -> bool:
    return all(
        np.array_equal(latents, alone) for repeats, alone in zip(found, expected, strict=True) for latents in repeats
    )


# ---------------------------------------------------------------- threads


def test_threads_on_one_pipeline_get_what_each_gets_alone(pipeline: Pipeline, alone: list[Float64]) -> None:
    assert all_equal(at_once([pipeline] * THREADS), alone)


def test_pipelines_that_share_a_bank_do_not_disturb_one_another(pipeline: Pipeline, alone: list[Float64]) -> None:
    sharing = [Pipeline(pipeline.bank, pipeline.spec, pipeline.data) for _ in range(THREADS)]
    assert all_equal(at_once(sharing), alone)


def test_pipelines_with_banks_of_their_own_do_not_disturb_one_another(
    tiny_bundle: Bundle, alone: list[Float64]
) -> None:
    loaded = [Pipeline.load(tiny_bundle.folder) for _ in range(THREADS)]
    try:
        assert all_equal(at_once(loaded), alone)
    finally:
        for pipeline in loaded:
            pipeline.close()


def test_requests_taken_in_turn_step_by_step_do_not_disturb_one_another(
    pipeline: Pipeline, alone: list[Float64]
) -> None:
    generators = [pipeline.steps(steps=STEPS, **work) for work in WORKS]
    *_, last = zip(*generators, strict=True)
    assert all_equal([[record.x] for record in last], alone)


# ---------------------------------------------------------------- cancelling


@pytest.mark.parametrize("work", range(len(WORKS)))
def test_a_request_cancelled_after_any_step_leaves_nothing_behind(
    pipeline: Pipeline, alone: list[Float64], work: int
) -> None:
    for finished in range(STEPS + 1):
        records = pipeline.steps(steps=STEPS, **WORKS[work])
        for _ in range(finished):
            next(records)
        records.close()
        assert next(records, None) is None, finished
        assert np.array_equal(run(pipeline, WORKS[work]).latents, alone[work]), finished


def test_cancelling_one_request_leaves_the_others_alone(pipeline: Pipeline, alone: list[Float64]) -> None:
    cancelled, kept = (pipeline.steps(steps=STEPS, **WORKS[1]) for _ in range(2))
    next(cancelled)
    next(kept)
    cancelled.close()
    *_, last = kept
    assert np.array_equal(last.x, alone[1])


def test_an_error_in_a_listener_leaves_the_pipeline_usable(pipeline: Pipeline, alone: list[Float64]) -> None:
    def fails(_record: object) -> None:
        raise RuntimeError("from the listener")

    with pytest.raises(RuntimeError, match="from the listener"):
        pipeline.sample(steps=STEPS, on_step=fails, **WORKS[0])
    assert np.array_equal(run(pipeline, WORKS[0]).latents, alone[0])


# ---------------------------------------------------------------- closing


def closed_while_sampling(pipeline: Pipeline, close: Callable[[], None]) -> list[BaseException | None]:
    """What ends each of several endless samplings when `close` is called after all have begun."""
    begun = threading.Barrier(THREADS + 1, timeout=30)

    def sample(work: Work) -> None:
        records = pipeline.steps(**{"steps": 10_000, **work, "schedule": "full"})
        next(records)
        begun.wait()
        for _ in records:
            pass

    with ThreadPoolExecutor(THREADS) as pool:
        futures = [pool.submit(sample, work) for work in WORKS]
        begun.wait()
        close()
        return [future.exception(timeout=60) for future in futures]


@pytest.mark.parametrize("closers", [1, 3])
def test_closing_while_others_sample_is_an_engine_error_there(tiny_bundle: Bundle, closers: int) -> None:
    pipeline = Pipeline.load(tiny_bundle.folder)

    def close() -> None:
        with ThreadPoolExecutor(closers) as pool:
            list(pool.map(lambda _: pipeline.close(), range(closers)))

    for error in closed_while_sampling(pipeline, close):
        assert isinstance(error, EngineError), error
        assert "is closed; load the pipeline again" in str(error)


def test_closing_one_pipeline_leaves_another_of_the_same_bundle(
    tiny_bundle: Bundle, pipeline: Pipeline, alone: list[Float64]
) -> None:
    Pipeline.load(tiny_bundle.folder).close()
    assert np.array_equal(run(pipeline, WORKS[1]).latents, alone[1])

"""Nothing of one request reaches another: what engines gave to a finished one becomes NaN, and no other notices."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from elit_export.arrays import Float64
from elit_export.bundle.reading import Bundle
from elit_export.runtime.pipeline import Pipeline
from elit_export.runtime.sampling import StepRecord
from elit_export.spec import Fit
from tests.runtime.carrying import Carrying, all_pairs, carrying

STEPS = 10
CACHES = ("static:every@3", "static:time@0.1", "teacache:0.7")
Choices = dict[str, Any]
# As many rows each, so that the arrays of one would fit the other.
ONE: Choices = {"labels": [0, 2], "schedule": "0-3:2,4-9:full", "seed": 1}
OTHER: Choices = {"labels": [1, 0], "schedule": "0-6:full,7-9:3", "seed": 2}


def started(made: Carrying, choices: Choices) -> Generator[StepRecord, None, None]:
    return made.pipeline.steps(steps=STEPS, **choices)


def alone(choices: Choices) -> list[Float64]:
    """Every state with nothing beside it."""
    return [record.x.copy() for record in started(carrying(), choices)]


class Watched:
    """A request that advances step by step, and what engines gave out to it."""

    def __init__(self, made: Carrying, choices: Choices) -> None:
        self._ledger = made.ledger
        self._steps = started(made, choices)
        self._given = made.ledger[:0]

    def advance(self) -> Float64:
        before = len(self._ledger)
        x = next(self._steps).x.copy()
        self._given += self._ledger[before:]
        return x

    def end(self) -> None:
        """Cancelled, and what it was given is NaN from now on."""
        self._steps.close()
        assert self._given
        for asked in self._given:
            asked.poison()


@pytest.mark.parametrize(("sampler", "guided", "cache"), all_pairs(CACHES), ids=str)
def test_a_request_in_turn_with_another_survives_the_poison_of_its_end(
    sampler: str, guided: Choices, cache: str
) -> None:
    """The other is cancelled after 1, 4, 7 or all of its steps; one that begins afterwards does not notice either."""
    one, other = ({**labels, **guided, "sampler": sampler, "cache": cache} for labels in (ONE, OTHER))
    expected = alone(one)
    for cancelled_after in (1, 4, 7, STEPS):
        made = carrying()
        mine, theirs = Watched(made, one), Watched(made, other)
        found = []
        for step in range(STEPS):
            found.append(mine.advance())
            if step < cancelled_after:
                theirs.advance()
            if step == cancelled_after - 1:
                theirs.end()
        np.testing.assert_array_equal(found, expected)
        mine.end()
        np.testing.assert_array_equal([record.x for record in started(made, one)], expected)


@pytest.mark.parametrize("cache", CACHES)
def test_threads_on_one_bank_survive_the_poison_of_one_anothers_ends(cache: str) -> None:
    """Three at once, each again and again, all at the same budgets with as many rows."""
    made = carrying()
    works = [
        {"labels": [label, 2], "seed": label, "sampler": "heun", "guidance": "ccfg:2@1", "cache": cache}
        for label in range(3)
    ]
    together = threading.Barrier(len(works), timeout=30)

    def repeat(work: Choices) -> list[list[Float64]]:
        together.wait()
        return [list(poisoned_at_its_end(made, work)) for _ in range(5)]

    with ThreadPoolExecutor(len(works)) as pool:
        for work, repeats in zip(works, pool.map(repeat, works), strict=True):
            expected = alone(work)
            for states in repeats:
                np.testing.assert_array_equal(states, expected)
    assert len({asked.thread for asked in made.ledger}) == len(works)


def poisoned_at_its_end(made: Carrying, work: Choices) -> Iterator[Float64]:
    """The states of a sampling in this thread, which has no other."""
    for record in started(made, work):
        yield record.x.copy()
    for asked in list(made.ledger):
        if asked.thread == threading.get_ident():
            asked.poison()


# ---------------------------------------------------------------- real engines


@pytest.fixture(scope="module")
def pipeline(tiny_bundle: Bundle) -> Iterator[Pipeline]:
    with Pipeline.load(tiny_bundle.folder) as loaded:
        fits = dict.fromkeys(loaded.spec.budgets, Fit((0.0, 1.0), 0.0, 10.0))
        yield Pipeline(loaded.bank, loaded.spec, loaded.data, fits=fits)


@pytest.mark.parametrize("cache", ["static:every@3", "teacache:0.5"])
def test_real_engines_give_what_they_give_alone(pipeline: Pipeline, cache: str) -> None:
    """In turn and in threads, after one that was cancelled."""
    works = [{**ONE, "guidance": "cfg:2"}, {**OTHER, "guidance": "autoguidance:2@1", "sampler": "heun"}]
    made = [{**work, "cache": cache, "steps": STEPS} for work in works]
    expected = [pipeline.sample(**work) for work in made]
    assert all(any(call.reused for record in sample.records for call in record.calls) for sample in expected)
    cancelled = pipeline.steps(**made[0])
    next(cancelled)
    cancelled.close()
    in_turn = [[first.x, second.x] for first, second in zip(*(pipeline.steps(**work) for work in made), strict=True)]
    with ThreadPoolExecutor(2) as pool:
        in_threads = list(pool.map(lambda work: pipeline.sample(**work).latents, made))
    for sample, turned, threaded in zip(expected, in_turn[-1], in_threads, strict=True):
        np.testing.assert_array_equal(turned, sample.latents)
        np.testing.assert_array_equal(threaded, sample.latents)

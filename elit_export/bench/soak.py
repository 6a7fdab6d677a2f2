"""Measures whether memory grows over many samplings in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice, product

import numpy as np

from elit_export.bench.timing import resident_bytes
from elit_export.errors import InputError
from elit_export.runtime.conditioning import numbered
from elit_export.runtime.options import SamplingOptions
from elit_export.runtime.pipeline import Pipeline
from elit_export.runtime.sample import Sample
from elit_export.spec import Budget

MIN_SAMPLINGS = 10
WARMUP = 2000  # in the first samplings, allocators and the backend's arenas still grow by some hundred kB
MAX_RECORDS = 100  # few, so that their own memory does not count as growth
ROUNDS = (("none", 1), ("none", 2), ("cfg:2", 1))  # guidance and steps, each over all budgets in turn

Record = tuple[int, int]  # samplings done, resident bytes then


@dataclass(frozen=True)
class SoakResult:
    """The memory over `samplings`; the first `warmup` of them count in `seconds` only, and the start is after them.

    The bytes are None where the system does not report them. Growth is the slope of a line fitted to all records.
    """

    samplings: int
    warmup: int
    seconds: float
    start_bytes: int | None
    end_bytes: int | None
    growth_bytes_per_sampling: float | None


def soak(pipeline: Pipeline, *, samplings: int, on_sampling: Callable[[Sample], None]) -> SoakResult:
    """Sample one image of one or two steps again and again, changing the budget every time.

    Raises InputError for fewer samplings than a line can be fitted to.
    """
    if samplings < MIN_SAMPLINGS:
        raise InputError(f"a soak needs at least {MIN_SAMPLINGS} samplings, not {samplings}")
    warmup = min(WARMUP, samplings // 2)
    interval = max(1, (samplings - warmup) // MAX_RECORDS)
    records: list[Record] = []
    start_s = time.perf_counter()
    for done, options in enumerate(islice(short_samplings(pipeline.coverage.covered), samplings), start=1):
        conditioning = numbered(pipeline.spec, [done], pipeline.coverage.text)
        on_sampling(pipeline.sampled(conditioning, options))
        due = done >= warmup and (done - warmup) % interval == 0
        if due and (resident := resident_bytes()) is not None:
            records.append((done, resident))
    return _result(samplings, warmup, time.perf_counter() - start_s, records)


def short_samplings(budgets: Sequence[Budget]) -> Iterator[SamplingOptions]:
    """Yield options without end: every budget in turn, round after round, each with another seed."""
    for seed, ((guidance, steps), budget) in enumerate(cycle(product(ROUNDS, budgets))):
        yield SamplingOptions(sampler="euler", steps=steps, schedule=budget, guidance=guidance, seed=seed)


def _result(samplings: int, warmup: int, seconds: float, records: Sequence[Record]) -> SoakResult:
    if not records:
        return SoakResult(samplings, warmup, seconds, None, None, None)
    return SoakResult(samplings, warmup, seconds, records[0][1], records[-1][1], _slope(records))


def _slope(records: Sequence[Record]) -> float:
    """The growth in bytes per sampling, by least squares."""
    done, resident = np.array(records, np.float64).T
    slope, _ = np.polyfit(done - done.mean(), resident, deg=1)
    return float(slope)

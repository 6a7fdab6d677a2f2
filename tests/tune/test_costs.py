"""Times of samplings, predicted from those of their calls."""

from __future__ import annotations

from dataclasses import replace

import pytest

from elit_export import Pipeline
from elit_export.bundle.reading import Bundle
from elit_export.runtime.request import prepared
from elit_export.runtime.sampling import Call
from elit_export.spec import Range
from elit_export.tune.costs import (
    FEW_STEPS,
    MANY_STEPS,
    Costs,
    Overhead,
    fitted_overhead,
    off_by,
    predicted_ms,
    rehearsed,
    rounds_within,
)
from elit_export.tune.space import Space, sampling_options, space_of


@pytest.fixture
def space(tiny_bundle: Bundle) -> Space:
    with Pipeline.load(tiny_bundle.folder) as pipeline:
        return space_of({"cpu fp32": pipeline}, "cfg:2")


def known_ms(call: Call) -> float:
    """1 for each row at each latent kept, a tenth of a row where it is reused."""
    return call.rows * (0.1 if call.reused else call.budget.kept)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 4 * 2 * 4.0),  # four steps of two rows that keep 4 latents
        ({"schedule": "half"}, 4 * 2 * 2.0),
        ({"schedule": "0%-50%:half,50%-100%:full"}, 2 * 2 * 2.0 + 2 * 2 * 4.0),
        ({"guidance": "none"}, 4 * 4.0),
        ({"guidance": "ccfg:2@1"}, 4 * (4.0 + 1.0)),
        ({"guidance_interval": (0.6, 1.0)}, 2 * 2 * 4.0 + 2 * 4.0),  # t = 1 and 0.75 are guided
        ({"cache": "static:mask@1011"}, 3 * 2 * 4.0 + 2 * 0.1),
    ],
)
def test_a_prediction_is_the_sum_of_what_is_called(
    tiny_bundle: Bundle, space: Space, changes: dict[str, object], expected: float
) -> None:
    config = space.config("cpu fp32", "euler", 4, **changes)
    with Pipeline.load(tiny_bundle.folder) as pipeline:
        calls = rehearsed(pipeline, prepared(pipeline, [0], sampling_options(config.options)))
        real = pipeline.sampled([0], sampling_options(config.options)).calls
    assert [(call.budget, call.rows, call.reused) for call in calls] == [
        (call.budget, call.rows, call.reused) for call in real
    ]
    overhead = Overhead(sampling_ms=5.0, call_ms=0.5, decode_ms=2.0)
    assert predicted_ms(calls, known_ms, overhead) == pytest.approx(expected + 0.5 * len(calls) + 7.0)


def test_the_time_beside_calls_is_fitted_exactly() -> None:
    alone, overhead = 4.0, Overhead(sampling_ms=6.0, call_ms=0.25, decode_ms=1.5)
    few, many = ([alone] * steps for steps in (FEW_STEPS, MANY_STEPS))
    timed = {name: sum(calls) + len(calls) * 0.25 + 6.0 + 1.5 for name, calls in (("few", few), ("many", many))} | {
        "decoder": 1.5
    }
    found = fitted_overhead(sum(few), sum(many), timed, few_calls=FEW_STEPS)
    assert (found.sampling_ms, found.call_ms, found.decode_ms) == pytest.approx(
        (overhead.sampling_ms, overhead.call_ms, overhead.decode_ms)
    )


def test_a_step_of_two_calls_counts_as_two() -> None:
    """As each step does with guidance whose branches run at two budgets."""
    few, many = 2 * FEW_STEPS, 2 * MANY_STEPS
    timed = {"few": few * (4.0 + 0.25) + 7.5, "many": many * (4.0 + 0.25) + 7.5, "decoder": 1.5}
    found = fitted_overhead(few * 4.0, many * 4.0, timed, few_calls=few)
    assert (found.sampling_ms, found.call_ms) == pytest.approx((6.0, 0.25))


def test_what_no_profile_takes_is_not_timed(tiny_bundle: Bundle, space: Space) -> None:
    """Of a plan set whose profiles take one budget alone, the calls at that one are measured."""
    with Pipeline.load(tiny_bundle.folder) as pipeline:
        full = max(pipeline.coverage.budgets, key=lambda budget: budget.kept)
        latents = Range(full.kept, full.kept, full.kept)
        narrow = tuple(replace(profile, latents=latents) for profile in pipeline.coverage.profiles)
        pipeline.coverage = replace(pipeline.coverage, profiles=narrow)
        costs = Costs(pipeline, 1)
        runnable = costs.runnable([*space.cheapest("cpu fp32", any_budget=True)])
        assert [each.options.schedule for each in runnable] == ["full"]
        costs.measure("cpu fp32", space)
        assert costs.predicted_ms(space.baseline("cpu fp32")) > 0


def test_long_samplings_are_repeated_less_often() -> None:
    assert [rounds_within(ms, 1000) for ms in (1, 100, 250, 1e6)] == [15, 10, 4, 3]
    assert off_by(95, 100) == pytest.approx(0.05)

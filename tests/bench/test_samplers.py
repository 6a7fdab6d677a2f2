"""What the sampler table claims, on the shipped model with few images."""

from __future__ import annotations

import pytest

from elit_export import Pipeline
from elit_export.bench.samplers import COMPARED, sampler_errors
from elit_export.bundle.reading import Bundle
from elit_export.verify.metrics import difference


@pytest.mark.parametrize("guidance", ["none", "cfg:2"])
def test_multistep_at_15_to_20_calls_is_no_worse_than_euler_at_50(fashion_bundle: Bundle, guidance: str) -> None:
    with Pipeline.load(fashion_bundle.folder) as pipeline:

        def sampled(sampler: str, steps: int) -> object:
            return pipeline.sample([1, 5, 7, 8], sampler=sampler, steps=steps, guidance=guidance, seed=3).latents

        exact = sampled("heun", 80)
        euler = difference(sampled("euler", 50), exact).sqnr_db
        assert difference(sampled("ab2", 20), exact).sqnr_db >= euler
        assert difference(sampled("ab3", 14), exact).sqnr_db >= euler
        assert difference(sampled("abm3", 15), exact).sqnr_db >= euler


def test_table_counts_calls_and_errors(tiny_bundle: Bundle) -> None:
    with Pipeline.load(tiny_bundle.folder) as pipeline:
        errors = list(sampler_errors(pipeline, [0, 1], schedule="full", guidance="none", seed=0))
    assert [(error.sampler, error.steps) for error in errors] == list(COMPARED)
    by_name = {(error.sampler, error.steps): error for error in errors}
    assert by_name["heun", 8].calls == 15
    assert by_name["ab3", 14].calls == 15
    assert by_name["euler", 25].sqnr_db < by_name["euler", 50].sqnr_db

"""A cache policy prepared for one sampling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from elit_export.runtime.step_cache.policy import CachePolicy
from elit_export.spec import Budget, Fit


@dataclass(frozen=True)
class StepCache:
    """A policy prepared for one sampling.

    `computes` says which steps always compute. The others reuse if there is something to reuse and `max_skip` allows;
    unless `fits` is None, the fit of the budget and the rule decide too. `signal_shape` is (N, D).
    """

    policy: CachePolicy
    computes: tuple[bool, ...]
    signal_shape: tuple[int, int]
    fits: Mapping[Budget, Fit] | None = None

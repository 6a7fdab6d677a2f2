"""The memory of one sampling's step cache, and its decision at each evaluation: compute or reuse.

It is made for a request and dropped with it. Each call of an evaluation has its own memory: one for the strong and one
for the weak branch of guidance, or one for both if they share a call. A new memory begins where branches begin or cease
to share a call. A change of budget alone keeps the memory (docs/benchmarks.md says why).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from elit_export.arrays import Float32
from elit_export.backends.protocols import Array, to_host
from elit_export.runtime.step_cache.fit import covers, increments
from elit_export.runtime.step_cache.ready import StepCache
from elit_export.spec import Budget

MemoryKey = tuple[tuple[str, ...], int]  # roles of the branches of a call, stage of the step
Probe = Callable[[Array], Mapping[str, Array]]  # signal of the step before → signal, distance
# Why a step computed.
FORCED = "fixed before sampling"
FIRST = "nothing to reuse"
MAX_SKIP = "max_skip reuses in a row"
RANGE = "outside the calibrated range"
THRESHOLD = "threshold"


@dataclass(frozen=True)
class Decision:
    """Whether a call was reused, and the values that decided: one for each row, none if nothing was measured.

    `accumulated` is the sum of changes at the decision. All rows of a call compute as soon as one must, and then all
    sums start again at zero; `because` is the reason, empty for a reused call. `probed` says whether `probe` ran, which
    measures nothing at the first step.
    """

    reused: bool
    because: str = ""
    probed: bool = False
    distance: tuple[float, ...] = ()
    accumulated: tuple[float, ...] = ()


@dataclass(frozen=True)
class Computed:
    """The residual of an evaluation at time `t` that ran the blocks."""

    t: float
    residual: Array


@dataclass
class Memory:
    """The state kept for one branch of guidance in one stage of a step."""

    computed: list[Computed] = field(default_factory=list)  # the latest first, at most two
    step: int = -1  # of the last evaluation
    reused: int = 0  # in a row
    signal: Array | None = None
    accumulated: Float32 = field(default_factory=lambda: np.zeros(1, np.float32))  # one value for each row

    def note_computed(self, computed: Computed) -> None:
        self.computed, self.reused = [computed, *self.computed[:1]], 0
        self.accumulated = np.zeros_like(self.accumulated)

    def forecast(self, t: float, order: int) -> tuple[Array, Array, float]:
        """Return (latest residual, the one before, weight w): the residual at t is latest + w · (latest − before)."""
        latest, before = self.computed[0], self.computed[-1]
        span = latest.t - before.t  # 0 where only one was computed
        if order == 0 or not span:
            return latest.residual, latest.residual, 0.0
        return latest.residual, before.residual, (t - latest.t) / span


class RequestCache:
    """The step cache of one sampling."""

    def __init__(self, cache: StepCache) -> None:
        self._cache = cache
        self._memories: dict[MemoryKey, Memory] = {}

    def memory(self, key: MemoryKey, step: int) -> Memory:
        """Return the memory of a branch at a step; a branch that was idle in the step before has an empty one."""
        self._memories = {name: memory for name, memory in self._memories.items() if step - memory.step <= 1}
        memory = self._memories.setdefault(key, Memory())
        memory.step = step
        return memory

    def decide(self, memory: Memory, budget: Budget, rows: int, probe: Probe) -> Decision:
        """Decide whether this branch reuses at the step of its memory; probes if the policy measures."""
        # The last step computes and no step follows, so it is not measured.
        probed = self._cache.fits is not None and memory.step < len(self._cache.computes) - 1
        distance = self._measured(memory, budget, rows, probe) if probed else None
        because = self._because(memory, budget, distance)
        memory.reused += not because
        if distance is None:
            return Decision(not because, because, probed)
        return Decision(not because, because, probed, tuple(distance.tolist()), tuple(memory.accumulated.tolist()))

    def _because(self, memory: Memory, budget: Budget, distance: Float32 | None) -> str:
        """Return the reason to compute, empty to reuse."""
        if self._cache.computes[memory.step]:
            return FORCED
        if not memory.computed:
            return FIRST
        if memory.reused >= self._cache.policy.max_skip:
            return MAX_SKIP
        return "" if distance is None else self._measured_reason(memory, budget, distance)

    def _measured(self, memory: Memory, budget: Budget, rows: int, probe: Probe) -> Float32 | None:
        """Return the distance of each row from the step before, and add it up; None if that was not measured."""
        assert self._cache.fits
        is_first = memory.signal is None
        before = np.zeros((rows, *self._cache.signal_shape), np.float32) if memory.signal is None else memory.signal
        outputs = probe(before)
        memory.signal = outputs["signal"]
        if is_first:
            return None
        distance = to_host(outputs["distance"])
        memory.accumulated = memory.accumulated + increments(self._cache.fits[budget], distance)
        return distance

    def _measured_reason(self, memory: Memory, budget: Budget, distance: Float32) -> str:
        assert self._cache.fits
        if not covers(self._cache.fits[budget], distance).all():
            return RANGE
        return THRESHOLD if self._cache.policy.rule.is_reached(memory.accumulated) else ""

    def forecast(self, memory: Memory, t: float) -> tuple[Array, Array, float]:
        """Forecast as `Memory.forecast` does, in the order of the policy."""
        return memory.forecast(t, self._cache.policy.order)

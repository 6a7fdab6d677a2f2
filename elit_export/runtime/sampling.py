"""The sampling loop: a generator with one record per step.

The state is float64 on the host; engines get float32. Nothing outlives the generator, so closing
it cancels a request between two steps.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from elit_export.arrays import Float64, HostArray
from elit_export.backends.protocols import Array, to_host
from elit_export.errors import EngineError
from elit_export.runtime.bank import EngineBank, Slot, sizes_of
from elit_export.runtime.cache import StepCache
from elit_export.runtime.choices import branches_needed
from elit_export.runtime.guidance import Branch, Guidance
from elit_export.runtime.prompts import joined
from elit_export.runtime.residuals import Computed, Decision, RequestCache
from elit_export.runtime.samplers.base import Noise, Sampler
from elit_export.spec import TEXT, Budget

Conditioning = Mapping[str, HostArray]
Inputs = Mapping[str, HostArray]
Outputs = Mapping[str, Array]


@dataclass(frozen=True, kw_only=True)
class Request:
    """One sampling, checked: every step has a budget, every array its shape."""

    start: Float64  # (B, C, H, W)
    times: Float64  # (steps + 1,)
    schedule: tuple[Budget, ...]
    guidance: Guidance
    sampler: Sampler
    conditioning: Conditioning
    null_conditioning: Conditioning
    noise: Noise
    patch: int  # the side of a token's square in x
    cache: StepCache | None = None


NOT_CACHED = Decision(reused=False)


@dataclass(frozen=True)
class Call:
    """One evaluation of a branch of guidance. Two branches at one budget share a call with twice the rows.

    `role` is "strong", "weak" or, for both, "joined". `text` is how many tokens every row has, padding among them, 0 in
    models without. `cached` is what the step cache decided: where it reused, no block ran. `engine_ms` includes a
    probe, and waiting for another request's call where a bank is shared.
    """

    role: str
    budget: Budget
    rows: int
    text: int
    profile: str
    engine_ms: float
    cached: Decision = NOT_CACHED

    @property
    def reused(self) -> bool:
        return self.cached.reused


@dataclass(frozen=True)
class StepRecord:
    """A finished step from `t` to `t_next`; `x` (B, C, H, W) float64 is the state after it, read-only."""

    index: int
    t: float
    t_next: float
    budget: Budget
    calls: tuple[Call, ...]
    x: Float64


def sampling_steps(bank: EngineBank, request: Request) -> Generator[StepRecord, None, None]:
    """Sample; raises EngineError naming the step if an engine fails or gives numbers that are not finite."""
    velocity = GuidedVelocity(bank, request)
    states = request.sampler.run(velocity, request.start, request.times, request.noise)
    for index, x in enumerate(states):
        x.flags.writeable = False
        t, t_next = float(request.times[index]), float(request.times[index + 1])
        yield StepRecord(index, t, t_next, request.schedule[index], velocity.take_calls(), x)


class GuidedVelocity:
    """The velocity a sampler sees: one or two branches, each at its own budget, combined."""

    def __init__(self, bank: EngineBank, request: Request) -> None:
        self._bank = bank
        self._request = request
        self._cache = RequestCache(request.cache) if request.cache else None
        self._step, self._evaluation = -1, 0  # which evaluation of the step this is; Heun has two
        self._calls: list[Call] = []
        self._slots: dict[CallSize, Slot] = {}
        self._conditioning: dict[tuple[bool, ...], dict[str, HostArray]] = {}

    def take_calls(self) -> tuple[Call, ...]:
        """The calls since the last take."""
        calls = tuple(self._calls)
        self._calls.clear()
        return calls

    def __call__(self, x: Float64, t: float, step: int) -> Float64:
        branches = self._request.guidance.branches(self._request.schedule[step], t)
        self._evaluation = self._evaluation + 1 if step == self._step else 0
        self._step = step
        try:
            velocities = self._evaluate(x, t, branches)
        except EngineError as error:
            raise EngineError(f"step {step} (t={t:.4g}): {error}") from error
        if len(velocities) == 1:
            return velocities[0].astype(np.float64)
        return self._request.guidance.combined(*velocities, patch=self._request.patch)

    def _evaluate(self, x: Float64, t: float, branches: Sequence[Branch]) -> list[HostArray]:
        """The velocity of each branch, (B, C, H, W) float32."""
        budgets = {branch.budget for branch in branches}
        if len(budgets) == 1:  # the branches share a call
            joined = self._call(x, t, branches, "joined" if len(branches) > 1 else "strong")
            return [joined[start : start + len(x)] for start in range(0, len(joined), len(x))]
        return [self._call(x, t, (branch,), role) for branch, role in zip(branches, ("strong", "weak"), strict=True)]

    def _call(self, x: Float64, t: float, branches: Sequence[Branch], role: str) -> HostArray:
        budget = branches[0].budget
        inputs = self._inputs(x, t, branches)
        size = CallSize(budget, *sizes_of(inputs))
        started = time.perf_counter()
        outputs, cached = self._run(budget, inputs, t, role)
        engine_ms = (time.perf_counter() - started) * 1e3
        slot = self._slot(size)
        text = slot.tokens(size.text)
        self._calls.append(Call(role, budget, size.rows, text, slot.profile.name, engine_ms, cached))
        return to_host(outputs["velocity"])

    def _run(self, budget: Budget, inputs: Inputs, t: float, role: str) -> tuple[Outputs, Decision]:
        """What the engines give, and what the cache decided. The rows of a call compute or reuse together.

        Each role in guidance has its own memory, and so has each evaluation of a step.
        """
        if self._cache is None:
            return self._bank(budget, inputs), NOT_CACHED
        memory = self._cache.memory((role, self._evaluation), self._step)
        decision = self._cache.decide(memory, budget, len(inputs["x"]), partial(self._bank.probe, inputs))
        if decision.reused:
            return self._bank.reuse(inputs, *self._cache.forecast(memory, t)), decision
        outputs = self._bank(budget, inputs)
        memory.note_computed(Computed(t, outputs["residual"]))
        return outputs, decision

    def _slot(self, size: CallSize) -> Slot:
        """What served, looked up once per size of a sampling."""
        if size not in self._slots:
            self._slots[size] = self._bank.slot_for(*size)
        return self._slots[size]

    def _inputs(self, x: Float64, t: float, branches: Sequence[Branch]) -> dict[str, HostArray]:
        x = x.astype(np.float32)
        if len(branches) > 1:
            x = np.concatenate([x] * len(branches))
        return {"x": x, "t": np.full(len(x), t, np.float32), **self._conditioning_for(branches)}

    def _conditioning_for(self, branches: Sequence[Branch]) -> dict[str, HostArray]:
        """The branches' conditioning one below the other, joined once per sampling."""
        kinds = tuple(branch.null_class for branch in branches)
        if kinds not in self._conditioning:
            request = self._request
            parts = [request.null_conditioning if null else request.conditioning for null in kinds]
            self._conditioning[kinds] = joined(parts)
        return self._conditioning[kinds]


class CallSize(NamedTuple):
    """What an engine is given in a call: K, rows, tokens of text (0 in models without) before it is filled up."""

    budget: Budget
    rows: int
    text: int


def calls_needed(request: Request) -> Iterator[CallSize]:
    """The size of every call that a request needs, so that it can be refused before the first step."""
    for branches in branches_needed(request.sampler, request.times, request.schedule, request.guidance):
        shared = len({branch.budget for branch in branches}) == 1
        for together in [branches] if shared else [(branch,) for branch in branches]:
            yield _size_of(request, together)


def _size_of(request: Request, branches: Sequence[Branch]) -> CallSize:
    """Of one call for all of the branches: the longest of their texts counts."""
    kinds = [request.null_conditioning if branch.null_class else request.conditioning for branch in branches]
    text = max(kind[TEXT].shape[1] if TEXT in kind else 0 for kind in kinds)
    return CallSize(branches[0].budget, len(request.start) * len(branches), text)

"""The sampling loop: a generator with one record per step, of each part in turn where images come in parts.

The state is float64 on the host; engines take float32. Nothing outlives the generator, so closing
it cancels a request between two steps.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import numpy as np

from elit_export.arrays import Float64, HostArray
from elit_export.backends.protocols import to_host
from elit_export.errors import EngineError
from elit_export.runtime.bank import EngineBank, Served
from elit_export.runtime.guidance import Branch
from elit_export.runtime.noise import SeededNoise
from elit_export.runtime.prompts import joined
from elit_export.runtime.request import Request
from elit_export.runtime.residuals import Computed, Decision, RequestCache
from elit_export.runtime.samplers.base import Evaluation, Noise
from elit_export.runtime.step_cache.ready import StepCache
from elit_export.spec import Budget

Inputs = Mapping[str, HostArray]

log = logging.getLogger(__name__)
NOT_CACHED = Decision(reused=False)


@dataclass(frozen=True)
class Call:
    """One engine call, with the branches of guidance that share it: their rows follow each other.

    `role` is that of its branch or, if several share the call, "joined". `text` is the number of tokens in each row,
    with padding, 0 in models without text. `cached` is the decision of the step cache: if it reused, no block ran.
    `engine_ms` includes a probe, and waiting for another request's call if a bank is shared.
    """

    branches: tuple[Branch, ...]
    rows: int
    text: int
    profile: str
    engine_ms: float
    cached: Decision = NOT_CACHED

    @property
    def role(self) -> str:
        return self.branches[0].role if len(self.branches) == 1 else "joined"

    @property
    def budget(self) -> Budget:
        return self.branches[0].budget

    @property
    def reused(self) -> bool:
        return self.cached.reused


@dataclass(frozen=True)
class StepSummary:
    """How a step from `t` to `t_next` went: its budget, and its engine calls."""

    index: int
    t: float
    t_next: float
    budget: Budget
    calls: tuple[Call, ...]


@dataclass(frozen=True)
class StepRecord(StepSummary):
    """A finished step; `x` (B, C, H, W) float64 is the state after it, read-only.

    `images` are the places in the sampling of the images that `x` holds: all, or those of one part.
    """

    x: Float64
    images: range

    def summary(self) -> StepSummary:
        """Return the record without its state, which takes memory."""
        return StepSummary(self.index, self.t, self.t_next, self.budget, self.calls)


def sampling_steps(bank: EngineBank, request: Request) -> Generator[StepRecord, None, None]:
    """Sample one part after another; raises EngineError naming the step if an engine fails or gives no finite numbers.

    Engine calls that a cache policy needs before the first step are made at once.
    """
    return _records(bank, request, step_cache_of(bank, request))


def _records(bank: EngineBank, request: Request, cache: StepCache | None) -> Generator[StepRecord, None, None]:
    done = 0
    for part in request.parts():
        images = range(done, done + len(part.start))
        log.info("sampling images %d to %d of %d", images.start + 1, images.stop, sum(request.part_sizes))
        velocity = GuidedVelocity(bank, part, cache)
        states = part.sampler.run(velocity, part.start, part.times, step_noise_of(part))
        for index, x in enumerate(states):
            x.flags.writeable = False
            t, t_next = float(part.times[index]), float(part.times[index + 1])
            yield StepRecord(index, t, t_next, part.schedule[index], velocity.take_calls(), x, images)
        done = images.stop


def whole_steps(request: Request, records: Iterable[StepRecord]) -> Iterator[StepRecord]:
    """One record a step, of all images, from the records of each part; the first comes with the last part."""
    records = iter(records)
    steps = len(request.schedule)
    earlier = [deque(islice(records, steps)) for _ in request.part_sizes[1:]]
    for record in records:
        yield _whole([*(part.popleft() for part in earlier), record]) if earlier else record


def _whole(parts: Sequence[StepRecord]) -> StepRecord:
    x = np.concatenate([part.x for part in parts])
    x.flags.writeable = False
    return replace(parts[0], x=x, images=range(len(x)), calls=tuple(call for part in parts for call in part.calls))


def step_noise_of(request: Request) -> Noise:
    """Return the noise of each step of one run: the request's own, or the seed's, which follows the start noise."""
    if request.step_noise is not None:
        return iter(np.asarray(request.step_noise)).__next__
    seeded = SeededNoise(request.seed, len(request.start), request.start.shape[1:], first=request.first_image)
    if request.sampler.uses_noise:
        seeded()
    return seeded


class GuidedVelocity:
    """The velocity that a sampler calls: the branches of guidance, each at its own budget, combined."""

    def __init__(self, bank: EngineBank, request: Request, cache: StepCache | None) -> None:
        self._bank = bank
        self._request = request
        self._cache = RequestCache(cache) if cache else None
        self._calls: list[Call] = []
        self._conditioning: dict[tuple[bool, ...], dict[str, HostArray]] = {}

    def take_calls(self) -> tuple[Call, ...]:
        """Return and forget the calls since the last `take_calls`."""
        calls = tuple(self._calls)
        self._calls.clear()
        return calls

    def __call__(self, x: Float64, t: float, step: int, stage: int) -> Float64:
        guidance, budget = self._request.guidance_at(step), self._request.schedule[step]
        by_role: dict[str, HostArray] = {}  # (B, C, H, W) float32
        try:
            for branches in guidance.batches(budget, t):
                velocity = self._call(x, Evaluation(t, step, stage), branches)
                by_role |= zip((branch.role for branch in branches), np.split(velocity, len(branches)), strict=True)
        except EngineError as error:
            raise EngineError(f"step {step} (t={t:.4g}): {error.problem}", error.remedy) from error
        velocities = [by_role[branch.role] for branch in guidance.branches(budget, t)]
        return guidance.combine(velocities, patch=self._request.patch)

    def _call(self, x: Float64, at: Evaluation, branches: tuple[Branch, ...]) -> HostArray:
        """Return the velocities of branches that share a call, the rows of one after those of the other."""
        inputs = self._inputs(x, at.t, branches)
        started = time.perf_counter()
        served, cached = self._run(inputs, at, branches)
        engine_ms = (time.perf_counter() - started) * 1e3
        self._calls.append(Call(branches, len(inputs["x"]), served.text, served.slot.profile.name, engine_ms, cached))
        return to_host(served.outputs["velocity"])

    def _run(self, inputs: Inputs, at: Evaluation, branches: Sequence[Branch]) -> tuple[Served, Decision]:
        """Return outputs of the engines and the decision of the cache. The rows of a call compute or reuse together.

        In each stage of a step the branches have a memory of their own.
        """
        budget = branches[0].budget
        if self._cache is None:
            return self._bank(budget, inputs), NOT_CACHED
        key = tuple(branch.role for branch in branches), at.stage
        memory = self._cache.memory(key, at.step)
        decision = self._cache.decide(memory, budget, len(inputs["x"]), partial(self._bank.probe, inputs))
        if decision.reused:
            return self._bank.reuse(budget, inputs, *self._cache.forecast(memory, at.t)), decision
        served = self._bank(budget, inputs)
        memory.note_computed(Computed(at.t, served.outputs["residual"]))
        return served, decision

    def _inputs(self, x: Float64, t: float, branches: Sequence[Branch]) -> dict[str, HostArray]:
        x = x.astype(np.float32)
        if len(branches) > 1:
            x = np.concatenate([x] * len(branches))
        return {"x": x, "t": np.full(len(x), t, np.float32), **self._conditioning_for(branches)}

    def _conditioning_for(self, branches: Sequence[Branch]) -> dict[str, HostArray]:
        """Return the conditioning of the branches, concatenated once per sampling."""
        kinds = tuple(branch.null_class for branch in branches)
        if kinds not in self._conditioning:
            request = self._request
            parts = [request.null_conditioning if null else request.conditioning for null in kinds]
            self._conditioning[kinds] = joined(parts)
        return self._conditioning[kinds]


def step_cache_of(bank: EngineBank, request: Request) -> StepCache | None:
    """Prepare the cache policy of a request for its steps; calls the graph `time` if the policy decides by t."""
    if request.policy is None:
        return None
    computes = request.policy.computes(len(request.schedule), partial(_time_changes, bank, request))
    return StepCache(request.policy, computes, request.signal_shape, request.fits)


def _time_changes(bank: EngineBank, request: Request) -> list[float]:
    """Return the relative change of the embedding of t from each step to the next."""
    rows = next(request.sizes()).rows  # a number of rows that the engines accept
    embedded = bank.time_embeddings(request.times[:-1], rows)
    changed = np.abs(np.diff(embedded, axis=0)).mean(axis=1)
    return [float(change) for change in changed / np.abs(embedded[:-1]).mean(axis=1)]

"""The guided velocity of many images on the engines of a bundle, and the samples that a multistep method makes of it.

n is the number of calls of a method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from elit_export.arrays import Float64
from elit_export.errors import InputError
from elit_export.runtime.conditioning import Labels, as_conditioning, kind_of
from elit_export.runtime.options import ResolvedOptions, SamplingOptions, resolve
from elit_export.runtime.pipeline import Pipeline
from elit_export.runtime.prompts import Prompts
from elit_export.runtime.request import Request, prepare
from elit_export.runtime.sampling import GuidedVelocity
from elit_export.spec import Budget, ModelSpec, SolverTable


@dataclass(frozen=True, eq=False)
class Method:
    """A solver table as arrays: `times` (n + 1,) from 1 to 0, `weights` (n, n) with zeros above the diagonal."""

    times: Float64
    weights: Float64

    @property
    def calls(self) -> int:
        return len(self.weights)

    @classmethod
    def of(cls, table: SolverTable) -> Method:
        rows = [(*row, *([0.0] * (table.calls - len(row)))) for row in table.weights]
        return cls(np.array(table.times), np.array(rows))

    def table(self) -> SolverTable:
        rows = tuple(tuple(row[: call + 1].tolist()) for call, row in enumerate(self.weights))
        return SolverTable(tuple(self.times.tolist()), rows)


@dataclass(frozen=True)
class Trajectories:
    """Which images are sampled: how many, from the noise of which seed, and how. `interval` is that of the guidance.

    Image number i has class i, or in models with text prompt i of `prompts`, both in turn. `budget` names that of all
    calls.
    """

    images: int
    seed: int
    guidance: str
    interval: tuple[float, float] | None = None
    budget: str = "full"
    rows: int | None = None  # at most so many images at once
    prompts: Prompts | None = None

    def conditioning(self, spec: ModelSpec) -> Labels | Prompts:
        """Return what the images show; raises InputError for a model with text without prompts."""
        if self.prompts is not None:
            return self.prompts.at(np.arange(self.images) % len(self.prompts))
        if kind_of(spec) is Prompts:
            raise InputError("this model takes prompts, not labels", "give --prompts FILE.npz, written by `embed`")
        return Labels.numbered(spec, range(self.images), None)

    def request(self, pipeline: Pipeline, options: ResolvedOptions) -> Request:
        """Check a sampling of the images; raises InputError."""
        spec = pipeline.spec
        shown = as_conditioning(self.conditioning(spec), spec, pipeline.data)
        return prepare(spec, pipeline.coverage, shown, options, self.rows)

    def options(self, **changed: object) -> SamplingOptions:
        own = SamplingOptions(
            guidance=self.guidance, guidance_interval=self.interval, schedule=self.budget, seed=self.seed
        )
        return replace(own, **changed)  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class Part:
    """Images that are evaluated together: their start noise (B, C, H, W), and their velocity."""

    start: Float64
    velocity: GuidedVelocity

    def evaluate(self, x: Float64, t: float, call: int) -> Float64:
        """Return the guided velocity at the budgets of a call."""
        velocity = self.velocity(x, t, call, 0)
        self.velocity.take_calls()  # else they would be kept
        return velocity


@dataclass(frozen=True, eq=False)
class Rolled:
    """What a method made of a part: `states` (the last one is the samples) and the velocities at all others."""

    states: Sequence[Float64]
    velocities: Sequence[Float64]

    @property
    def samples(self) -> Float64:
        return self.states[-1]


class Flow:
    """The velocity of all images, in parts of at most as many as the engines take."""

    def __init__(
        self,
        pipeline: Pipeline,
        trajectories: Trajectories,
        calls: int,
        *,
        budgets: Sequence[Budget] | None = None,
        weak: Sequence[Budget] | None = None,
    ) -> None:
        """Check everything first; raises InputError. `budgets` and `weak` are those of each call, if they differ."""
        options = trajectories.options(sampler="euler", steps=calls)
        if budgets:
            options = replace(options, schedule=list(budgets))
        resolved = resolve(pipeline.spec, options)
        request = trajectories.request(pipeline, replace(resolved, weak=tuple(weak) if weak else None))
        self.start = request.start
        self.parts = tuple(Part(part.start, GuidedVelocity(pipeline.bank, part, None)) for part in request.parts())

    def evaluate(self, x: Float64, t: float, call: int) -> Float64:
        """Return the guided velocity of all images at the budgets of a call."""
        done, found = 0, []
        for part in self.parts:
            found.append(part.evaluate(x[done : done + len(part.start)], t, call))
            done += len(part.start)
        return np.concatenate(found)

    def samples(self, method: Method) -> Float64:
        """Return the samples of all images (images, C, H, W)."""
        return np.concatenate([roll(part, method).samples for part in self.parts])


def roll(
    part: Part, method: Method, first: int = 0, state: Float64 | None = None, velocities: Sequence[Float64] = ()
) -> Rolled:
    """Run a method from call `first` on, from a state and the velocities of the calls before it."""
    states = [part.start if state is None else state]
    history = list(velocities)
    for call in range(first, method.calls):
        history.append(part.evaluate(states[-1], float(method.times[call]), call))
        states.append(states[-1] + weighted_sum(method.weights[call], history))
    return Rolled(states, history)


def weighted_sum(weights: Float64, velocities: Sequence[Float64]) -> Float64:
    total = np.zeros_like(velocities[0])
    for weight, velocity in zip(weights, velocities, strict=False):
        if weight:
            total += weight * velocity
    return total


def image_errors(samples: Float64, expected: Float64) -> Float64:
    """Return the mean squared error of each image (images,)."""
    squared = np.square(samples - expected).reshape(len(samples), -1)
    return np.asarray(squared.mean(axis=1), np.float64)

"""From a bundle to samples: the object that applications embed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self, Unpack

import numpy as np
import numpy.typing as npt

from elit_export.arrays import Float64, Int64, Pixels
from elit_export.backends.protocols import FunctionEngine
from elit_export.bundle.manifest import PlanSet
from elit_export.bundle.reading import Bundle
from elit_export.errors import CalibrationError, InputError
from elit_export.runtime.bank import EngineBank, Slot
from elit_export.runtime.cache import CachePolicy, Fit, StepCache, TeaCache, TimeDistance
from elit_export.runtime.choices import Choices, Chosen, checked_choices
from elit_export.runtime.images import to_images
from elit_export.runtime.noise import SeededNoise
from elit_export.runtime.opening import cache_fits, check_verified, chosen_plan_set, open_bank, open_decoder
from elit_export.runtime.prompts import Prompts
from elit_export.runtime.sampling import Call, Conditioning, Request, StepRecord, calls_needed, sampling_steps
from elit_export.runtime.vae import Decoder
from elit_export.spec import Budget, DataFacts, ModelSpec

Subjects = Sequence[int] | Prompts  # what images are to show: labels, or in models with text prompts


@dataclass(frozen=True)
class Timings:
    """Seconds of one sampling: all of it, and the part inside engines."""

    total_s: float
    engines_s: float


@dataclass(frozen=True)
class Sample:
    """A finished sampling: `latents` (B, C, H, W) float64 and how it went."""

    latents: Float64
    labels: tuple[int, ...]
    records: tuple[StepRecord, ...]
    timings: Timings
    data: DataFacts

    @property
    def images(self) -> Pixels:
        """(B, H, W, C) for pixel models; raises InputError where a VAE decoder is needed: `pipeline.decode`."""
        return to_images(self.latents, self.data)

    @property
    def ms_per_image(self) -> float:
        return self.timings.total_s * 1e3 / len(self.latents)

    @property
    def calls(self) -> list[Call]:
        return [call for record in self.records for call in record.calls]

    def cache_summary(self) -> str:
        """One line: calls that were reused or probed, and why the others computed."""
        because = Counter(call.cached.because for call in self.calls if not call.reused)
        reasons = ", ".join(f"{count} {reason or 'not cached'}" for reason, count in because.items())
        reused, probes = sum(call.reused for call in self.calls), sum(call.cached.probed for call in self.calls)
        return f"{reused} of {len(self.calls)} calls reused after {probes} probes; computed: {reasons}"

    def summary(self) -> str:
        """One line: images, steps, engine calls by budget, time."""
        calls = Counter("reused" if call.reused else str(call.budget) for call in self.calls)
        by_budget = ", ".join(f"{count}×{budget}" for budget, count in calls.items())
        return (
            f"{len(self.latents)} images in {len(self.records)} steps, engine calls {by_budget}; "
            f"{self.timings.total_s:.2f} s, {self.ms_per_image:.0f} ms per image, "
            f"{self.timings.engines_s / self.timings.total_s:.0%} in engines"
        )


# Asked for embeddings of t alone, by a cache that goes by how they change: no value of theirs is an error.
NO_ENGINE = FunctionEngine(lambda inputs: {"embedding": np.ones((len(inputs["t"]), 1), np.float32)})


def ignore(_record: StepRecord) -> None:
    """Listen to no step."""


class Pipeline:
    """A model ready to sample. Owns its bank when loaded from a bundle: close it, or use it in `with`.

    Safe to share between threads: calls take turns, and nothing is kept between samplings.
    """

    def __init__(
        self,
        bank: EngineBank,
        spec: ModelSpec,
        data: DataFacts,
        *,
        fits: Mapping[Budget, Fit] | None = None,
        uncalibrated: str = "there is none: elit-export calibrate cache BUNDLE",
        decoder: Decoder | None = None,
    ) -> None:
        """`fits`, of every budget, are what a calibration found for `teacache`; without, `uncalibrated` says why.

        `decoder` makes pictures of VAE latents by engines of the bank.
        """
        self.bank, self.spec, self.data = bank, spec, data
        self._fits, self._uncalibrated = fits, uncalibrated
        self._decoder = decoder

    @classmethod
    def load(
        cls,
        bundle: str | Path,
        *,
        target: str | None = None,
        precision: str | None = None,
        allow_unverified: bool = False,
    ) -> Self:
        """Verify and open a bundle's plans; `target` and `precision` are needed only where several fit.

        Raises BundleError (missing, altered, never run on its device), BackendUnavailable, or
        InputError listing the plan sets.
        """
        opened = Bundle.open(bundle)
        plan_set = chosen_plan_set(opened.manifest.plan_sets, target, precision)
        if not allow_unverified:
            check_verified(plan_set, opened.folder)
        model = opened.manifest.model
        fits, problem = cache_fits(opened)
        bank = open_bank(opened, plan_set)
        decoder = open_decoder(bank, plan_set)
        return cls(bank, model.spec, model.data, fits=fits, uncalibrated=problem, decoder=decoder)

    @classmethod
    def unopened(cls, bundle: Bundle, plan_set: PlanSet) -> Self:
        """One without engines, whose `steps` checks a request as that of the real one does, before plans are opened.

        Raises BundleError for plans never run on their device.
        """
        check_verified(plan_set, bundle.folder)
        model = bundle.manifest.model
        slots = [Slot(facts.profile, NO_ENGINE) for facts in plan_set.profiles]
        cache = dict.fromkeys(plan_set.cache, NO_ENGINE)
        fits, problem = cache_fits(bundle)
        bank = EngineBank(slots, model.spec.budgets, plan_set.precision, cache)
        return cls(bank, model.spec, model.data, fits=fits, uncalibrated=problem)

    @property
    def makes_pictures(self) -> bool:
        """Can samples be decoded: are they pixels, or is there a decoder for them?"""
        return self.data.kind == "pixels" or self._decoder is not None

    def decode(self, latents: npt.ArrayLike) -> Pixels:  # (B, C, H, W) → (B, height, width, channels)
        """Pictures of samples, of a pixel model or by the decoder of the VAE, which the first call opens.

        Raises InputError, EngineError, or BundleError if the decoder's plan was altered since the bundle was loaded.
        """
        values = _finite_array(latents, "latents")
        if values.shape[1:] != self.spec.sample_shape or not len(values):
            raise InputError(f"latents have shape {values.shape}, this model's are (images, *{self.spec.sample_shape})")
        return self._decoder(values) if self._decoder else to_images(values, self.data)

    @property
    def fits(self) -> Mapping[Budget, Fit]:
        """What `teacache` decides by; raises CalibrationError naming the command that makes it."""
        if self._fits is None:
            raise CalibrationError(
                f"teacache needs a calibration; {self._uncalibrated}; or use a cache policy of the family static"
            )
        return self._fits

    def sample(
        self, labels: Subjects, *, on_step: Callable[[StepRecord], None] = ignore, **choices: Unpack[Choices]
    ) -> Sample:
        """Sample one image per label, or per prompt; `on_step` hears every step.

        Sample i depends on (seed, i), not on the batch around it; but with the cache `teacache` the batch
        computes when any of its samples must. Raises InputError, CalibrationError or EngineError.
        """
        started = time.perf_counter()
        records = []
        for record in self.steps(labels, **choices):
            on_step(record)
            records.append(record)
        engines_s = sum(call.engine_ms for record in records for call in record.calls) / 1e3
        timings = Timings(time.perf_counter() - started, engines_s)
        classes = () if isinstance(labels, Prompts) else tuple(int(label) for label in labels)
        return Sample(records[-1].x, classes, tuple(records), timings, self.data)

    def steps(self, labels: Subjects, **choices: Unpack[Choices]) -> Generator[StepRecord, None, None]:
        """The same, one record per step: for progress, previews and cancelling (close the generator).

        Everything is checked before the first step; raises InputError.
        """
        request = self.request(labels, **choices)
        for size in set(calls_needed(request)):
            self.bank.slot_for(*size)
        return sampling_steps(self.bank, request)

    def request(self, labels: Subjects, **choices: Unpack[Choices]) -> Request:
        """Check the choices of one sampling against the model; raises InputError."""
        chosen = checked_choices(self.spec, **choices)
        conditioning, null_conditioning = self._conditioning(labels, chosen)
        seeded = SeededNoise(chosen.seed, len(labels), self.spec.sample_shape)
        start, noise = seeded(), seeded.__call__
        if "noise" in choices:
            start = _checked_array(choices["noise"], start.shape, "noise")
        if "step_noise" in choices:
            given = _checked_array(choices["step_noise"], (len(chosen.schedule) - 1, *start.shape), "step_noise")
            noise = iter(given).__next__
        request = Request(
            start=start,
            times=chosen.times,
            schedule=chosen.schedule,
            guidance=chosen.guidance,
            sampler=chosen.sampler,
            conditioning=conditioning,
            null_conditioning=null_conditioning,
            noise=noise,
            patch=self.spec.patch_size,
        )
        return replace(request, cache=self._step_cache(chosen.cache, request))

    def _step_cache(self, policy: CachePolicy | None, request: Request) -> StepCache | None:
        """A cache policy made ready for the steps of a request; raises InputError or CalibrationError."""
        if policy is None:
            return None
        measures = isinstance(policy.rule, TeaCache)
        graphs = {
            "reuse",
            *(["probe"] if measures else []),
            *(["time"] if isinstance(policy.rule, TimeDistance) else []),
        }
        if missing := sorted(graphs - set(self.bank.cache)):
            raise InputError(f"these engines have no graph `{missing[0]}`: build the bundle again, or leave cache out")
        fits = self.fits if measures else None
        computes = policy.computes(len(request.schedule), lambda: self._time_changes(request))
        shape = (self.spec.tokens, self.spec.hidden_size)
        return StepCache(policy, computes, shape, fits)

    def _time_changes(self, request: Request) -> list[float]:
        """How much the embedding of t changes from each step to the next, relative to what it was."""
        size = next(calls_needed(request))  # as many rows as a step has: these the engines take
        self.bank.slot_for(*size)
        embedded = self.bank.time_embeddings(request.times[:-1], size.rows)
        changed = np.abs(np.diff(embedded, axis=0)).mean(axis=1)
        return [float(change) for change in changed / np.abs(embedded[:-1]).mean(axis=1)]

    def _conditioning(self, subjects: Subjects, chosen: Chosen) -> tuple[Conditioning, Conditioning]:
        """Inputs of the strong branch and of one without a class; raises InputError."""
        if isinstance(subjects, Prompts):
            return self._told(subjects, chosen)
        if self.spec.text_width:
            raise InputError(f"this model takes prompts, not {subjects!r}: give Prompts, embedded by a text encoder")
        y = self._checked_labels(subjects)
        name = self.spec.conditioning[0].name
        return {name: y}, {name: np.full_like(y, self.spec.null_class)}

    def _told(self, prompts: Prompts, chosen: Chosen) -> tuple[Conditioning, Conditioning]:
        if not self.spec.text_width:
            raise InputError(f"this model takes labels 0 to {self.spec.null_class}, not prompts")
        checked = prompts.checked(self.spec)
        if chosen.needs_null and checked.negative is None:
            raise InputError(
                f"guidance {chosen.guidance} leads away from negative prompts, and there are none: give some"
            )
        negative = checked.negative or checked.positive  # which no branch asks for
        return checked.positive.inputs(self.spec), negative.inputs(self.spec)

    def _checked_labels(self, labels: Sequence[int]) -> Int64:
        try:
            y = np.asarray(labels)
        except ValueError:  # lists of different lengths
            y = np.empty(0)
        if y.ndim != 1 or not len(y) or not np.issubdtype(y.dtype, np.integer):
            raise InputError(f"labels must be a list of at least one whole number, not {labels!r}")
        if y.min() < 0 or y.max() > self.spec.null_class:
            wrong = next(label for label in y if not 0 <= label <= self.spec.null_class)
            raise InputError(
                f"label {wrong} is out of range: classes are 0 to {self.spec.num_classes - 1}, "
                f"{self.spec.null_class} means no class"
            )
        return y.astype(np.int64)

    def close(self) -> None:
        self.bank.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _checked_array(values: npt.ArrayLike, shape: tuple[int, ...], name: str) -> Float64:
    array = _finite_array(values, name)
    if array.shape != shape:
        raise InputError(f"{name} has shape {array.shape}, this sampling needs {shape}")
    return array


def _finite_array(values: npt.ArrayLike, name: str) -> Float64:
    try:
        array = np.array(values, np.float64)
    except (ValueError, TypeError) as error:
        raise InputError(f"{name} is no array of numbers: {error}") from error
    if not np.isfinite(array).all():
        raise InputError(f"{name} holds values that are not finite")
    return array

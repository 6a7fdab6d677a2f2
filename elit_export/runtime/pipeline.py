"""A bundle → samples: the object that applications embed."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from elit_export.arrays import Pixels
from elit_export.bundle.manifest import PlanSet
from elit_export.bundle.reading import Bundle, with_current
from elit_export.callbacks import noop
from elit_export.errors import InputError
from elit_export.runtime.arguments import Given, SamplingArguments, takes_each
from elit_export.runtime.bank import EngineBank
from elit_export.runtime.conditioning import LabelsLike
from elit_export.runtime.coverage import UNCALIBRATED
from elit_export.runtime.images import to_images
from elit_export.runtime.opening import check_verified, coverage_of, open_bank, open_decoder
from elit_export.runtime.options import SamplingOptions, about
from elit_export.runtime.presets import Presets, chosen_plan_set, merged
from elit_export.runtime.request import Request, finite_array, prepared
from elit_export.runtime.sample import Sample, Timings
from elit_export.runtime.samplers.calibrated import NO_SOLVERS
from elit_export.runtime.sampling import Call, StepRecord, StepSummary, sampling_steps
from elit_export.runtime.vae import Decoder
from elit_export.spec import Budget, DataFacts, Fit, ModelSpec, SolverFacts


@dataclass(frozen=True, kw_only=True)
class SampleArguments(SamplingArguments):
    """The arguments of a sampling, and a function that is called after each step."""

    on_step: Callable[[StepRecord], None] = field(
        default=noop, metadata=about("called after each step", "a function of a StepRecord")
    )


@dataclass(frozen=True)
class LabelsAndSamplingArguments(SamplingArguments):
    """The arguments of `steps` and `request`, for type checkers alone."""

    labels: LabelsLike


@dataclass(frozen=True)
class LabelsAndSampleArguments(SampleArguments):
    """The arguments of `sample`, for type checkers alone."""

    labels: LabelsLike


class Pipeline:
    """A model ready to sample. It owns its bank when loaded from a bundle: close it, or use it in `with`.

    It is safe to share between threads: calls take turns, and nothing is kept between samplings.
    """

    def __init__(
        self,
        bank: EngineBank,
        spec: ModelSpec,
        data: DataFacts,
        *,
        fits: Mapping[Budget, Fit] | None = None,
        uncalibrated: str = UNCALIBRATED,
        solvers: tuple[SolverFacts, ...] = (),
        no_solvers: str = NO_SOLVERS,
        decoder: Decoder | None = None,
        presets: Presets | None = None,
    ) -> None:
        """Take a bank. `fits` are the calibration of `teacache` for each budget; without it, `uncalibrated` says why.

        `solvers` are the tables that `sampler="solver"` may use, `no_solvers` says why there are none. `decoder` turns
        VAE latents into pictures by an engine of the bank. `presets` are those of a bundle.
        """
        self.bank, self.spec, self.data = bank, spec, data
        self.coverage = replace(bank.coverage, fits=fits, uncalibrated=uncalibrated)
        self.coverage = replace(self.coverage, solvers=solvers, no_solvers=no_solvers)
        self._decoder, self._presets = decoder, presets

    @classmethod
    def load(
        cls,
        bundle: str | Path,
        *,
        target: str | None = None,
        precision: str | None = None,
        preset: str | None = None,
        trust: bool = False,
        allow_unverified: bool = False,
    ) -> Self:
        """Verify and open a bundle's plans; `target` and `precision` are needed only if several fit.

        `preset` opens those that a preset of the bundle samples by; its options are then those of samplings that give
        no others, unless they say `preset=None`. `trust` opens saved programs, which can run any code, though this user
        did not build them here. Where another process builds into the bundle meanwhile, what it wrote is opened. Raises
        BundleError (missing, altered, not trusted, never run on its device, or a preset of another checkpoint),
        BackendUnavailable, or InputError listing the plan sets or presets.
        """
        return with_current(
            bundle,
            lambda opened: cls.of(
                opened,
                chosen_plan_set(opened, target, precision, preset),
                preset=preset,
                allow_unverified=allow_unverified,
            ),
            trust=trust,
        )

    @classmethod
    def of(
        cls, bundle: Bundle, plan_set: PlanSet, *, preset: str | None = None, allow_unverified: bool = False
    ) -> Self:
        """Open the plans of a bundle that was already read, those of `preset` if there is one; raises as `load`."""
        if not allow_unverified:
            check_verified(plan_set, bundle.folder)
        presets = Presets(bundle, plan_set, preset)
        model, coverage = bundle.manifest.model, coverage_of(bundle, plan_set)
        bank = open_bank(bundle, plan_set)
        decoder = open_decoder(bank, plan_set)
        return cls(
            bank,
            model.spec,
            model.data,
            fits=coverage.fits,
            uncalibrated=coverage.uncalibrated,
            solvers=coverage.solvers,
            no_solvers=coverage.no_solvers,
            decoder=decoder,
            presets=presets,
        )

    @property
    def makes_pictures(self) -> bool:
        """Whether samples can become pictures: they are pixels, or there is a decoder for them."""
        return self.data.kind == "pixels" or self._decoder is not None

    def decode(self, latents: npt.ArrayLike) -> Pixels:  # (B, C, H, W) → (B, height, width, channels)
        """Turn samples into pictures, by the decoder of the VAE if there is one; the first call opens it.

        Raises InputError, EngineError, or BundleError if the decoder's plan was altered since the bundle was loaded.
        """
        values = finite_array(latents, "latents")
        if values.shape[1:] != self.spec.sample_shape or not len(values):
            raise InputError(f"latents have shape {values.shape}, this model's are (images, *{self.spec.sample_shape})")
        return self._decoder(values) if self._decoder else to_images(values, self.data)

    @takes_each(SampleArguments, LabelsAndSampleArguments)
    def sample(self, labels: LabelsLike, given: Given[SampleArguments]) -> Sample:
        """Sample one image per label, class name or prompt.

        There may be any number of images: more than an engine call takes are sampled in parts, one after another.
        Image i depends on (seed, first_image + i), not on the images around it; but with the cache `teacache` each
        part decides by itself, and computes when any of its images must. Raises InputError, CalibrationError,
        EngineError, or BundleError for a preset that does not fit the bundle.
        """
        options = merged(given, self._presets)
        return self.sampled(labels, options, options.on_step)

    @takes_each(SamplingArguments, LabelsAndSamplingArguments)
    def steps(self, labels: LabelsLike, given: Given[SamplingArguments]) -> Generator[StepRecord, None, None]:
        """Sample and yield one record per step: for progress, previews and cancelling (close the generator).

        Where images come in parts, all steps of the first come first; `record.images` says whose they are. Everything
        is checked before the first step; raises InputError, CalibrationError or BundleError.
        """
        return sampling_steps(self.bank, self.prepared(labels, merged(given, self._presets)))

    @takes_each(SamplingArguments, LabelsAndSamplingArguments)
    def request(self, labels: LabelsLike, given: Given[SamplingArguments]) -> Request:
        """Check one sampling completely, for `run`; raises InputError, CalibrationError or BundleError."""
        return self.prepared(labels, merged(given, self._presets))

    def prepared(self, labels: LabelsLike, options: SamplingOptions, at_once: int | None = None) -> Request:
        """Do what `request` does, with all options as one value, which no preset changes.

        A part has at most `at_once` images.
        """
        return prepared(self, labels, options, at_once)

    def sampled(
        self, labels: LabelsLike, options: SamplingOptions, on_step: Callable[[StepRecord], None] = noop
    ) -> Sample:
        """Sample as `sample` does, with all options as one value, which no preset changes."""
        started = time.perf_counter()
        return self._run(self.prepared(labels, options), on_step, started)

    def run(self, request: Request, on_step: Callable[[StepRecord], None] = noop) -> Sample:
        """Sample what was checked; `on_step` hears every step of every part. Raises EngineError."""
        return self._run(request, on_step, time.perf_counter())

    def _run(self, request: Request, on_step: Callable[[StepRecord], None], started: float) -> Sample:
        latents = np.empty_like(request.start)
        steps: dict[int, StepSummary] = {}  # of the first part; states of earlier steps would fill the memory
        calls: list[list[Call]] = [[] for _ in request.schedule]  # of each step, in all parts
        for record in sampling_steps(self.bank, request):
            on_step(record)
            steps.setdefault(record.index, record.summary())
            calls[record.index] += record.calls
            latents[record.images.start : record.images.stop] = record.x  # at last the state after the last step
        latents.flags.writeable = False
        records = tuple(replace(steps[index], calls=tuple(made)) for index, made in enumerate(calls))
        engines_s = sum(call.engine_ms for record in records for call in record.calls) / 1e3
        timings = Timings(time.perf_counter() - started, engines_s)
        return Sample(latents, request.labels, records, timings, self.data, request.part_sizes)

    def close(self) -> None:
        self.bank.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

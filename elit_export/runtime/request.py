"""A sampling, checked once and completely, without engines: applications, command line and servers all use it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from elit_export.arrays import Arrays, Float64, HostArray, refuse_masked
from elit_export.errors import InputError
from elit_export.runtime.arguments import naming_preset
from elit_export.runtime.conditioning import Conditioning, LabelsLike, as_conditioning
from elit_export.runtime.coverage import CallSize, Coverage
from elit_export.runtime.noise import SeededNoise
from elit_export.runtime.options import ResolvedOptions, SamplingOptions, resolve
from elit_export.runtime.split import split
from elit_export.spec import Budget, DataFacts, Fit, ModelSpec


@dataclass(frozen=True, kw_only=True)
class Request(ResolvedOptions):
    """A checked sampling: each step has a budget, each array its shape, each call a profile.

    It may be run any number of times, by any number of threads. `conditioning` and `null_conditioning` are
    inputs of engines, by name. More images than an engine call takes are sampled in parts (`runtime/split.py`).
    """

    labels: tuple[int, ...]
    start: Float64  # (B, C, H, W)
    conditioning: Mapping[str, HostArray]
    null_conditioning: Mapping[str, HostArray]
    tokens: int  # of the longest text; 0 in models without
    null_tokens: int  # of the longest negative text
    part_sizes: tuple[int, ...]  # the images of each part
    patch: int  # the side of a token's square in x
    signal_shape: tuple[int, int]  # (N, D)
    fits: Mapping[Budget, Fit] | None

    def sizes(self) -> Iterator[CallSize]:
        """The size of every engine call, in their order."""
        for images in self.part_sizes:
            yield from call_sizes(self, images, self.tokens, self.null_tokens)

    @property
    def records(self) -> int:
        """How many records the sampling gives: one for each step of each part."""
        return len(self.part_sizes) * len(self.schedule)

    def parts(self) -> Iterator[Request]:
        """The sampling of each part, in their order; its arrays are views of these."""
        done = 0
        for images in self.part_sizes:
            part = slice(done, done + images)
            yield replace(
                self,
                part_sizes=(images,),
                first_image=self.first_image + done,
                labels=self.labels[part],
                start=self.start[part],
                step_noise=None if self.step_noise is None else np.asarray(self.step_noise)[:, part],
                conditioning={name: array[part] for name, array in self.conditioning.items()},
                null_conditioning={name: array[part] for name, array in self.null_conditioning.items()},
            )
            done += images


class Samplable(Protocol):
    """A model and what its plans cover, against which samplings are checked. An opened pipeline is one too."""

    @property
    def spec(self) -> ModelSpec: ...
    @property
    def data(self) -> DataFacts: ...
    @property
    def coverage(self) -> Coverage: ...


@dataclass(frozen=True)
class Unopened:
    """A plan set whose engines are not open."""

    spec: ModelSpec
    data: DataFacts
    coverage: Coverage


def prepared(on: Samplable, labels: LabelsLike, options: SamplingOptions, at_once: int | None = None) -> Request:
    """Check a sampling whose options are one value, as `prepare`."""
    conditioning = as_conditioning(labels, on.spec, on.data)
    with naming_preset(options):
        resolved = resolve(on.spec, options, on.coverage.solvers, on.coverage.no_solvers)
    return prepare(on.spec, on.coverage, conditioning, resolved, at_once)


def prepare(
    spec: ModelSpec,
    coverage: Coverage,
    conditioning: Conditioning,
    options: ResolvedOptions,
    at_once: int | None = None,
) -> Request:
    """Check everything that a sampling needs; raises InputError or CalibrationError.

    `at_once` is the most images that a part may have, if that is less than the profiles take.
    """
    images, tokens, null_tokens = len(conditioning), conditioning.tokens, conditioning.null_tokens
    part_sizes = check_calls(coverage, options, images, tokens, null_tokens, at_once)
    strong = conditioning.inputs(spec)
    null = _null_inputs(spec, conditioning, options) if options.needs_null else strong
    shape, step_noise = (images, *spec.sample_shape), options.step_noise
    if options.start_noise is None:
        start = SeededNoise(options.seed, images, spec.sample_shape, first=options.first_image)()
    else:
        start = _checked_array(options.start_noise, shape, "noise")
    if step_noise is not None:
        step_noise = _checked_array(step_noise, (len(options.schedule) - 1, *shape), "step_noise")
    return Request(
        **vars(options) | {"start_noise": None, "step_noise": step_noise},
        labels=conditioning.labels,
        start=start,
        conditioning=strong,
        null_conditioning=null,
        tokens=tokens,
        null_tokens=null_tokens,
        part_sizes=part_sizes,
        patch=spec.patch_size,
        signal_shape=(spec.tokens, spec.hidden_size),
        fits=coverage.fits_for(options.policy.rule) if options.policy else None,
    )


def _null_inputs(spec: ModelSpec, conditioning: Conditioning, options: ResolvedOptions) -> Arrays:
    try:
        return conditioning.null_inputs(spec)
    except InputError as error:
        raise InputError(f"guidance {options.guidance}: {error.problem}", error.remedy) from error


def check_calls(
    coverage: Coverage,
    options: ResolvedOptions,
    images: int,
    tokens: int,
    null_tokens: int,
    at_once: int | None = None,
) -> tuple[int, ...]:
    """Return the images of each part, so that some profile takes every call; raises InputError or CalibrationError.

    It needs no conditioning, only the length of its texts: it can be called before a text encoder runs.
    """
    if options.policy:
        coverage.fits_for(options.policy.rule)
    calls = dict.fromkeys(call_sizes(options, 1, tokens, null_tokens))
    return split(coverage, list(calls), images, at_once)


def call_sizes(options: ResolvedOptions, images: int, tokens: int = 0, null_tokens: int = 0) -> Iterator[CallSize]:
    """Yield the size of each call; if branches share a call, the longest of their texts counts."""
    for batch in options.batches():
        text = max(null_tokens if branch.null_class else tokens for branch in batch)
        yield CallSize(batch[0].budget, images * len(batch), text)


def _checked_array(values: npt.ArrayLike, shape: tuple[int, ...], name: str) -> Float64:
    array = finite_array(values, name)
    if array.shape != shape:
        raise InputError(f"{name} has shape {array.shape}, this sampling needs {shape}")
    return array


def finite_array(values: npt.ArrayLike, name: str) -> Float64:
    """Convert numbers to float64; raises InputError for anything else."""
    refuse_masked(values, name)
    try:
        array = np.array(values, np.float64)
    except (ValueError, TypeError) as error:
        raise InputError(f"{name} is not an array of numbers: {error}") from error
    if not np.isfinite(array).all():
        raise InputError(f"{name} holds values that are not finite")
    return array

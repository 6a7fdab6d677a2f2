"""A sampling, checked once and whole, without engines: the one door for applications, command line and servers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from elit_export.arrays import Arrays, Float64, HostArray, refuse_masked
from elit_export.errors import InputError
from elit_export.runtime.conditioning import Conditioning
from elit_export.runtime.coverage import Coverage
from elit_export.runtime.noise import SeededNoise
from elit_export.runtime.options import ResolvedOptions
from elit_export.spec import Budget, Fit, ModelSpec


@dataclass(frozen=True, kw_only=True)
class Request(ResolvedOptions):
    """One sampling, checked: every step has a budget, every array its shape, every call a profile.

    A value: it may be run any number of times, by any number of threads. `conditioning` and `null_conditioning` are
    inputs of engines, by name.
    """

    labels: tuple[int, ...]
    start: Float64  # (B, C, H, W)
    conditioning: Mapping[str, HostArray]
    null_conditioning: Mapping[str, HostArray]
    sizes: tuple[CallSize, ...]  # of every call, in their order
    patch: int  # the side of a token's square in x
    signal_shape: tuple[int, int]  # (N, D)
    fits: Mapping[Budget, Fit] | None


class CallSize(NamedTuple):
    """What an engine is given in a call: K, rows, tokens of text (0 in models without) before they are padded."""

    budget: Budget
    rows: int
    text: int


def prepare(spec: ModelSpec, coverage: Coverage, conditioning: Conditioning, options: ResolvedOptions) -> Request:
    """Check everything that a sampling needs; raises InputError or CalibrationError."""
    images = len(conditioning)
    strong = conditioning.inputs(spec)
    null = _null_inputs(spec, conditioning, options) if options.needs_null else strong
    sizes = check_calls(coverage, options, images, conditioning.tokens, conditioning.null_tokens)
    shape, step_noise = (images, *spec.sample_shape), options.step_noise
    if options.start_noise is None:
        start = SeededNoise(options.seed, images, spec.sample_shape)()
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
        sizes=sizes,
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
    coverage: Coverage, options: ResolvedOptions, images: int, tokens: int, null_tokens: int
) -> tuple[CallSize, ...]:
    """The size of every call, all of which some profile takes; raises InputError or CalibrationError.

    Needs no conditioning, only how long its texts are: it may be asked before a text encoder runs.
    """
    if options.policy:
        coverage.fits_for(options.policy.rule)
    sizes = tuple(call_sizes(options, images, tokens, null_tokens))
    for size in dict.fromkeys(sizes):
        coverage.profile_for(*size)
    return sizes


def call_sizes(options: ResolvedOptions, images: int, tokens: int = 0, null_tokens: int = 0) -> Iterator[CallSize]:
    """Tell the size of every call; where branches share one, the longest of their texts counts."""
    for batch in options.batches():
        text = max(null_tokens if branch.null_class else tokens for branch in batch)
        yield CallSize(batch[0].budget, images * len(batch), text)


def _checked_array(values: npt.ArrayLike, shape: tuple[int, ...], name: str) -> Float64:
    array = finite_array(values, name)
    if array.shape != shape:
        raise InputError(f"{name} has shape {array.shape}, this sampling needs {shape}")
    return array


def finite_array(values: npt.ArrayLike, name: str) -> Float64:
    """Numbers as float64; raises InputError for anything else."""
    refuse_masked(values, name)
    try:
        array = np.array(values, np.float64)
    except (ValueError, TypeError) as error:
        raise InputError(f"{name} is not an array of numbers: {error}") from error
    if not np.isfinite(array).all():
        raise InputError(f"{name} holds values that are not finite")
    return array

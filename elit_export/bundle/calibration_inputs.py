"""Real inputs of the graph `step`, on which quantization is calibrated: what they are and how they are stored."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from elit_export.arrays import Arrays, Float32, HostArray, Int64
from elit_export.bundle.atomic import atomic_write
from elit_export.bundle.readers import PlainArraysError, array_names, plain_arrays
from elit_export.errors import CalibrationError
from elit_export.spec import LATENTS, MAX_TEXT_TOKENS, ROWS, STEP, TEXT, ModelSpec, Profile, Role, TensorSpec, listed
from elit_export.spec.limits import SAMPLES

MIN_SAMPLES = 64  # samples that a calibration may rest on
FACTS = "facts"  # the entry of the file that holds JSON
FACTS_BYTES = 1 << 20  # of that JSON, and of what headers of arrays add
ITEM_BYTES = 8  # of a number, of which most have 4
WHAT = "the samples"
NOT_SAMPLES = "not a file of calibration samples of this version"
CONDITIONING = "conditioning/"  # before the names of those inputs in the file


class CalibrationFacts(BaseModel):
    """The origin of samples. `images` is the number of trajectories for each schedule with each guidance."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    package_version: str
    checkpoint_sha256: str
    seed: int
    images: int
    steps: int
    sampler: str
    schedules: tuple[str, ...]
    guidance: tuple[str, ...]
    samples: int


@dataclass(frozen=True)
class CalibrationInputs:
    """n rows that an engine was given: `kept` is how many latents it ran with, the rest are the row's inputs.

    Texts of different lengths are filled up to the longest with padding that is 0, as where they share a call.
    """

    facts: CalibrationFacts
    x: Float32  # (n, C, H, W)
    t: Float32  # (n,)
    kept: Int64  # (n,)
    conditioning: Arrays  # (n, …) each

    def __len__(self) -> int:
        return len(self.x)

    def inputs(self) -> Iterator[Arrays]:
        """The inputs of the graph `step`, one row at a time."""
        for row in range(len(self)):
            one = slice(row, row + 1)
            conditioning = {name: values[one] for name, values in self.conditioning.items()}
            latents = np.arange(self.kept[row], dtype=np.int64)
            yield {"x": self.x[one], "t": self.t[one], **conditioning, LATENTS: latents}

    @property
    def sha256(self) -> str:
        """The hash of all that a calibration sees: the arrays, with their names and shapes."""
        digest = hashlib.sha256()
        for name, values in _entries(self).items():
            digest.update(f"{name} {values.dtype.str} {values.shape};".encode())
            digest.update(np.ascontiguousarray(values).tobytes())
        return digest.hexdigest()


def _arrays(inputs: CalibrationInputs) -> Arrays:
    """Return the arrays by the names of their tensors."""
    return {"x": inputs.x, "t": inputs.t, "kept": inputs.kept, **dict(sorted(inputs.conditioning.items()))}


def _entries(inputs: CalibrationInputs) -> Arrays:
    """Return the arrays by their names in the file."""
    names = {name: f"{CONDITIONING}{name}" for name in inputs.conditioning}
    return {names.get(name, name): values for name, values in _arrays(inputs).items()}


def save_inputs(samples: CalibrationInputs, path: Path) -> None:
    """Write a NumPy archive, whole or not at all; the same samples give the same bytes."""
    with atomic_write(path) as temporary, temporary.open("wb") as file:  # a name would be given the suffix .npz
        entries: dict[str, Any] = {FACTS: np.array(samples.facts.model_dump_json()), **_entries(samples)}
        np.savez(file, **entries)


def command_for(out: Path | str, bundle: Path | str = "BUNDLE", *, text: bool) -> str:
    """Return the command that collects samples of a model, one that takes text or one of classes."""
    return f"elit-export calibrate samples {bundle}{' --prompts FILE.npz' if text else ''} --out {out}"


def check_covered(samples: CalibrationInputs, profiles: Sequence[Profile]) -> None:
    """Raise CalibrationError if a profile has no sample at any of its budgets."""
    for profile in profiles:
        if not any(int(kept) in profile.latents for kept in np.unique(samples.kept)):
            raise CalibrationError(
                f"no sample has a budget of profile {profile.name} ({profile.latents} latents)",
                f"collect samples "
                f"with the budgets of every profile: {command_for('FILE', text=profile.text is not None)}",
            )


# ---------------------------------------------------------------- reading


def load_inputs(path: Path, spec: ModelSpec, checkpoint_sha256: str) -> CalibrationInputs:
    """Read samples for a model; raises CalibrationError with what is wrong and the command that makes new ones."""
    try:
        samples = _read(path, spec, checkpoint_sha256)
        _check_count(samples)
        _check_shapes(samples, spec)
        _check_values(samples, spec)
    except CalibrationError as error:
        command = command_for(path, text=spec.takes_text)
        remedy = f"{error.remedy}: {command}" if error.remedy else command
        raise CalibrationError(f"{path}: {error.problem}", remedy) from error
    return samples


def _read(path: Path, spec: ModelSpec, checkpoint_sha256: str) -> CalibrationInputs:
    if not path.exists():
        raise CalibrationError("no calibration samples there", "collect some")
    try:
        arrays = _model_arrays(path, spec, checkpoint_sha256)
    except OSError as error:
        raise CalibrationError(f"cannot be read ({error.strerror or error})", "collect the samples again") from error
    except PlainArraysError as error:
        raise CalibrationError("not a file of calibration samples, or damaged", "collect the samples again") from error
    return _samples_of(arrays)


def _model_arrays(path: Path, spec: ModelSpec, checkpoint_sha256: str) -> Arrays:
    """Read the arrays that samples of this checkpoint have, and nothing else.

    They may have as many bytes as so many rows of the model, and no more than the file: `save_inputs` compresses none.
    """
    facts = plain_arrays(path, (FACTS,), what=WHAT, error=CalibrationError, limit_bytes=FACTS_BYTES)
    origin = _facts_of(facts)
    _check_origin(origin, checkpoint_sha256)
    names = [name for name in array_names(path, what=WHAT, error=CalibrationError) if name.startswith(CONDITIONING)]
    _check_conditioned([name.removeprefix(CONDITIONING) for name in names], spec)
    inputs = {"x", "t", "kept", *names}
    limit = min(origin.samples * _row_bytes(spec) + FACTS_BYTES, path.stat().st_size)
    return facts | plain_arrays(path, inputs, what=WHAT, error=CalibrationError, limit_bytes=limit)


def _check_conditioned(names: Sequence[str], spec: ModelSpec) -> None:
    conditioning = {tensor.name for tensor in spec.conditioning}
    if set(names) != conditioning:
        theirs, ours = ", ".join(names) or "nothing", ", ".join(sorted(conditioning))
        raise CalibrationError(f"conditioned by {theirs}, this model by {ours}", "collect samples of this model")


def _row_bytes(spec: ModelSpec) -> int:
    """The maximum size of one row."""
    sizes = {ROWS: 1, TEXT: MAX_TEXT_TOKENS}
    return sum(
        math.prod(sizes.get(size, 1) if isinstance(size, str) else size for size in tensor.dims) * ITEM_BYTES
        for tensor in spec.graph(STEP).inputs
    )


def _facts_of(arrays: Arrays) -> CalibrationFacts:
    try:
        return CalibrationFacts.model_validate_json(str(arrays[FACTS]))
    except (KeyError, ValidationError) as error:
        raise CalibrationError(NOT_SAMPLES, "collect the samples again") from error


def _samples_of(arrays: Arrays) -> CalibrationInputs:
    facts = _facts_of(arrays)
    try:
        x, t, kept = (arrays[name] for name in ("x", "t", "kept"))
    except KeyError as error:
        raise CalibrationError(NOT_SAMPLES, "collect the samples again") from error
    conditioning = {
        name.removeprefix(CONDITIONING): values for name, values in arrays.items() if name.startswith(CONDITIONING)
    }
    return CalibrationInputs(facts, x, t, kept, conditioning)


def _check_count(samples: CalibrationInputs) -> None:
    if (count := len(np.atleast_1d(samples.x))) != samples.facts.samples:
        raise CalibrationError(f"holds {count} samples and says {samples.facts.samples}", "collect the samples again")


def _check_origin(facts: CalibrationFacts, checkpoint_sha256: str) -> None:
    """What a file says of its samples, before they are read."""
    if problem := SAMPLES.problem(facts.samples, "their number"):
        raise CalibrationError(problem, "collect the samples again")
    if facts.samples < MIN_SAMPLES:
        raise CalibrationError(f"{facts.samples} samples are too few, the minimum is {MIN_SAMPLES}", "collect more")
    if facts.checkpoint_sha256 != checkpoint_sha256:
        theirs, ours = facts.checkpoint_sha256[:12], checkpoint_sha256[:12]
        raise CalibrationError(f"samples of another checkpoint ({theirs}, not {ours})", "collect samples of this one")


def _check_shapes(inputs: CalibrationInputs, spec: ModelSpec) -> None:
    sizes = {ROWS: len(inputs)}
    for tensor in spec.graph(STEP).inputs:
        if tensor.role is Role.LATENTS:  # of which the file has the number of each row
            tensor = replace(tensor, name="kept", dims=(ROWS,))
        _check_shape(tensor, _arrays(inputs)[tensor.name], sizes)
    if not 1 <= sizes.get(TEXT, 1) <= MAX_TEXT_TOKENS:
        raise CalibrationError(
            f"text of {sizes[TEXT]} tokens, this model has positions for {MAX_TEXT_TOKENS}",
            "collect samples of this model",
        )


def _check_shape(tensor: TensorSpec, values: HostArray, sizes: dict[str, int]) -> None:
    """`sizes` are those of dynamic dimensions; what is not in it may be any, and is noted there."""
    sizes_here = values.shape if values.ndim == len(tensor.dims) else (0,) * len(tensor.dims)
    pairs = zip(tensor.dims, sizes_here, strict=True)
    expected = tuple(sizes.setdefault(size, here) if isinstance(size, str) else size for size, here in pairs)
    if values.dtype != tensor.dtype or values.shape != expected:
        raise CalibrationError(
            f"{tensor.name} is {values.dtype} {values.shape}, this model takes {tensor.dtype} {expected}",
            "collect samples of this model",
        )


def _check_values(inputs: CalibrationInputs, spec: ModelSpec) -> None:
    for name, values in _arrays(inputs).items():
        if not np.isfinite(values).all():
            row = int(np.argmin(np.isfinite(values).reshape(len(values), -1).all(axis=1)))
            raise CalibrationError(
                f"{name} of sample {row} holds values that are not finite",
                "compare the engines with PyTorch (elit-export verify BUNDLE), then collect the samples again",
            )
    if unknown := sorted(set(inputs.kept.tolist()) - {budget.kept for budget in spec.budgets}):
        raise CalibrationError(
            f"kept is {unknown[0]} in some samples, this model runs {listed(spec.budgets)}",
            "collect samples of this model",
        )
    highest = {Role.TIME: 1, Role.TEXT_MASK: 1, Role.LABEL: spec.null_class}
    for tensor in spec.graph(STEP).inputs:
        if tensor.role in highest:
            _check_range(tensor.name, _arrays(inputs)[tensor.name], highest[tensor.role])


def _check_range(name: str, values: HostArray, highest: int) -> None:
    if values.min() < 0 or values.max() > highest:
        raise CalibrationError(
            f"{name} runs from {values.min():g} to {values.max():g}, in this model from 0 to {highest}",
            "collect samples of this model",
        )

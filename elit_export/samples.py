"""Real inputs of the graph `step`, on which quantization is calibrated: what they are and how they are stored.

Takes: arrays, or a file of them.  Gives: Samples.  May touch: that file.  Knows nothing of: engines, how
samples were chosen, what quantizes with them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError

from elit_export.errors import CalibrationError
from elit_export.files import PlainArraysError, plain_arrays, written_whole
from elit_export.spec import LATENTS, LONGEST_TEXT, ROWS, TEXT, TEXT_MASK, ModelSpec, Profile, TensorSpec, listed

FEWEST = 64  # samples that a calibration may rest on
FACTS = "facts"  # the entry of the file that holds JSON
CONDITIONING = "conditioning/"  # before the names of those inputs in the file
Array = npt.NDArray[Any]
Inputs = dict[str, Array]


class SampleFacts(BaseModel):
    """Where samples come from. `images` is the number of trajectories for each schedule with each guidance."""

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
class Samples:
    """n rows that an engine was given: `kept` is how many latents it ran with, the rest are the row's inputs.

    Texts of different lengths are filled up to the longest with padding that is 0, as where they share a call.
    """

    facts: SampleFacts
    x: npt.NDArray[np.float32]  # (n, C, H, W)
    t: npt.NDArray[np.float32]  # (n,)
    kept: npt.NDArray[np.int64]  # (n,)
    conditioning: Mapping[str, Array]  # (n, …) each

    def __len__(self) -> int:
        return len(self.x)

    def inputs(self) -> Iterator[Inputs]:
        """The inputs of the graph `step`, one row at a time."""
        for row in range(len(self)):
            one = slice(row, row + 1)
            conditioning = {name: values[one] for name, values in self.conditioning.items()}
            latents = np.arange(self.kept[row], dtype=np.int64)
            yield {"x": self.x[one], "t": self.t[one], **conditioning, LATENTS: latents}

    @property
    def sha256(self) -> str:
        """Of all that a calibration sees: the arrays, with their names and shapes."""
        digest = hashlib.sha256()
        for name, values in _arrays(self).items():
            digest.update(f"{name} {values.dtype.str} {values.shape};".encode())
            digest.update(np.ascontiguousarray(values).tobytes())
        return digest.hexdigest()


def _arrays(samples: Samples) -> dict[str, Array]:
    conditioning = {f"{CONDITIONING}{name}": values for name, values in sorted(samples.conditioning.items())}
    return {"x": samples.x, "t": samples.t, "kept": samples.kept, **conditioning}


def save_samples(samples: Samples, path: Path) -> None:
    """Write a NumPy archive, whole or not at all; the same samples give the same bytes."""
    with written_whole(path) as temporary, temporary.open("wb") as file:  # a name would be given the suffix .npz
        entries: dict[str, Any] = {FACTS: np.array(samples.facts.model_dump_json()), **_arrays(samples)}
        np.savez(file, **entries)


def command_for(out: Path | str, bundle: Path | str = "BUNDLE", *, text: bool) -> str:
    """What to type for samples of a model, one that takes text or one of classes."""
    return f"elit-export calibrate samples {bundle}{' --prompts FILE.npz' if text else ''} --out {out}"


def check_covered(samples: Samples, profiles: Sequence[Profile]) -> None:
    """Raise CalibrationError if a profile has no sample at any of its budgets."""
    for profile in profiles:
        if not any(int(kept) in profile.latents for kept in np.unique(samples.kept)):
            raise CalibrationError(
                f"no sample has a budget of profile {profile.name} ({profile.latents} latents): take samples with the "
                f"budgets of every profile: {command_for('FILE', text=profile.text is not None)}"
            )


# ---------------------------------------------------------------- reading


def load_samples(path: Path, spec: ModelSpec, checkpoint_sha256: str) -> Samples:
    """Read samples for a model; raises CalibrationError with what is wrong and the command that makes new ones."""
    try:
        samples = _read(path)
        _check_origin(samples, checkpoint_sha256)
        _check_shapes(samples, spec)
        _check_values(samples, spec)
    except CalibrationError as error:
        raise CalibrationError(f"{path}: {error}: {command_for(path, text=spec.text_width > 0)}") from error
    return samples


def _read(path: Path) -> Samples:
    if not path.exists():
        raise CalibrationError("no calibration samples there; take some")
    try:
        arrays = plain_arrays(path)
    except OSError as error:
        raise CalibrationError(f"cannot be read ({error.strerror or error}); take samples anew") from error
    except PlainArraysError as error:
        raise CalibrationError("not a file of calibration samples, or damaged; take samples anew") from error
    return _samples_of(arrays)


def _samples_of(arrays: Inputs) -> Samples:
    try:
        facts = SampleFacts.model_validate_json(str(arrays.pop(FACTS)))
        x, t, kept = (arrays.pop(name) for name in ("x", "t", "kept"))
    except (KeyError, ValidationError) as error:
        raise CalibrationError("not a file of calibration samples of this version; take samples anew") from error
    return Samples(facts, x, t, kept, {name.removeprefix(CONDITIONING): values for name, values in arrays.items()})


def _check_origin(samples: Samples, checkpoint_sha256: str) -> None:
    count, facts = len(np.atleast_1d(samples.x)), samples.facts
    if count != facts.samples:
        raise CalibrationError(f"holds {count} samples and says {facts.samples}; take samples anew")
    if count < FEWEST:
        raise CalibrationError(f"{count} samples are too few, {FEWEST} are the least; take more")
    if facts.checkpoint_sha256 != checkpoint_sha256:
        theirs, ours = facts.checkpoint_sha256[:12], checkpoint_sha256[:12]
        raise CalibrationError(f"samples of another checkpoint ({theirs}, not {ours}); take samples of this one")


def _check_shapes(samples: Samples, spec: ModelSpec) -> None:
    x, t, *conditioning = spec.common_inputs
    if set(samples.conditioning) != {tensor.name for tensor in conditioning}:
        wanted = ", ".join(tensor.name for tensor in conditioning)
        found = ", ".join(samples.conditioning) or "nothing"
        raise CalibrationError(f"conditioned by {found}, this model by {wanted}; take samples of this model")
    kept = TensorSpec("kept", "int64", t.shape)
    checked: list[tuple[TensorSpec, Array]] = [(x, samples.x), (t, samples.t), (kept, samples.kept)]
    sizes = {ROWS: len(samples)}
    for tensor, values in [*checked, *((tensor, samples.conditioning[tensor.name]) for tensor in conditioning)]:
        _check_shape(tensor, values, sizes)
    if not 1 <= sizes.get(TEXT, 1) <= LONGEST_TEXT:
        raise CalibrationError(
            f"text of {sizes[TEXT]} tokens, this model has positions for {LONGEST_TEXT}; take samples of this model"
        )


def _check_shape(tensor: TensorSpec, values: Array, sizes: dict[str, int]) -> None:
    """`sizes` are those of dimensions with a name; what is not in it may be any, and is noted there."""
    found = values.shape if values.ndim == len(tensor.shape) else (0,) * len(tensor.shape)
    pairs = zip(tensor.shape, found, strict=True)
    wanted = tuple(sizes.setdefault(size, here) if isinstance(size, str) else size for size, here in pairs)
    if values.dtype != tensor.dtype or values.shape != wanted:
        raise CalibrationError(
            f"{tensor.name} is {values.dtype} {values.shape}, this model takes {tensor.dtype} {wanted}; "
            f"take samples of this model"
        )


def _check_values(samples: Samples, spec: ModelSpec) -> None:
    for name, values in _arrays(samples).items():
        if not np.isfinite(values).all():
            row = int(np.argmin(np.isfinite(values).reshape(len(values), -1).all(axis=1)))
            raise CalibrationError(
                f"{name.removeprefix(CONDITIONING)} of sample {row} holds values that are not finite; "
                f"compare the engines with PyTorch (elit-export verify BUNDLE), then take samples anew"
            )
    if unknown := sorted(set(samples.kept.tolist()) - {budget.kept for budget in spec.budgets}):
        raise CalibrationError(
            f"kept is {unknown[0]} in some samples, this model runs {listed(spec.budgets)}; take samples of this model"
        )
    highest = {"t": 1, TEXT_MASK: 1, **{tensor.name: spec.null_class for tensor in spec.modulating}}
    for name, values in {"t": samples.t, **samples.conditioning}.items():
        if name in highest and (values.min() < 0 or values.max() > highest[name]):
            raise CalibrationError(
                f"{name} runs from {values.min():g} to {values.max():g}, in this model from 0 to {highest[name]}; "
                f"take samples of this model"
            )

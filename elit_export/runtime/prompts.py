"""What a text-to-image model is told: text as an encoder embedded it.

Takes: arrays.  Gives: Prompts, checked against a model.  May touch: nothing.
Knows nothing of: words, encoders.

L is the number of tokens of the longest prompt, W the width of the text's embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from elit_export.errors import InputError
from elit_export.spec import LONGEST_TEXT, ModelSpec

HostArray = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Embedded:
    """Texts of B images: `text` (B, L, W) float32 and `mask` (B, L), 1 for a token, 0 for padding."""

    text: HostArray
    mask: HostArray

    def checked(self, spec: ModelSpec, what: str) -> Embedded:
        """As a model takes them, with padding emptied; raises InputError naming what does not fit."""
        text, mask = np.asarray(self.text), np.asarray(self.mask)
        if text.ndim != 3 or text.shape[2] != spec.text_width or not text.size:
            raise InputError(f"{what}: text has shape {text.shape}, must be (images, tokens, {spec.text_width})")
        if mask.shape != text.shape[:2]:
            raise InputError(f"{what}: mask has shape {mask.shape}, the text {text.shape[:2]} tokens")
        if not np.isin(mask, (0, 1)).all():
            raise InputError(f"{what}: mask must hold 1 (a token) and 0 (padding) only")
        if text.shape[1] > LONGEST_TEXT:
            raise InputError(f"{what}: {text.shape[1]} tokens, the model has positions for {LONGEST_TEXT}: shorten it")
        if not np.isfinite(text[mask.astype(bool)]).all():
            raise InputError(f"{what}: text holds values that are not finite")
        known = np.where(mask[:, :, None] != 0, text, 0)
        return Embedded(known.astype(np.float32), mask.astype(np.int64))

    def at(self, images: npt.NDArray[np.int64]) -> Embedded:
        """The texts of these images, by their numbers; one may come several times."""
        return Embedded(self.text[images], self.mask[images])

    def inputs(self, spec: ModelSpec) -> dict[str, HostArray]:
        """By the names that the model's graphs take them under."""
        return dict(zip((tensor.name for tensor in spec.conditioning), (self.text, self.mask), strict=True))


@dataclass(frozen=True, eq=False)
class Prompts:
    """What B images are to show, and what guidance leads away from; both may have their own length.

    Without `negative` there is no guidance that needs one (`cfg`, `ccfg`).
    """

    positive: Embedded
    negative: Embedded | None = None

    def checked(self, spec: ModelSpec) -> Prompts:
        """Raises InputError for what the model cannot take."""
        positive = self.positive.checked(spec, "prompts")
        negative = self.negative.checked(spec, "negative prompts") if self.negative else None
        if negative and len(negative.text) != len(positive.text):
            raise InputError(
                f"{len(positive.text)} prompts and {len(negative.text)} negative ones: one for each image, please"
            )
        return Prompts(positive, negative)

    def at(self, images: npt.NDArray[np.int64]) -> Prompts:
        """As `Embedded.at`, for all that is told."""
        return Prompts(self.positive.at(images), self.negative.at(images) if self.negative else None)

    def __len__(self) -> int:
        """Images."""
        return len(self.positive.text)


def joined(parts: list[Mapping[str, HostArray]]) -> dict[str, HostArray]:
    """Inputs one below the other; what is shorter behind the rows is filled with zeros, which a mask leaves out."""
    found = {}
    for name in parts[0]:
        arrays = [part[name] for part in parts]
        longest = np.max([array.shape[1:] for array in arrays], axis=0)
        found[name] = np.concatenate([_filled(array, longest) for array in arrays])
    return found


def _filled(array: HostArray, shape: npt.NDArray[np.int64]) -> HostArray:
    missing = [(0, int(most) - size) for size, most in zip(array.shape[1:], shape, strict=True)]
    return np.pad(array, [(0, 0), *missing]) if any(more for _, more in missing) else array

"""What a text-to-image model is told: text as an encoder embedded it.

L is the number of tokens of the longest prompt, W the width of the text's embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from elit_export.arrays import Arrays, HostArray, Int64, refuse_masked
from elit_export.errors import InputError, summary
from elit_export.spec import MAX_TEXT_TOKENS, TEXT, TEXT_MASK, ModelSpec, Range


@dataclass(frozen=True, eq=False)
class Embedded:
    """Texts of B images: `text` (B, L, W) and `mask` (B, L), 1 for a token, 0 for padding."""

    text: HostArray
    mask: HostArray

    def checked(self, spec: ModelSpec, what: str) -> Embedded:
        """As a model takes them, float32 and int64, as long as the longest and empty behind each text.

        Raises InputError naming what is wrong.
        """
        text, mask = _numbers(self.text, f"{what}: text", "fiu"), _numbers(self.mask, f"{what}: mask", "biuf")
        if text.ndim != 3 or text.shape[2] != spec.text_width or not text.size:
            raise InputError(f"{what}: text has shape {text.shape}, must be (images, tokens, {spec.text_width})")
        if mask.shape != text.shape[:2]:
            raise InputError(f"{what}: mask has shape {mask.shape}, the text {text.shape[:2]} tokens")
        if not np.isin(mask, (0, 1)).all():
            raise InputError(f"{what}: mask must hold 1 (a token) and 0 (padding) only")
        cut = Embedded(as_float32(text), mask.astype(np.int64)).without_padding()
        if (tokens := cut.text.shape[1]) > MAX_TEXT_TOKENS:
            raise InputError(f"{what}: {tokens} tokens, the model has positions for {MAX_TEXT_TOKENS}", "shorten it")
        if not np.isfinite(cut.text[cut.mask.astype(bool)]).all():
            raise InputError(f"{what}: text holds values that are not finite in float32")
        return Embedded(np.where(cut.mask[:, :, None] != 0, cut.text, np.float32(0)), cut.mask)

    def without_padding(self) -> Embedded:
        """As long as the longest text: padding that ends every row changes nothing and takes time."""
        used = np.flatnonzero(self.mask.any(axis=0))
        length = int(used[-1]) + 1 if used.size else 1
        return Embedded(self.text[:, :length], self.mask[:, :length])

    def at(self, images: Int64) -> Embedded:
        """The texts of these images, by their numbers; one may come several times."""
        return Embedded(self.text[images], self.mask[images])

    def repeated(self, times: int) -> Embedded:
        """Each text so many times in a row."""
        return self.at(np.arange(len(self.text)).repeat(times))

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
        for name, told, types in (
            ("positive", self.positive, Embedded),
            ("negative", self.negative, Embedded | None),
        ):
            if not isinstance(told, types):
                raise InputError(f"prompts: {name} is {told!r}, must be Embedded(text, mask)")
        positive = self.positive.checked(spec, "prompts")
        negative = self.negative.checked(spec, "negative prompts") if self.negative else None
        if negative and len(negative.text) != len(positive.text):
            raise InputError(
                f"{len(positive.text)} prompts and {len(negative.text)} negative ones", "give one for each image"
            )
        return Prompts(positive, negative)

    @property
    def labels(self) -> tuple[int, ...]:
        """Prompts have no labels."""
        return ()

    @property
    def tokens(self) -> int:
        """How long the longest prompt is, in tokens."""
        return int(self.positive.text.shape[1])

    @property
    def null_tokens(self) -> int:
        """How long the longest negative prompt is; 0 without one."""
        return int(self.negative.text.shape[1]) if self.negative else 0

    def inputs(self, spec: ModelSpec) -> Arrays:
        """Give the prompts by the names that the model's graphs take them under."""
        return self.positive.inputs(spec)

    def null_inputs(self, spec: ModelSpec) -> Arrays:
        """Give the negative prompts; raises InputError where there are none."""
        if self.negative is None:
            raise InputError("it needs negative prompts, and there are none", "give some")
        return self.negative.inputs(spec)

    @classmethod
    def numbered(cls, spec: ModelSpec, numbers: Sequence[int], text: Range | None) -> Prompts:
        """Make noise of each number alone: prompts of `text.opt` tokens, negative ones of `text.min`."""
        assert text
        return cls(_noise(spec, numbers, text.opt, POSITIVE), _noise(spec, numbers, text.min, NEGATIVE))

    @classmethod
    def random(cls, spec: ModelSpec, rows: int, tokens: int, generator: np.random.Generator) -> Prompts:
        """Draw noise, some of it padded."""
        return cls(_noise(spec, generator.integers(0, 1 << 31, rows).tolist(), tokens, POSITIVE))

    def at(self, images: Int64) -> Prompts:
        """Take those of these images, as `Embedded.at` does."""
        return Prompts(self.positive.at(images), self.negative.at(images) if self.negative else None)

    def repeated(self, times: int) -> Prompts:
        """Each prompt so many times in a row, with its negative one: for several images of it."""
        return Prompts(self.positive.repeated(times), self.negative.repeated(times) if self.negative else None)

    def __len__(self) -> int:
        """Images."""
        return len(self.positive.text)


TEXT_SEED = 7
POSITIVE, NEGATIVE = 0, 1


def _noise(spec: ModelSpec, numbers: Sequence[int], tokens: int, kind: int) -> Embedded:
    """Every second text is half as long as the others, and padded."""
    text = np.stack(
        [
            np.random.default_rng((TEXT_SEED, kind, number)).standard_normal((tokens, spec.text_width), np.float32)
            for number in numbers
        ]
    )
    lengths = np.array([tokens if number % 2 == 0 else max(1, tokens // 2) for number in numbers])
    return Embedded(text, (np.arange(tokens) < lengths[:, None]).astype(np.int64))


def _numbers(values: object, what: str, kinds: str) -> HostArray:
    """An array of one of NumPy's `kinds` of numbers; raises InputError."""
    refuse_masked(values, what)
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, RuntimeError) as error:  # lists of different lengths, tensors of other libraries
        raise InputError(
            f"{what} is no array of numbers ({summary(error)})", f"give one of NumPy, e.g. {OF_TORCH}"
        ) from error
    if array.dtype.kind not in kinds:
        raise InputError(f"{what} holds {array.dtype}, must be numbers", f"e.g. {OF_TORCH}")
    return array


OF_TORCH = "tensor.detach().float().cpu().numpy()"


def as_float32(values: HostArray) -> HostArray:
    """What is larger than float32 can say becomes infinite, in silence: who takes it asks whether it is finite."""
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


# ---------------------------------------------------------------- inputs of engines


def joined(parts: list[Mapping[str, HostArray]]) -> dict[str, HostArray]:
    """Inputs one below the other; what is shorter behind the rows is filled with zeros, which a mask leaves out."""
    found = {}
    for name in parts[0]:
        arrays = [part[name] for part in parts]
        longest = np.max([array.shape[1:] for array in arrays], axis=0)
        found[name] = np.concatenate([_filled(array, longest) for array in arrays])
    return found


def filled(inputs: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    """The inputs with text of at least so many tokens, padding where there are fewer."""
    if TEXT not in inputs:
        return dict(inputs)
    text, mask = inputs[TEXT], inputs[TEXT_MASK]
    longest = max(tokens, text.shape[1])
    return {
        **inputs,
        TEXT: _filled(text, np.array([longest, text.shape[2]])),
        TEXT_MASK: _filled(mask, np.array([longest])),
    }


def _filled(array: HostArray, shape: Int64) -> HostArray:
    missing = [(0, int(most) - size) for size, most in zip(array.shape[1:], shape, strict=True)]
    return np.pad(array, [(0, 0), *missing]) if any(more for _, more in missing) else array

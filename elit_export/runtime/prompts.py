"""Prompts as embeddings: the conditioning of text-to-image models.

L is the number of tokens of the longest prompt, W the width of an embedding.
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
    """The embedded texts of B images: `text` (B, L, W) and `mask` (B, L), 1 for a token, 0 for padding."""

    text: HostArray
    mask: HostArray

    def checked(self, spec: ModelSpec, what: str) -> Embedded:
        """Return the texts as a model takes them: float32 and int64, zero in the padding, as long as the longest text.

        Raises InputError naming what is wrong.
        """
        text, mask = _numbers(self.text, f"{what}: text", "fiu"), _numbers(self.mask, f"{what}: mask", "biuf")
        if text.ndim != 3 or text.shape[2] != spec.text_width or not text.size:
            raise InputError(f"{what}: text has shape {text.shape}, must be (images, tokens, {spec.text_width})")
        if mask.shape != text.shape[:2]:
            raise InputError(f"{what}: mask has shape {mask.shape}, the text {text.shape[:2]} tokens")
        if not np.isin(mask, (0, 1)).all():
            raise InputError(f"{what}: mask must hold 1 (a token) and 0 (padding) only")
        trimmed = Embedded(as_float32(text), mask.astype(np.int64)).without_padding()
        if (tokens := trimmed.text.shape[1]) > MAX_TEXT_TOKENS:
            raise InputError(f"{what}: {tokens} tokens, the model has positions for {MAX_TEXT_TOKENS}", "shorten it")
        if not np.isfinite(trimmed.text[trimmed.mask.astype(bool)]).all():
            raise InputError(f"{what}: text holds values that are not finite in float32")
        return Embedded(np.where(trimmed.mask[:, :, None] != 0, trimmed.text, np.float32(0)), trimmed.mask)

    def without_padding(self) -> Embedded:
        """Cut to the length of the longest text: padding at the end of all rows changes nothing and takes time."""
        used = np.flatnonzero(self.mask.any(axis=0))
        length = int(used[-1]) + 1 if used.size else 1
        return Embedded(self.text[:, :length], self.mask[:, :length])

    def at(self, images: Int64) -> Embedded:
        """Select the texts of images by number; one may be selected several times."""
        return Embedded(self.text[images], self.mask[images])

    def repeated(self, times: int) -> Embedded:
        """Repeat each text so many times in a row."""
        return self.at(np.arange(len(self.text)).repeat(times))

    def inputs(self, spec: ModelSpec) -> dict[str, HostArray]:
        """Return the arrays by the names of the graphs' inputs."""
        return dict(zip((tensor.name for tensor in spec.conditioning), (self.text, self.mask), strict=True))


@dataclass(frozen=True, eq=False)
class Prompts:
    """The prompts and negative prompts of B images; the two may differ in length.

    Without `negative`, guidance that has an unconditional branch (`cfg`, `ccfg`) is refused.
    """

    positive: Embedded
    negative: Embedded | None = None

    def checked(self, spec: ModelSpec) -> Prompts:
        """Return the prompts as the model takes them; raises InputError for what it cannot take."""
        for name, embedded, types in (
            ("positive", self.positive, Embedded),
            ("negative", self.negative, Embedded | None),
        ):
            if not isinstance(embedded, types):
                raise InputError(f"prompts: {name} is {embedded!r}, must be Embedded(text, mask)")
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
        """The length of the longest prompt in tokens."""
        return int(self.positive.text.shape[1])

    @property
    def null_tokens(self) -> int:
        """The length of the longest negative prompt; 0 without one."""
        return int(self.negative.text.shape[1]) if self.negative else 0

    def inputs(self, spec: ModelSpec) -> Arrays:
        """Return the prompts by the names of the graphs' inputs."""
        return self.positive.inputs(spec)

    def null_inputs(self, spec: ModelSpec) -> Arrays:
        """Return the negative prompts; raises InputError if there are none."""
        if self.negative is None:
            raise InputError("it needs negative prompts, and there are none", "give some")
        return self.negative.inputs(spec)

    @classmethod
    def numbered(cls, spec: ModelSpec, numbers: Sequence[int], text: Range | None) -> Prompts:
        """Draw noise from each number alone: prompts of `text.opt` tokens, negative ones of `text.min`."""
        assert text
        return cls(_noise(spec, numbers, text.opt, POSITIVE), _noise(spec, numbers, text.min, NEGATIVE))

    @classmethod
    def random(cls, spec: ModelSpec, rows: int, tokens: int, generator: np.random.Generator) -> Prompts:
        """Draw noise, with padding in some rows."""
        return cls(_noise(spec, generator.integers(0, 1 << 31, rows).tolist(), tokens, POSITIVE))

    def at(self, images: Int64) -> Prompts:
        """Select the prompts of images, as `Embedded.at` does."""
        return Prompts(self.positive.at(images), self.negative.at(images) if self.negative else None)

    def repeated(self, times: int) -> Prompts:
        """Repeat each prompt and its negative prompt so many times in a row, for several images of it."""
        return Prompts(self.positive.repeated(times), self.negative.repeated(times) if self.negative else None)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.positive.text)


TEXT_SEED = 7
POSITIVE, NEGATIVE = 0, 1


def _noise(spec: ModelSpec, numbers: Sequence[int], tokens: int, kind: int) -> Embedded:
    """Draw noise as text; prompts with odd numbers are half as long, and padded."""
    text = np.stack(
        [
            np.random.default_rng((TEXT_SEED, kind, number)).standard_normal((tokens, spec.text_width), np.float32)
            for number in numbers
        ]
    )
    lengths = np.array([tokens if number % 2 == 0 else max(1, tokens // 2) for number in numbers])
    return Embedded(text, (np.arange(tokens) < lengths[:, None]).astype(np.int64))


def _numbers(values: object, what: str, kinds: str) -> HostArray:
    """Return an array of one of NumPy's `kinds` of numbers; raises InputError."""
    refuse_masked(values, what)
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, RuntimeError) as error:  # lists of different lengths, tensors of other libraries
        raise InputError(
            f"{what} is not an array of numbers ({summary(error)})", f"give one of NumPy, e.g. {TORCH_EXAMPLE}"
        ) from error
    if array.dtype.kind not in kinds:
        raise InputError(f"{what} holds {array.dtype}, must be numbers", f"e.g. {TORCH_EXAMPLE}")
    return array


TORCH_EXAMPLE = "tensor.detach().float().cpu().numpy()"


def as_float32(values: HostArray) -> HostArray:
    """Convert to float32. Values out of range become infinite without a warning: callers check for finite values."""
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


# ---------------------------------------------------------------- inputs of engines


def joined(parts: list[Mapping[str, HostArray]]) -> dict[str, HostArray]:
    """Concatenate the rows of inputs; shorter texts are padded with zeros, which the mask excludes."""
    inputs = {}
    for name in parts[0]:
        arrays = [part[name] for part in parts]
        max_shape = np.max([array.shape[1:] for array in arrays], axis=0)
        inputs[name] = np.concatenate([_filled(array, max_shape) for array in arrays])
    return inputs


def filled(inputs: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    """Return the inputs with text padded to at least so many tokens."""
    if TEXT not in inputs:
        return dict(inputs)
    text, mask = inputs[TEXT], inputs[TEXT_MASK]
    length = max(tokens, text.shape[1])
    return {
        **inputs,
        TEXT: _filled(text, np.array([length, text.shape[2]])),
        TEXT_MASK: _filled(mask, np.array([length])),
    }


def _filled(array: HostArray, shape: Int64) -> HostArray:
    padding = [(0, int(target) - size) for size, target in zip(array.shape[1:], shape, strict=True)]
    return np.pad(array, [(0, 0), *padding]) if any(count for _, count in padding) else array

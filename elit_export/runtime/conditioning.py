"""What the samplings that compare and measure are to show: labels, or in models with text random prompts.

A prompt is a function of its number alone. Text of noise serves here as real text would: an engine multiplies both.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from elit_export.arrays import Arrays
from elit_export.errors import InputError
from elit_export.runtime.pipeline import Pipeline, Subjects
from elit_export.runtime.prompts import Embedded, Prompts
from elit_export.spec import ModelSpec, Range

TEXT_SEED = 7
POSITIVE, NEGATIVE = 0, 1


def text_of(pipeline: Pipeline) -> Range | None:
    """The tokens of text that its engines take; None in models without."""
    return pipeline.bank.slots[0].profile.text


def tokens_of(pipeline: Pipeline) -> int:
    """The usual length of text, 0 in models without."""
    text = text_of(pipeline)
    return text.opt if text else 0


def subjects_of(spec: ModelSpec, numbers: Sequence[int], text: Range | None) -> Subjects:
    """Labels going round the classes, or prompts: `text.opt` tokens long, with negative ones of `text.min`."""
    if not spec.text_width:
        return [number % spec.num_classes for number in numbers]
    assert text
    return Prompts(_embedded(spec, numbers, text.opt, POSITIVE), _embedded(spec, numbers, text.min, NEGATIVE))


def conditioning_rows(spec: ModelSpec, rows: int, tokens: int, generator: np.random.Generator) -> Arrays:
    """Rows for an engine: labels of all classes and none, or text of so many tokens with some padding."""
    if not spec.text_width:
        return {spec.conditioning[0].name: generator.integers(0, spec.null_class + 1, rows)}
    return _embedded(spec, generator.integers(0, 1 << 31, rows).tolist(), tokens, POSITIVE).inputs(spec)


def _embedded(spec: ModelSpec, numbers: Sequence[int], tokens: int, kind: int) -> Embedded:
    """Every second prompt is half as long as the others, and filled up with padding."""
    text = np.stack(
        [
            np.random.default_rng((TEXT_SEED, kind, number)).standard_normal((tokens, spec.text_width), np.float32)
            for number in numbers
        ]
    )
    lengths = np.array([tokens if number % 2 == 0 else max(1, tokens // 2) for number in numbers])
    return Embedded(text, (np.arange(tokens) < lengths[:, None]).astype(np.int64))


def require_classes(spec: ModelSpec, what: str) -> None:
    """Raise InputError for a model with text, which something is not made for."""
    if spec.text_width:
        raise InputError(f"{what} works with models of classes only, this one takes text")

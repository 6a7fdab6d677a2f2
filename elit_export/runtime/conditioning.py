"""The conditioning of a sampling: labels in class-conditional models, prompts in models with text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np

from elit_export.arrays import Arrays, Int64, refuse_masked
from elit_export.errors import InputError
from elit_export.runtime.labels import label_named
from elit_export.runtime.prompts import Prompts
from elit_export.spec import DataFacts, ModelSpec, Range
from elit_export.spec.limits import IMAGES


class Conditioning(Protocol):
    """The condition of each of B images, and of its unconditional branch: no class, or a negative prompt."""

    def __len__(self) -> int:
        """Say how many images there are."""

    @property
    def labels(self) -> tuple[int, ...]:
        """The labels of a class-conditional model; empty for prompts."""

    @property
    def tokens(self) -> int:
        """The length of the longest prompt in tokens; 0 for labels."""

    @property
    def null_tokens(self) -> int:
        """The length of the longest negative prompt; 0 for labels."""

    def at(self, images: Int64) -> Self:
        """Select images by number; one may be selected several times."""

    def repeated(self, times: int) -> Self:
        """Repeat each image so many times in a row."""

    def inputs(self, spec: ModelSpec) -> Arrays:
        """Give the inputs of an engine, by name, a row for each image."""

    def null_inputs(self, spec: ModelSpec) -> Arrays:
        """Give those of the unconditional branch; raises InputError where there is none."""

    @classmethod
    def numbered(cls, spec: ModelSpec, numbers: Sequence[int], text: Range | None) -> Self:
        """Make a condition that depends on each number alone; `text` bounds the tokens of prompts."""

    @classmethod
    def random(cls, spec: ModelSpec, rows: int, tokens: int, generator: np.random.Generator) -> Self:
        """Draw random conditions that the model accepts, with so many tokens of text."""


@dataclass(frozen=True)
class Labels:
    """One class for each image; `null_class` of the spec means no class."""

    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def tokens(self) -> int:
        return 0

    null_tokens = tokens

    def at(self, images: Int64) -> Labels:
        return Labels(tuple(self.labels[image] for image in images))

    def repeated(self, times: int) -> Labels:
        return self.at(np.arange(len(self)).repeat(times))

    def inputs(self, spec: ModelSpec) -> Arrays:
        return {spec.conditioning[0].name: np.array(self.labels, np.int64)}

    def null_inputs(self, spec: ModelSpec) -> Arrays:
        return Labels((spec.null_class,) * len(self)).inputs(spec)

    @classmethod
    def numbered(cls, spec: ModelSpec, numbers: Sequence[int], text: Range | None) -> Labels:
        """Take the classes in turn."""
        return cls(tuple(number % spec.num_classes for number in numbers))

    @classmethod
    def random(cls, spec: ModelSpec, rows: int, tokens: int, generator: np.random.Generator) -> Labels:
        """Draw from all classes and none."""
        return cls(tuple(generator.integers(0, spec.null_class + 1, rows).tolist()))


LabelsLike = Sequence[int | str] | Labels | Prompts  # what callers give; a str is the name of a class


def kind_of(spec: ModelSpec) -> type[Labels] | type[Prompts]:
    """Return the class of conditioning that a model takes."""
    return Prompts if spec.takes_text else Labels


def as_conditioning(labels: LabelsLike, spec: ModelSpec, data: DataFacts) -> Conditioning:
    """Turn labels, class names or prompts into the conditioning that the model takes; raises InputError."""
    if kind_of(spec) is Prompts:
        if not isinstance(labels, Prompts):
            raise InputError(f"this model takes prompts, not {labels!r}", "give Prompts, embedded by a text encoder")
        return labels.checked(spec)
    if isinstance(labels, Prompts):
        raise InputError(f"this model takes labels 0 to {spec.null_class}, not prompts")
    return Labels(_checked_labels(labels.labels if isinstance(labels, Labels) else labels, spec, data))


def _checked_labels(labels: Sequence[int | str], spec: ModelSpec, data: DataFacts) -> tuple[int, ...]:
    refuse_masked(labels, "labels")
    if hasattr(labels, "__len__"):
        IMAGES.check(len(labels), "the number of labels", "give fewer")
    if isinstance(labels, list | tuple):
        labels = [label_named(label, data) if isinstance(label, str) else label for label in labels]
    try:
        y = np.asarray(labels)
    except ValueError:  # lists of different lengths
        y = np.empty(0)
    if y.ndim != 1 or not len(y) or not np.issubdtype(y.dtype, np.integer):
        raise InputError(f"labels must be a list of at least one whole number or class name, not {labels!r}")
    if y.min() < 0 or y.max() > spec.null_class:
        wrong = next(label for label in y if not 0 <= label <= spec.null_class)
        raise InputError(
            f"label {wrong} is out of range: classes are 0 to {spec.num_classes - 1}, {spec.null_class} means no class"
        )
    return tuple(y.tolist())


def numbered(spec: ModelSpec, numbers: Sequence[int], text: Range | None) -> Labels | Prompts:
    """Return conditions for samplings that measure; engines take the same time on random prompts as on real ones."""
    return kind_of(spec).numbered(spec, numbers, text)


def random_rows(spec: ModelSpec, rows: int, tokens: int, generator: np.random.Generator) -> Arrays:
    """Return random conditioning for so many rows of an engine, with so many tokens of text."""
    return kind_of(spec).random(spec, rows, tokens, generator).inputs(spec)


def require_classes(spec: ModelSpec, what: str) -> None:
    """Raise InputError for a model with text; `what` is the function that does not support it."""
    if kind_of(spec) is not Labels:
        raise InputError(f"{what} works with class-conditional models only, this one takes text")

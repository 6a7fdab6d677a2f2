"""Labels and names of classes as people type them → labels."""

from __future__ import annotations

import re

from elit_export.errors import InputError
from elit_export.spec import DataFacts, ModelSpec
from elit_export.spec.limits import IMAGES

NUMBER = re.compile(r"\d+", re.ASCII)
ALONE = re.compile(r"label:(\d+)", re.ASCII)  # means a label, whatever classes are named
RANGE = re.compile(r"(\d+)-(\d+)", re.ASCII)


def label_named(name: str, data: DataFacts, known_forms: str = "a number") -> int:
    """The label of a class by its name, in the case of its letters or, where one class has it, in any.

    Raises InputError, which tells what else it may be.
    """
    if name in data.class_names and data.class_names.count(name) == 1:
        return data.class_names.index(name)
    matches = [label for label, known in enumerate(data.class_names) if known.lower() == name.lower()]
    if len(matches) > 1:
        raise InputError(
            f"label {name!r} is the name of {len(matches)} classes, those of labels {', '.join(map(str, matches))}",
            f"give the number of the one you mean (in --labels: label:{matches[0]})",
        )
    if not matches:
        known = f"; class names: {', '.join(data.class_names)}" if data.class_names else ""
        raise InputError(f"label {name!r} is neither {known_forms} nor a class name{known}")
    return matches[0]


def parse_labels(text: str, spec: ModelSpec, data: DataFacts) -> list[int]:
    """`3,3,7`, `0-9`, class names, or nothing for the first ten classes; raises InputError.

    Where classes are named by numbers that are not their labels, numbers and ranges are of names, as a number that
    may mean two classes means neither. `label:3` is always the label 3.
    """
    if not text:
        return list(range(min(10, spec.num_classes)))
    labels: list[int] = []
    for part in (part.strip() for part in text.split(",")):
        labels += _labels_of(part, spec, data)
        IMAGES.check(len(labels), "the number of labels", "give fewer")
    return labels


def named_by_numbers(data: DataFacts) -> bool:
    """Whether a class has the name of a number that is not its label."""
    numbered = ((label, name) for label, name in enumerate(data.class_names) if NUMBER.fullmatch(name))
    return any(str(label) != name for label, name in numbered)


def _labels_of(part: str, spec: ModelSpec, data: DataFacts) -> list[int] | range:
    if alone := ALONE.fullmatch(part):
        return [_label(alone[1], part, spec)]
    ends = RANGE.fullmatch(part)
    if ends and part.lower() in (name.lower() for name in data.class_names):
        label = label_named(part, data)
        raise InputError(f"label {part!r} is a range and the name of class {label}", f"give its number, label:{label}")
    if named_by_numbers(data):
        return _range_of_names(ends[1], ends[2], data) if ends else [_name(part, data)]
    if ends:
        first, last = (_label(end, part, spec) for end in ends.groups())
        if first > last:
            raise InputError(f"label range {part} runs backwards", f"write {last}-{first}")
        return range(first, last + 1) if last <= spec.null_class else [last]  # one out of range is enough
    is_number = NUMBER.fullmatch(part) and part not in data.class_names
    return [_label(part, part, spec) if is_number else label_named(part, data, "a number, a range like 0-9")]


def _label(digits: str, part: str, spec: ModelSpec) -> int:
    """A number; raises InputError for one of more digits than any label has."""
    if len(digits.lstrip("0")) > len(str(spec.null_class)):
        raise InputError(
            f"label {part[:40]} is out of range: classes are 0 to {spec.num_classes - 1}",
            f"give one of them, or {spec.null_class} for no class",
        )
    return int(digits)


def _name(part: str, data: DataFacts) -> int:
    """The label of a class where classes are named by numbers; raises InputError."""
    if NUMBER.fullmatch(part) and part not in data.class_names:
        raise InputError(
            f"label {part[:40]!r} is not the name of a class, and where classes are named by numbers these are not "
            f"taken for labels",
            f"give one of the names {', '.join(data.class_names)}, or label:NUMBER for a label",
        )
    return label_named(part, data, "a range like 1-3")


def _range_of_names(first: str, last: str, data: DataFacts) -> list[int]:
    """List every name from the first to the last by number, written as wide as the first; raises InputError."""
    ends = [_name(end, data) for end in (first, last)]
    assert len(ends) == 2
    if int(first) > int(last):
        raise InputError(f"label range {first}-{last} runs backwards", f"write {last}-{first}")
    IMAGES.check(int(last) - int(first), "the number of labels", "give fewer")
    return [_name(f"{number:0{len(first)}}", data) for number in range(int(first), int(last) + 1)]

"""Labels as people type them: numbers, ranges, names, and classes that are named by numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from elit_export.errors import InputError
from elit_export.runtime.conditioning import as_conditioning
from elit_export.runtime.labels import parse_labels
from elit_export.runtime.prompts import Embedded
from elit_export.runtime.request import finite_array
from elit_export.spec import PIXELS
from tests.helpers import tiny_spec

SPEC = tiny_spec(num_classes=10)
NUMBERED = tuple(sorted(str(number) for number in range(1, 11)))  # "1", "10", "2", …: in order of name
WORDS = ("cat", "dog", "t-shirt", "1-3", "Cat", "5", "bag", "hat", "sun", "sea")


def labels_of(text: str, names: Sequence[str] = ()) -> list[int]:
    return parse_labels(text, SPEC, replace(PIXELS, class_names=tuple(names)))


def names_of(text: str, names: Sequence[str]) -> list[str]:
    return [names[label] for label in labels_of(text, names)]


def test_numbers_and_ranges_are_labels_where_no_class_has_a_number_for_a_name() -> None:
    assert labels_of("3,3,7,0-2,10") == [3, 3, 7, 0, 1, 2, 10]
    assert labels_of("007") == [7]
    assert labels_of("") == list(range(10))


def test_ranges_and_lists_agree_where_classes_are_named_by_numbers() -> None:
    """They are names there, as the pictures of class 3 are not those of label 3."""
    assert names_of("1,2,3", NUMBERED) == names_of("1-3", NUMBERED) == ["1", "2", "3"]
    assert names_of("1-10", NUMBERED) == [str(number) for number in range(1, 11)]
    padded = [f"{number:02}" for number in (7, 8, 9, 10, 11)]
    assert names_of("08-10", padded) == names_of("08,09,10", padded) == ["08", "09", "10"]


def test_numbers_that_are_names_and_labels_alike_agree() -> None:
    digits = [str(number) for number in range(10)]
    assert labels_of("0,9,2-4,10", digits) == [0, 9, 2, 3, 4, 10]


@pytest.mark.parametrize(
    ("text", "names", "told"),
    [
        ("0", NUMBERED, "'0' is not the name of a class, and where classes are named by numbers .*; give one of the"),
        ("0-3", NUMBERED, "label '0' is not the name of a class"),
        ("9-11", NUMBERED, "label '11' is not the name of a class"),
        ("3-1", NUMBERED, "label range 3-1 runs backwards; write 1-3"),
        ("3-1", (), "label range 3-1 runs backwards; write 1-3"),
        ("1-3", WORDS[:5], "label '1-3' is a range and the name of class 3; give its number, label:3"),
        ("CAT", WORDS[:5], "label 'CAT' is the name of 2 classes, those of labels 0, 4; give the number of the one"),
        ("5", WORDS, ""),
        ("11", (), "label 11 is out of range: classes are 0 to 9"),
        ("bird", ("cat",), "neither a number, a range like 0-9 nor a class name; class names: cat"),
        ("³", (), "label '³' is neither a number"),
    ],
)
def test_what_may_mean_two_classes_is_refused(text: str, names: Sequence[str], told: str) -> None:
    data = replace(PIXELS, class_names=tuple(names))
    if not told:
        assert parse_labels(text, SPEC, data) == [5]
        return
    with pytest.raises(InputError, match=told):
        as_conditioning(parse_labels(text, SPEC, data), SPEC, data)


@pytest.mark.parametrize("names", [(), WORDS, NUMBERED, ("1-3", *NUMBERED[:9])])
def test_every_label_and_that_of_no_class_can_be_given_whatever_classes_are_named(names: Sequence[str]) -> None:
    assert labels_of(",".join(f"label:{label}" for label in range(11)), names) == list(range(11))
    with pytest.raises(InputError, match=r"label label:123 is out of range.*give one of them, or 10 for no class"):
        labels_of("label:123", names)


def test_what_the_remedies_of_labels_say_is_taken() -> None:
    """Where classes are named by numbers too."""
    names = ("1-3", "Cat", "cat", *NUMBERED[:7])
    for text in ("1-3", "CAT", "9999"):
        with pytest.raises(InputError) as refused:
            labels_of(text, names)
        given = refused.value.remedy[refused.value.remedy.index("label:") :].split()[0].rstrip("),")
        assert labels_of(given.replace("NUMBER", "4"), names) == [{"1-3": 0, "CAT": 1}.get(text, 4)]


def test_names_are_found_in_any_case_and_first_in_their_own() -> None:
    assert labels_of("cat,Cat,DOG,T-Shirt", WORDS[:5]) == [0, 4, 1, 2]


def test_many_labels_are_refused_before_they_are_listed() -> None:
    spec = tiny_spec(num_classes=1_000_000)
    with pytest.raises(InputError, match=r"number of labels is 2,000,000, at most 1,000,000 images"):
        parse_labels(",".join(["0-999999"] * 2000), spec, PIXELS)


@pytest.mark.parametrize("given", [np.ma.masked_array([1, 2], [False, True]), [1, np.ma.masked]], ids=str)
def test_masked_labels_are_refused(given: object) -> None:
    with pytest.raises(InputError, match=r"labels is a masked array; fill it first: array\.filled\(VALUE\)"):
        as_conditioning(given, SPEC, PIXELS)  # type: ignore[arg-type]


def test_masked_noise_and_prompts_are_refused() -> None:
    masked = np.ma.masked_array(np.zeros((1, 2, 8)), True)
    with pytest.raises(InputError, match=r"noise is a masked array; fill it first"):
        finite_array(masked, "noise")
    text = tiny_spec(num_classes=0, text_width=8)
    with pytest.raises(InputError, match=r"text is a masked array; fill it first"):
        Embedded(masked, np.ones((1, 2))).checked(text, "prompts")

"""What a text-to-image model is told: checked, cut, repeated, joined and filled up."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from elit_export.errors import InputError
from elit_export.runtime.prompts import Embedded, Prompts, filled, joined
from elit_export.spec import TEXT, TEXT_MASK
from tests.text_models import text_spec

SPEC = text_spec()
TEXT_OF_TWO = np.random.default_rng(3).standard_normal((2, 5, 24)).astype(np.float32)
MASK = np.array([[1, 1, 0, 0, 0], [1, 0, 1, 0, 0]])


def checked(text: Any = TEXT_OF_TWO, mask: Any = MASK) -> Embedded:
    return Embedded(text, mask).checked(SPEC, "prompts")


# ---------------------------------------------------------------- checked


@pytest.mark.parametrize(
    ("text", "mask"),
    [
        (TEXT_OF_TWO.astype(np.float64), MASK.astype(bool)),
        (TEXT_OF_TWO.tolist(), MASK.tolist()),
        (torch.from_numpy(TEXT_OF_TWO), torch.from_numpy(MASK).float()),
    ],
    ids=["wider", "lists", "tensors"],
)
def test_numbers_of_any_kind_become_float32_and_int64(text: Any, mask: Any) -> None:
    found = checked(text, mask)
    assert (found.text.dtype, found.mask.dtype) == (np.float32, np.int64)
    assert np.array_equal(found.text, TEXT_OF_TWO[:, :3] * MASK[:, :3, None])  # padding is emptied
    assert np.array_equal(found.mask, MASK[:, :3])


def test_padding_that_ends_every_row_is_cut_and_other_padding_stays() -> None:
    assert checked().text.shape == (2, 3, 24)
    assert checked(mask=np.ones((2, 5))).text.shape == (2, 5, 24)
    assert checked(mask=np.zeros((2, 5))).text.shape == (2, 1, 24)  # an engine takes a token at least


def test_padding_beyond_what_the_model_takes_is_no_length() -> None:
    text = np.zeros((1, 2000, 24), np.float32)
    assert checked(text, np.arange(2000)[None] < 7).text.shape[1] == 7
    with pytest.raises(InputError, match="prompts: 1025 tokens, the model has positions for 1024; shorten it"):
        checked(text, np.arange(2000)[None] < 1025)


def of_one_value(value: object, dtype: Any) -> Any:
    text = TEXT_OF_TWO.astype(dtype)
    text[0, 0, 0] = value
    return text


OF_TORCH = r"e\.g\. tensor\.detach\(\)\.float\(\)\.cpu\(\)\.numpy\(\)"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (of_one_value(1e300, np.float64), "text holds values that are not finite in float32"),
        (of_one_value(np.nan, np.float32), "text holds values that are not finite"),
        (of_one_value(1j, np.complex64), "text holds complex64, must be numbers"),
        (TEXT_OF_TWO.astype(object), "text holds object, must be numbers"),
        (TEXT_OF_TWO.astype(str), "text holds <U32, must be numbers"),
        ([[[1.0], [1.0, 2.0]]], rf"text is not an array of numbers \(.*\); give one of NumPy, {OF_TORCH}"),
        (torch.ones(2, 5, 24, requires_grad=True), rf"text is not an array of numbers .*{OF_TORCH}"),
        (torch.ones(2, 5, 24, dtype=torch.bfloat16), rf"text is not an array of numbers .*{OF_TORCH}"),
        (None, "text holds object"),
    ],
    ids=["too large", "nan", "complex", "objects", "words", "ragged", "gradient", "bfloat16", "none"],
)
def test_text_that_is_none_is_named(text: Any, told: str) -> None:
    with pytest.raises(InputError, match=f"prompts: {told}"):
        checked(text)


@pytest.mark.parametrize("mask", [MASK.astype(complex), MASK.astype(object), MASK.astype(str), [[1], [1, 0]]])
def test_a_mask_that_is_none_is_named(mask: Any) -> None:
    with pytest.raises(InputError, match=r"prompts: mask (holds|is not an array)"):
        checked(mask=mask)


def test_what_padding_holds_does_not_matter() -> None:
    assert checked(np.where(MASK[:, :, None], TEXT_OF_TWO, np.inf)).text.shape == (2, 3, 24)


@pytest.mark.parametrize(
    ("prompts", "told"),
    [
        (Prompts(None), "positive is None, must be Embedded"),  # type: ignore[arg-type]
        (Prompts("a fox"), "positive is 'a fox', must be Embedded"),  # type: ignore[arg-type]
        (Prompts(Embedded(TEXT_OF_TWO, MASK), "dark"), "negative is 'dark', must be Embedded"),  # type: ignore[arg-type]
        (Prompts(Embedded(TEXT_OF_TWO, MASK), Embedded(TEXT_OF_TWO[:1], MASK[:1])), "2 prompts and 1 negative ones"),
    ],
)
def test_prompts_that_are_none_are_named(prompts: Prompts, told: str) -> None:
    with pytest.raises(InputError, match=told):
        prompts.checked(SPEC)


def test_repeated_prompts_stand_in_a_row_with_their_negative_ones() -> None:
    told = Prompts(Embedded(TEXT_OF_TWO, MASK), Embedded(-TEXT_OF_TWO, MASK)).repeated(3)
    assert len(told) == 6
    assert told.negative
    for number in range(6):
        assert np.array_equal(told.positive.text[number], TEXT_OF_TWO[number // 3])
        assert np.array_equal(told.negative.text[number], -TEXT_OF_TWO[number // 3])
        assert np.array_equal(told.positive.mask[number], MASK[number // 3])
    assert Prompts(Embedded(TEXT_OF_TWO, MASK)).repeated(2).negative is None


# ---------------------------------------------------------------- inputs of engines


def inputs(tokens: int) -> dict[str, Any]:
    return {"y": np.arange(2), TEXT: TEXT_OF_TWO[:, :tokens], TEXT_MASK: np.ones((2, tokens), np.int64)}


def test_joined_rows_are_as_long_as_the_longest() -> None:
    found = joined([inputs(2), inputs(5)])
    assert found["y"].tolist() == [0, 1, 0, 1]
    assert found[TEXT_MASK].tolist() == [[1, 1, 0, 0, 0]] * 2 + [[1] * 5] * 2
    assert np.array_equal(found[TEXT][2:], TEXT_OF_TWO)
    assert np.array_equal(found[TEXT][:2, :2], TEXT_OF_TWO[:, :2])
    assert not found[TEXT][:2, 2:].any()


def test_filled_text_has_padding_behind_it() -> None:
    found = filled(inputs(2), 4)
    assert found[TEXT_MASK].tolist() == [[1, 1, 0, 0]] * 2
    assert np.array_equal(found[TEXT][:, :2], TEXT_OF_TWO[:, :2])
    assert not found[TEXT][:, 2:].any()
    assert found["y"].tolist() == [0, 1]


def test_text_that_is_long_enough_stays_as_it_is() -> None:
    given = inputs(5)
    found = filled(given, 4)
    assert all(found[name] is given[name] for name in given)
    assert filled({"y": given["y"]}, 4) == {"y": given["y"]}

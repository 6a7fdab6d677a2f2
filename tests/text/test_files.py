"""Embeddings that were written are those that are read; files that are none are refused."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elit_export.errors import InputError
from elit_export.runtime.prompts import Embedded, Prompts
from elit_export.text.files import load_prompts, save_prompts
from tests.text_models import text_spec

SPEC = text_spec()
RANDOM = np.random.default_rng(3)
TEXT = RANDOM.standard_normal((2, 5, 24)).astype(np.float32)
MASK = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
POSITIVE = Embedded(TEXT, MASK)
NEGATIVE = Embedded(TEXT[:, :2], MASK[:, :2])


def assert_same(found: Embedded | None, expected: Embedded | None) -> None:
    assert (found is None) == (expected is None)
    if found and expected:
        assert np.array_equal(found.text, expected.text)
        assert np.array_equal(found.mask, expected.mask)
        assert (found.text.dtype, found.mask.dtype) == (np.float32, np.int64)


@pytest.mark.parametrize("negative", [None, NEGATIVE], ids=["alone", "guided"])
def test_what_is_written_is_read(tmp_path: Path, negative: Embedded | None) -> None:
    path = tmp_path / "made" / "p.npz"
    save_prompts(path, Prompts(POSITIVE, negative), texts=["a fox", " "], negatives=["dark"] if negative else [])
    found = load_prompts(path, SPEC)
    assert_same(found.positive, POSITIVE)
    assert_same(found.negative, negative)
    found.checked(text_spec())
    assert [file.name for file in path.parent.iterdir()] == ["p.npz"]
    with np.load(path) as file:
        assert file["prompts"].tolist() == ["a fox", " "]
        assert ("negative_prompts" in file) == (negative is not None)


def test_the_same_embeddings_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.npz", "b.npz"):
        save_prompts(tmp_path / name, Prompts(POSITIVE), texts=["x", "y"])
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_a_file_of_numpy_alone_is_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "p.npz", text=TEXT.astype(np.float16), mask=MASK.astype(bool))
    assert_same(
        load_prompts(tmp_path / "p.npz", SPEC).positive, Embedded(TEXT.astype(np.float16).astype(np.float32), MASK)
    )


def test_another_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"p\.npy: embeddings are written as \.npz"):
        save_prompts(tmp_path / "p.npy", Prompts(POSITIVE))


def test_a_missing_file_is_named_with_what_makes_one(tmp_path: Path) -> None:
    told = r"no embeddings at .*p\.npz; write it with elit-export embed FOLDER --prompt TEXT --out FILE\.npz"
    with pytest.raises(InputError, match=told):
        load_prompts(tmp_path / "p.npz", SPEC)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"text"])
def test_what_is_no_npz_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "p.npz").write_bytes(content)
    with pytest.raises(InputError, match=r"p\.npz: not a \.npz of plain arrays, or damaged; write it with"):
        load_prompts(tmp_path / "p.npz", SPEC)


def test_a_single_array_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "p.npz").open("wb") as file:
        np.save(file, TEXT)
    with pytest.raises(InputError, match=r"p\.npz: not a \.npz of plain arrays"):
        load_prompts(tmp_path / "p.npz", SPEC)


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    save_prompts(tmp_path / "p.npz", Prompts(POSITIVE))
    (tmp_path / "p.npz").write_bytes((tmp_path / "p.npz").read_bytes()[:-200])
    with pytest.raises(InputError, match="or damaged"):
        load_prompts(tmp_path / "p.npz", SPEC)


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "p.npz", text=np.array([{}], dtype=object), mask=MASK)
    with pytest.raises(InputError, match=r"not a \.npz of plain arrays"):
        load_prompts(tmp_path / "p.npz", SPEC)


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ({"text": TEXT}, "has no `mask`; a mask is 1 for a token and 0 for padding; write it with"),
        ({"mask": MASK}, "has no `text`"),
        ({"text": TEXT, "mask": MASK, "negative_text": TEXT}, "has no `negative_mask`"),
        ({"text": TEXT, "mask": MASK, "negative_mask": MASK}, "has no `negative_text`"),
        ({"text": TEXT, "mask": MASK, "y": MASK}, "holds 'y'; known: text, mask, negative_text"),
        (
            {"text": TEXT[0], "mask": MASK},
            r"text is float32 \(5, 24\), must be float32 or float16 \(images, tokens, wi",
        ),
        ({"text": TEXT.astype(int), "mask": MASK}, "text is int64"),
        ({"text": TEXT.view("V4"), "mask": MASK}, r"text is \|?V4"),
        ({"text": TEXT, "mask": MASK.astype(float)}, "mask is float64"),
        ({"text": TEXT, "mask": MASK[:, :2]}, r"mask is int64 \(2, 2\), must be whole numbers \(2, 5\)"),
    ],
)
def test_arrays_that_are_no_embeddings_are_named(tmp_path: Path, arrays: dict[str, Any], told: str) -> None:
    np.savez(tmp_path / "p.npz", **arrays)
    with pytest.raises(InputError, match=rf"p\.npz: {told}"):
        load_prompts(tmp_path / "p.npz", SPEC)


def zipped(path: Path, content: bytes, method: int = zipfile.ZIP_STORED) -> bytes:
    """A `.npz` whose array `text` is such bytes."""
    with zipfile.ZipFile(path, "w", method) as file:
        file.writestr("text.npy", content)
    return path.read_bytes()


def array_bytes(header: str) -> bytes:
    """A `.npy` without any numbers."""
    made = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(made)) + made


def saved() -> bytes:
    made = io.BytesIO()
    np.save(made, TEXT)
    return made.getvalue()


def marked(path: Path, place: int, value: int) -> bytes:
    """With another number in the header before the array (at `place`) and in the list of arrays (two behind that)."""
    content = bytearray(zipped(path, saved()))
    for mark, shift in ((b"PK\x03\x04", 0), (b"PK\x01\x02", 2)):
        content[content.index(mark) + place + shift] = value
    return bytes(content)


def cut_lzma(path: Path) -> bytes:
    content = bytearray(zipped(path, saved(), zipfile.ZIP_LZMA))
    content[60:120] = b"\xff" * 60
    return bytes(content)


FOREIGN = {
    "a header that is no table": lambda path: zipped(path, array_bytes("{'descr': (")),
    "an array larger than any memory": lambda path: zipped(
        path, array_bytes("{'descr': '<f8', 'fortran_order': False, 'shape': (1, 1000000000000000, 24)}")
    ),
    "encrypted": lambda path: marked(path, 6, 1),
    "damaged lzma": cut_lzma,
    "another kind of compression": lambda path: marked(path, 8, 99),
}


@pytest.mark.parametrize("what", list(FOREIGN))
def test_foreign_and_damaged_files_are_refused(tmp_path: Path, what: str) -> None:
    path = tmp_path / "p.npz"
    path.write_bytes(FOREIGN[what](path))
    with pytest.raises(InputError, match=r"p\.npz: not a \.npz of plain arrays, or damaged; write it with"):
        load_prompts(path, SPEC)


def test_numbers_too_large_for_float32_are_told_when_they_are_checked(tmp_path: Path) -> None:
    np.savez(tmp_path / "p.npz", text=np.full((1, 2, 24), 1e300), mask=np.ones((1, 2), int))
    with pytest.raises(InputError, match="prompts: text holds values that are not finite in float32"):
        load_prompts(tmp_path / "p.npz", SPEC).checked(text_spec())


def test_embeddings_of_another_model_are_refused_unread(tmp_path: Path) -> None:
    """What `text` says to hold is larger than any memory, and is not looked for."""
    header = array_bytes("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000, 1024, 8)}")
    (tmp_path / "p.npz").write_bytes(zipped(tmp_path / "p.npz", header))
    told = r"p\.npz: text has shape \(1000000000, 1024, 8\), must be \(images, tokens, 24\) for this model"
    with pytest.raises(InputError, match=told):
        load_prompts(tmp_path / "p.npz", SPEC)


def test_headers_without_end_are_refused(tmp_path: Path) -> None:
    """One that says to be longer than NumPy writes any is not read to its end."""
    head = b"\x93NUMPY\x02\x00" + struct.pack("<I", 1 << 30)
    (tmp_path / "p.npz").write_bytes(zipped(tmp_path / "p.npz", head + bytes(1 << 20), zipfile.ZIP_DEFLATED))
    with pytest.raises(InputError, match=r"or damaged; write it with"):
        load_prompts(tmp_path / "p.npz", SPEC)

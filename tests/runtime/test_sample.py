"""What a sampling gives to Python: files as the command line writes them, one line of text, public names."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import elit_export
from elit_export import errors
from elit_export.errors import ElitExportError, InputError
from elit_export.runtime.images import grid
from elit_export.spec import PIXELS, SD_VAE
from tests.runtime.test_pipeline import SHAPE, Toy


def test_a_sample_saves_its_numbers_and_a_picture(tmp_path: Path) -> None:
    sample = Toy().pipeline.sample([0, 2, 1], steps=3)
    written = sample.save(tmp_path / "made" / "here")
    assert written == (tmp_path / "made/here/samples.npz", tmp_path / "made/here/samples.png")
    with np.load(written[0]) as arrays:
        assert sorted(arrays.files) == ["images", "labels"]
        assert arrays["images"].dtype == np.float32
        assert np.array_equal(arrays["images"], sample.latents.astype(np.float32))
        assert arrays["labels"].tolist() == [0, 2, 1]
    with Image.open(written[1]) as picture:
        assert np.array_equal(np.asarray(picture), np.asarray(grid([sample.images], zoom=2)))


def test_a_sample_saves_every_bit_where_asked(tmp_path: Path) -> None:
    sample = Toy().pipeline.sample([0], steps=3)
    with np.load(sample.save(tmp_path, dtype="float64")[0]) as arrays:
        assert np.array_equal(arrays["images"], sample.latents)
    with pytest.raises(InputError, match="dtype 'float16' is unknown; choose float32 or float64"):
        sample.save(tmp_path / "none", dtype="float16")
    assert not (tmp_path / "none").exists()


def test_latents_of_a_vae_are_saved_as_such_and_need_pictures_for_a_png(tmp_path: Path) -> None:
    sample = Toy(data=SD_VAE).pipeline.sample([0, 1], steps=2)
    (only,) = sample.save(tmp_path)
    with np.load(only) as arrays:
        assert arrays["latents"].shape == (2, *SHAPE)
        assert "images" not in arrays.files
    pictures = np.full((2, 16, 16, 3), 9, np.uint8)
    _, picture = sample.save(tmp_path, pictures=pictures)
    with Image.open(picture) as opened:
        assert np.array_equal(np.asarray(opened), np.asarray(grid([pictures], zoom=2)))


def test_a_sample_prints_as_one_line_without_arrays() -> None:
    said = repr(Toy().pipeline.sample([0] * 8, steps=3))
    assert "\n" not in said
    assert len(said) < 200
    assert "array" not in said


def test_names_of_classes_are_labels() -> None:
    toy = Toy(data=replace(PIXELS, class_names=("Cat", "Dog", "Ankle boot")))
    sample = toy.pipeline.sample(["ankle boot", "Cat", 1], steps=2)
    assert sample.labels == (2, 0, 1)
    with pytest.raises(InputError, match=r"label 'owl' is neither a number nor a class name.*Cat, Dog, Ankle boot"):
        toy.pipeline.sample(["owl"])


def test_every_error_and_result_is_public() -> None:
    raised = {
        name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, ElitExportError)
    }
    public = {*dir(elit_export)} & {*elit_export.__all__}
    assert raised | {"Sample", "StepRecord", "Prompts", "Labels", "Pipeline"} <= public
    for name in elit_export.__all__:
        assert getattr(elit_export, name).__name__ == name

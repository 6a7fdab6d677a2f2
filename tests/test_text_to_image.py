"""From a prompt to a PNG, all real but small: a pipeline of Qwen-Image's classes, its folder built for ONNX Runtime."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from elit_export.cli import main
from elit_export.runtime.images import grid
from tests.small_pipeline import save_pipeline
from tests.vae import decoded, load_vae, pictures, pixels_of, save_vae

STEPS = 4
SIDE = 2 * 16  # of 16 latents a side in the decoder `qwen8`
SHEET = 2 * (SIDE + 2 * 2)  # one small image, twice as large, with a gap around it
GUIDED = ["--steps", STEPS, "--guidance", "cfg:3"]
FOX = ["--prompt", "a red fox in the snow", "--negative", "blurry"]


def elit(*arguments: object) -> str:
    done = CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return " ".join(done.output.split())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    save_pipeline(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(base: Path) -> Path:
    """The pipeline, which has a transformer and a VAE too."""
    return base / "pipeline"


@pytest.fixture(scope="module")
def built(base: Path) -> str:
    """What `build` says."""
    return elit("build", base / "recipe.toml", "--out", base / "bundle")


@pytest.fixture(scope="module")
def bundle(base: Path, built: str) -> Path:
    return base / "bundle"


def drawn(bundle: Path, out: Path, *options: object) -> tuple[np.ndarray, np.ndarray]:
    """The picture (height, width, channels) and its latents."""
    said = elit("sample", bundle, *options, "--out", out)
    assert f"wrote {out} and {out.with_suffix('.npz')}" in said
    with np.load(out.with_suffix(".npz")) as file:
        return np.asarray(Image.open(out)), file["latents"]


def test_what_build_advises_next_draws_a_picture(
    base: Path, built: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TEXT and FOLDER are to be filled in."""
    line = built.partition("next: elit-export ")[2]
    assert line == f"sample {base / 'bundle'} --target cpu --prompt TEXT --encoder FOLDER"
    monkeypatch.chdir(tmp_path)
    elit(*line.replace("FOLDER", str(base / "pipeline")).split())
    assert (tmp_path / "samples.png").is_file()


def test_a_prompt_becomes_a_picture(bundle: Path, encoder: Path, tmp_path: Path) -> None:
    picture, latents = drawn(bundle, tmp_path / "fox.png", *FOX, "--encoder", encoder, *GUIDED)
    assert latents.shape == (1, 8, 16, 16)
    assert picture.shape == (SHEET, SHEET, 3)
    assert picture.std() > 5  # not one colour


def test_every_channel_is_scaled_and_shifted_as_diffusers_does(
    bundle: Path, encoder: Path, base: Path, tmp_path: Path
) -> None:
    picture, latents = drawn(bundle, tmp_path / "fox.png", *FOX, "--encoder", encoder, *GUIDED)
    vae = load_vae(save_vae("qwen8", base / "qwen8"))

    def off_by(pixels: np.ndarray) -> int:
        expected = np.asarray(grid([pictures(pixels)], zoom=2))
        return int(np.abs(picture.astype(int) - expected).max())

    assert off_by(decoded(vae, latents)) <= 1  # a half may round either way
    assert off_by(pixels_of(vae, torch.from_numpy(latents.astype(np.float32))).numpy()) > 10
    vae.register_to_config(latents_std=vae.config.latents_std[::-1])
    assert off_by(decoded(vae, latents)) > 10


def test_what_is_told_decides_the_picture(bundle: Path, encoder: Path, tmp_path: Path) -> None:
    def latents_of(*told: str) -> np.ndarray:
        return drawn(bundle, tmp_path / "s.png", *told, "--encoder", encoder, *GUIDED)[1]

    fox = latents_of(*FOX)
    assert np.array_equal(latents_of(*FOX), fox)
    for other in (["--prompt", "an owl", "--negative", "blurry"], [*FOX[:3], "dark"]):
        assert np.abs(latents_of(*other) - fox).max() > 1e-3


def test_embeddings_made_before_draw_the_same(bundle: Path, encoder: Path, tmp_path: Path) -> None:
    told: list[Any] = [*FOX, "--prompt", "an owl, at night"]
    elit("embed", encoder, *told, "--out", tmp_path / "told.npz")
    first = drawn(bundle, tmp_path / "a.png", *told, "--encoder", encoder, *GUIDED)
    second = drawn(bundle, tmp_path / "b.png", "--prompts", tmp_path / "told.npz", *GUIDED)
    assert len(first[1]) == 2
    assert np.array_equal(first[1], second[1])
    assert np.array_equal(first[0], second[0])
    single = drawn(bundle, tmp_path / "c.png", *FOX, "--encoder", encoder, *GUIDED)[1]
    assert np.abs(single[0] - first[1][0]).max() < 1e-3  # its own prompt and noise, whatever is beside it


def test_guidance_and_time_grid_of_large_models_draw(bundle: Path, encoder: Path, tmp_path: Path) -> None:
    """What docs/text-to-image.md shows: each option changes the picture, and all together draw one."""

    def latents_of(*options: str) -> np.ndarray:
        return drawn(bundle, tmp_path / "s.png", *FOX, "--encoder", encoder, "--steps", STEPS, *options)[1]

    ways = [
        ["--guidance", "cfg:4"],
        ["--guidance", "cfg:4,norm"],
        ["--guidance", "ccfg:4@quarter,norm"],
        ["--guidance", "ccfg:4@quarter,norm", "--time-grid", "shift:2.0"],
    ]
    made = [latents_of(*way) for way in ways]
    assert all(np.isfinite(latents).all() for latents in made)
    assert all(np.abs(one - other).max() > 1e-3 for one, other in itertools.combinations(made, 2))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--images", "9999999"], "at most 1,000,000 images in a call"),
        (["--cache", "teacache:0.1"], "cache teacache:0.1 needs a calibration"),
        (["--cache", "static:mask@11", "--steps", "3"], "mask"),
        (["--seed", "-1"], "seed -1 must lie in"),
    ],
)
def test_an_encoder_is_asked_only_for_what_can_be_drawn(
    bundle: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], told: str
) -> None:
    monkeypatch.setattr("elit_export.text.encoder.load_encoder", None)  # whoever calls it fails
    done = CliRunner().invoke(main, ["sample", str(bundle), "--prompt", "x", "--encoder", str(encoder), *options])
    assert done.exit_code == 2, done.output
    assert told in " ".join(done.output.split())

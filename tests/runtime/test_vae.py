"""Latents to pictures: calls that an engine takes, tiles and their seams."""

from __future__ import annotations

import functools
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from elit_export.arrays import Float32
from elit_export.backends.protocols import FunctionEngine, LateEngine
from elit_export.errors import EngineError, InputError
from elit_export.runtime.bank import EngineBank, Slot
from elit_export.runtime.pipeline import Pipeline
from elit_export.runtime.vae import Decoder, decoder_input, tile_starts
from elit_export.spec import PIXELS, SD_VAE, DataFacts, DecoderSpec, Precision, Profile, Range
from tests.helpers import max_relative, tiny_spec
from tests.vae import decoded, load_vae, pictures, save_vae, torch_decoder

ONE_TO_FOUR = Range(1, 1, 4)


def latents_of(*shape: int, seed: int = 0) -> npt.NDArray[np.float64]:
    return np.random.default_rng(seed).standard_normal(shape)


def repeated(z: Float32) -> Float32:
    """A decoder that looks at one latent at a time: the mean of its channels, and it turned over, in 2 × 2 pixels."""
    mean = z.mean(axis=1, keepdims=True)
    return np.concatenate([mean, -mean, mean * 0.5], axis=1).repeat(2, axis=2).repeat(2, axis=3)


@dataclass
class Watched:
    """A function as an engine's, with the rows of its calls."""

    function: Callable[[Float32], Float32] = repeated
    rows: list[int] = field(default_factory=list)
    given: list[Float32] = field(default_factory=list)

    def __call__(self, z: Float32) -> Float32:
        self.rows.append(len(z))
        self.given.append(self.function(z))
        return self.given[-1]


def spec(side: int, *, channels: int = 4, factor: int = 2, scale: float = 0.5, shift: float = 0.25) -> DecoderSpec:
    return DecoderSpec(
        channels=channels,
        image_channels=3,
        scale=(scale,) * channels,
        shift=(shift,) * channels,
        factor=factor,
        side=side,
    )


# ---------------------------------------------------------------- calls


@pytest.mark.parametrize(
    ("images", "rows", "calls"),
    [
        (1, (1, 1, 4), [1]),
        (4, (1, 1, 4), [4]),
        (9, (1, 1, 4), [4, 4, 1]),
        (1, (3, 3, 4), [3]),
        (5, (3, 3, 4), [4, 3]),
        (3, (1, 1, 1), [1, 1, 1]),
    ],
)
def test_a_batch_is_split_into_calls_that_the_engine_takes(
    images: int, rows: tuple[int, int, int], calls: list[int]
) -> None:
    run = Watched()
    latents = latents_of(images, 4, 8, 8)
    found = Decoder(run, spec(8), Range(*rows))(latents)
    assert run.rows == calls
    assert np.array_equal(found, pictures(repeated((latents / 0.5 + 0.25).astype(np.float32))))


def test_every_channel_has_its_own_scale_and_shift() -> None:
    scale, shift = (0.5, 2.0, 0.25, 1.0), (0.0, 1.0, -2.0, 0.5)
    latents = latents_of(2, 4, 8, 8)
    z = decoder_input(latents, replace(spec(8), scale=scale, shift=shift))
    for channel in range(4):
        wanted = (latents[:, channel] / scale[channel] + shift[channel]).astype(np.float32)
        assert np.array_equal(z[:, channel], wanted)


def test_values_beyond_the_range_are_clipped() -> None:
    run = Watched(lambda z: repeated(z) * 100)
    found = Decoder(run, spec(8), ONE_TO_FOUR)(latents_of(2, 4, 8, 8))
    assert {0, 255} <= set(np.unique(found))
    assert np.array_equal(found[..., 0] > 127, run.given[0][:, 0] > 0)


@pytest.mark.parametrize("shape", [(4, 8, 8), (0, 4, 8, 8), (1, 3, 8, 8), (1, 4, 7, 8), (1, 4, 8, 7)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"latents have shape .*takes \(images, 4, height, width\).*at least 8"):
        Decoder(repeated, spec(8), ONE_TO_FOUR)(np.zeros(shape))


# ---------------------------------------------------------------- where tiles lie


@pytest.mark.parametrize("side", [4, 8, 64])
def test_tiles_cover_a_side_and_overlap_by_a_quarter(side: int) -> None:
    for length in range(side, 5 * side):
        starts = tile_starts(length, side)
        gaps = np.diff(starts)
        assert (starts[0], starts[-1]) == (0, length - side)
        assert (gaps > 0).all()
        assert (gaps <= side * 3 // 4).all()
        fewest = next(count for count in range(1, 99) if side + (count - 1) * side * 3 // 4 >= length)
        assert len(starts) == fewest
        assert not len(gaps) or gaps.max() - gaps.min() <= 1


def test_usual_sizes() -> None:
    assert tile_starts(64, 64) == [0]
    assert tile_starts(112, 64) == [0, 48]
    assert tile_starts(128, 64) == [0, 32, 64]
    assert tile_starts(256, 64) == [0, 48, 96, 144, 192]


@pytest.mark.parametrize("size", [(9, 9), (13, 8), (8, 21), (20, 17)])
def test_a_decoder_that_sees_one_latent_at_a_time_shows_no_seams(size: tuple[int, int]) -> None:
    latents = latents_of(2, 4, *size)
    tiled = Decoder(repeated, spec(8), ONE_TO_FOUR)(latents)
    whole = pictures(repeated((latents / 0.5 + 0.25).astype(np.float32)))
    assert np.abs(tiled.astype(int) - whole).max() <= 1  # a half may round either way
    assert (tiled == whole).mean() > 0.999


def test_tiles_of_one_row_share_calls_and_images_do_not() -> None:
    run = Watched()
    Decoder(run, spec(8), Range(1, 1, 2))(latents_of(2, 4, 8, 20))
    assert run.rows == [2, 1, 2, 1]


def test_tiles_hold_two_rows_and_one_call_beside_the_image() -> None:
    side, factor, length = 8, 8, 86  # 14 tiles to a row
    row_bytes = len(tile_starts(length, side)) * 3 * (side * factor) ** 2 * 4
    given = np.zeros((1, 3, side * factor, side * factor), np.float32)

    def run(z: Float32) -> Float32:
        return given.copy()

    decoder = Decoder(run, spec(side, factor=factor), Range(1, 1, 1))
    latents = latents_of(1, 4, length, length).astype(np.float32)
    tracemalloc.start()
    try:
        image = decoder._tiled(latents[0])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak - image.nbytes < 2.5 * row_bytes


def test_what_the_engine_returned_is_not_written() -> None:
    run = Watched()
    copies: list[Float32] = []
    decoder = Decoder(lambda z: copies.append(run(z).copy()) or run.given[-1], spec(8), ONE_TO_FOUR)
    decoder(latents_of(1, 4, 14, 14))
    assert all(np.array_equal(given, copy) for given, copy in zip(run.given, copies, strict=True))


# ---------------------------------------------------------------- tiles of real decoders


@pytest.fixture(scope="module", params=["kl4", "qwen8"])
def deep(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Attention over a whole tile: its pixels depend on the tile that they are decoded in."""
    return save_vae(request.param, tmp_path_factory.mktemp("decoders") / request.param)


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few convolutions: pixels depend on the latents around them alone."""
    return save_vae("tiny4", tmp_path_factory.mktemp("decoders") / "tiny4")


def by_diffusers(folder: Path, latents: npt.NDArray[np.float64], side: int) -> Float32:
    """Its own tiling."""
    vae, pixels = load_vae(folder), side * 2
    vae.enable_tiling()
    vae.tile_latent_min_size = side
    for name in ("size", "height", "width"):
        setattr(vae, f"tile_sample_min_{name}", pixels)
    for name in ("height", "width"):
        setattr(vae, f"tile_sample_stride_{name}", pixels * 3 // 4)
    return decoded(vae, latents)


@pytest.mark.parametrize("size", [(14, 14), (20, 14), (20, 26)])
def test_whole_tiles_are_joined_as_diffusers_joins_them(deep: Path, size: tuple[int, int]) -> None:
    """Up to where it begins its last, smaller tiles, three quarters of a tile after the last whole one."""
    decoder = torch_decoder(deep, 8)
    latents = latents_of(1, decoder.spec.channels, *size)
    found, expected = decoder._tiled(decoder_input(latents, decoder.spec)[0]), by_diffusers(deep, latents, 8)[0]
    height, width = ((length - 2) * 2 for length in size)
    assert found.shape == expected.shape
    assert max_relative(found[:, :height, :width], expected[:, :height, :width]) <= 1e-4
    assert max_relative(found, expected) > 1e-2  # the rest is of other tiles


@pytest.mark.parametrize("size", [(9, 14), (11, 12), (13, 17)])
def test_every_pixel_is_what_its_tiles_say(deep: Path, size: tuple[int, int]) -> None:
    """The same fading written pixel by pixel, in whatever places tiles lie."""
    decoder = torch_decoder(deep, 8)
    latents = latents_of(1, decoder.spec.channels, *size)
    z = decoder_input(latents, decoder.spec)
    found = decoder._tiled(z[0])
    assert max_relative(found, faded_pixel_by_pixel(decoder.run, z, side=8, factor=2)) <= 1e-5
    untiled = decoder.run(z)[0]
    assert max_relative(found, untiled) > 1e-2  # tiles do change what this decoder says


def faded_pixel_by_pixel(run: Callable[[Float32], Float32], z: Float32, *, side: int, factor: int) -> Any:
    tops, lefts = (tile_starts(length, side) for length in z.shape[2:])
    tiles = {
        (i, j): run(z[:, :, top : top + side, left : left + side])[0]
        for i, top in enumerate(tops)
        for j, left in enumerate(lefts)
    }
    fade = side * factor // 4

    @functools.cache
    def value(i: int, j: int, y: int, x: int) -> Any:
        """Of tile (i, j) once it was faded in; y and x count pixels of the image."""
        down, right = y - tops[i] * factor, x - lefts[j] * factor
        own = tiles[i, j][:, down, right].astype(np.float64)
        if i and down < fade:
            own = own * down / fade + value(i - 1, j, y, x) * (1 - down / fade)
        if j and right < fade:
            own = own * right / fade + value(i, j - 1, y, x) * (1 - right / fade)
        return own

    def last(starts: list[int], pixel: int) -> int:
        return max(index for index, start in enumerate(starts) if start * factor <= pixel)

    height, width = (length * factor for length in z.shape[2:])
    rows = [[value(last(tops, y), last(lefts, x), y, x) for x in range(width)] for y in range(height)]
    return np.array(rows).transpose(2, 0, 1)


def test_far_from_seams_a_shallow_decoder_says_what_it_says_untiled(shallow: Path) -> None:
    """Its pixels see 8 latents around; two tiles of 24, of which the second fades in over latents 18 to 24."""
    decoder, latents = torch_decoder(shallow, 24), latents_of(1, 4, 24, 42)
    z = decoder_input(latents, decoder.spec)
    tiled, whole = decoder._tiled(z[0]), decoder.run(z)[0]
    alone = [*range((18 - 2) * 4), *range((24 + 2) * 4, 42 * 4)]
    assert max_relative(tiled[:, :, : (18 - 2) * 4], whole[:, :, : (18 - 2) * 4]) <= 1e-4
    assert max_relative(tiled[:, :, alone], whole[:, :, alone]) <= 1e-4
    assert max_relative(tiled, whole) > 1e-4  # the seam


# ---------------------------------------------------------------- pipelines


def pipeline_of(
    function: Callable[[Float32], Float32] = repeated, data: DataFacts = SD_VAE, *, decodes: bool = True
) -> Pipeline:
    """A model of 4 × 8 × 8 latents whose velocity is x, with a decoder."""
    model = tiny_spec(in_channels=4)

    def velocity(inputs: Any) -> dict[str, Any]:
        return {"velocity": inputs["x"], "residual": np.zeros((len(inputs["x"]), 16, 16), np.float32)}

    slots = [Slot(Profile("all", Range(1, 4, 4), Range(1, 1, 8)), FunctionEngine(velocity))]
    engine = FunctionEngine(lambda inputs: {"pixels": function(inputs["z"])}) if decodes else None
    bank = EngineBank(slots, model.budgets, Precision.FP32, decoder=engine)
    decoder = Decoder(bank.decode, spec(8), ONE_TO_FOUR) if decodes else None
    return Pipeline(bank, model, data, decoder=decoder)


def test_a_pipeline_decodes_what_it_sampled() -> None:
    pipeline = pipeline_of()
    latents = pipeline.sample([0, 1, 2], steps=3).latents
    assert pipeline.makes_pictures
    assert np.array_equal(pipeline.decode(latents), pictures(repeated((latents / 0.5 + 0.25).astype(np.float32))))
    assert np.array_equal(pipeline.decode(latents.tolist()), pipeline.decode(latents))


def test_without_a_decoder_the_message_names_the_remedy() -> None:
    pipeline = pipeline_of(decodes=False)
    assert not pipeline.makes_pictures
    with pytest.raises(InputError, match=r"\[decoder\] folder = …\) and build again"):
        pipeline.decode(np.zeros((1, 4, 8, 8)))


def test_samples_of_a_pixel_model_are_pictures_as_they_are() -> None:
    pipeline = pipeline_of(data=PIXELS, decodes=False)
    pipeline.spec = tiny_spec(in_channels=3)
    values = latents_of(2, 3, 8, 8)
    assert pipeline.makes_pictures
    assert np.array_equal(pipeline.decode(values), pictures(values))


@pytest.mark.parametrize(
    ("latents", "told"),
    [
        (np.zeros((1, 4, 8, 9)), r"shape \(1, 4, 8, 9\), this model's are"),
        (np.zeros((4, 8, 8)), "this model's are"),
        (np.zeros((0, 4, 8, 8)), "this model's are"),
        (np.full((1, 4, 8, 8), np.nan), "latents holds values that are not finite"),
        ([[1], [1, 2]], "latents is not an array of numbers"),
    ],
)
def test_what_is_no_batch_of_latents_is_refused(latents: Any, told: str) -> None:
    with pytest.raises(InputError, match=told):
        pipeline_of().decode(latents)


def test_pixels_that_are_not_finite_are_an_error() -> None:
    pipeline = pipeline_of(lambda z: repeated(z) * np.float32(np.nan))
    with pytest.raises(EngineError, match="the graph `decode` gave pixels that are not finite"):
        pipeline.decode(np.ones((1, 4, 8, 8)))


def test_samples_say_how_to_get_pictures_with_and_without_a_decoder() -> None:
    for pipeline in (pipeline_of(), pipeline_of(decodes=False)):
        told = r"has one, pipeline\.decode\(sample\.latents\); if it has none, name its folder in the recipe"
        with pytest.raises(InputError, match=told):
            _ = pipeline.sample([0], steps=3).images


class Opened(FunctionEngine):
    """Counts how often it is closed."""

    closed = 0

    def close(self) -> None:
        self.closed += 1


def test_a_late_engine_is_opened_by_its_first_call_and_closed_once() -> None:
    made: list[Opened] = []

    def opener() -> Opened:
        made.append(Opened(lambda inputs: {"pixels": inputs["z"]}))
        return made[-1]

    engine = LateEngine(opener)
    assert not made
    for _ in range(2):
        assert engine({"z": np.ones(3)})["pixels"].shape == (3,)
    engine.close()
    assert [one.closed for one in made] == [1]
    with pytest.raises(EngineError, match="this engine is closed"):
        engine({"z": np.ones(3)})
    unused = LateEngine(opener)
    unused.close()
    with pytest.raises(EngineError, match="this engine is closed"):
        unused({"z": np.ones(3)})
    assert len(made) == 1


def test_a_late_engine_that_fails_to_open_tries_again() -> None:
    failures = [EngineError("no memory")]

    def opener() -> FunctionEngine:
        if failures:
            raise failures.pop()
        return FunctionEngine(lambda inputs: {"pixels": inputs["z"]})

    engine = LateEngine(opener)
    with pytest.raises(EngineError, match="no memory"):
        engine({"z": np.ones(3)})
    assert engine({"z": np.ones(3)})["pixels"].shape == (3,)


def test_threads_that_decode_at_once_open_one_engine() -> None:
    made: list[int] = []

    def opener() -> FunctionEngine:
        made.append(1)
        time.sleep(0.05)
        return FunctionEngine(lambda inputs: {"pixels": inputs["z"]})

    bank = EngineBank([], tiny_spec().budgets, Precision.FP32, decoder=LateEngine(opener))
    with bank, ThreadPoolExecutor(4) as threads:
        list(threads.map(bank.decode, [np.ones((1, 4, 8, 8), np.float32)] * 8))
    assert len(made) == 1


def test_a_closed_pipeline_closes_its_decoder() -> None:
    pipeline = pipeline_of()
    closed: list[str] = []
    assert pipeline.bank.decoder
    pipeline.bank.decoder.close = lambda: closed.append("decoder")  # type: ignore[method-assign]
    pipeline.close()
    assert closed == ["decoder"]
    with pytest.raises(EngineError, match="this engine bank is closed"):
        pipeline.decode(np.ones((1, 4, 8, 8)))

"""Samples → pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from elit_export.arrays import Float64, Pixels
from elit_export.errors import InputError
from elit_export.spec import DataFacts, by_channel_text

LARGE_PIXELS = 128  # pictures with sides of this length or more are not enlarged
DECODER_REMEDY = "name its folder in the recipe ([decoder] folder = …) and build again"


def to_images(samples: Float64, data: DataFacts) -> Pixels:  # (B, C, H, W) → (B, H, W, C)
    """Convert the samples of a pixel model to bytes; raises InputError for latents of a VAE."""
    if data.kind != "pixels":
        raise InputError(
            f"these samples are latents of a VAE ({data.vae or 'unknown'}), which a decoder turns into pictures: if "
            f"the bundle has one, pipeline.decode(sample.latents); if it has none, {DECODER_REMEDY}, or save them "
            f"as .npz and feed a decoder with latents / {by_channel_text(data.scale)} + {by_channel_text(data.shift)}"
        )
    if samples.shape[1] not in (1, 3):
        raise InputError(f"samples of {samples.shape[1]} channels are not pictures", "save them as .npz")
    return to_bytes(samples, low=data.low, high=data.high)


def to_bytes(values: npt.NDArray[Any], *, low: float, high: float) -> Pixels:  # (B, C, H, W) → (B, H, W, C)
    share = (values - low) / (high - low)
    return (share.clip(0, 1) * 255).round().astype(np.uint8).transpose(0, 2, 3, 1)


def zoom_of(images: Pixels, small: int) -> int:
    """Return `small` for small pictures, 1 for large ones."""
    return small if images.shape[1] < LARGE_PIXELS else 1


def grid(rows: Sequence[Pixels], *, gap: int = 2, zoom: int = 1) -> Image.Image:
    """Draw one picture with a row for each (B, H, W, C) batch."""
    height, width, channels = rows[0].shape[1:]
    columns = max(len(row) for row in rows)
    sheet = np.full((len(rows) * (height + gap) + gap, columns * (width + gap) + gap, channels), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            top, left = gap + i * (height + gap), gap + j * (width + gap)
            sheet[top : top + height, left : left + width] = image
    picture = Image.fromarray(sheet[..., 0] if channels == 1 else sheet)
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)

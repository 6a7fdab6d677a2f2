"""Latents of a VAE → pictures, by the engine of its decoder.

An engine takes squares of one size. Larger latents are cut into tiles that overlap by at least a quarter and are
spread evenly: the first begins and the last ends at a border. Over its first quarter a tile fades in over the one above
it and then over the one to its left, row by row, as in `tiled_decode` of diffusers. There the last tiles are smaller,
which an engine of one size cannot take. If the size is that of whole tiles, both place them alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from elit_export.arrays import Float32, Float64, Pixels
from elit_export.errors import InputError
from elit_export.runtime.images import to_bytes
from elit_export.spec import DecoderSpec, Range

OVERLAP = 4  # a tile shares one part in 4 with its neighbour, and fades in over it


@dataclass(frozen=True)
class Decoder:
    """A decoder ready to run: `run` is its engine, z → pixels, with as many rows as `rows` holds."""

    run: Callable[[Float32], Float32]
    spec: DecoderSpec
    rows: Range

    def __call__(self, latents: Float64) -> Pixels:  # (B, C, H, W) → (B, H·f, W·f, C)
        """Decode sampled latents into pictures; raises InputError or EngineError."""
        self._check(latents)
        images, _, height, width = latents.shape
        factor, channels = self.spec.factor, self.spec.image_channels
        pictures = np.empty((images, height * factor, width * factor, channels), np.uint8)
        done = 0
        for pixels in self._decoded(latents):
            pictures[done : done + len(pixels)] = to_bytes(pixels, low=-1.0, high=1.0)
            done += len(pixels)
        return pictures

    def _check(self, latents: Float64) -> None:
        spec, shape = self.spec, latents.shape
        if len(shape) != 4 or shape[1] != spec.channels or min(shape[2:]) < spec.side or not len(latents):
            raise InputError(
                f"latents have shape {shape}, the decoder takes (images, {spec.channels}, height, width) "
                f"with at least one image and sides of at least {spec.side}"
            )

    def _decoded(self, latents: Float64) -> Iterator[Float32]:
        """Yield the pixels of a few images at a time, of a single one if it needs tiles."""
        is_tiled = max(latents.shape[2:]) > self.spec.side
        count = 1 if is_tiled else self.rows.max
        for start in range(0, len(latents), count):
            z = decoder_input(latents[start : start + count], self.spec)
            yield self._tiled(z[0])[None] if is_tiled else self._on_rows(z)

    def _on_rows(self, z: Float32) -> Float32:  # (M, C, s, s) → (M, C, s·f, s·f)
        """Decode any number of squares, in calls of a size that the engine accepts."""
        pixels = self.spec.side * self.spec.factor
        squares = np.empty((len(z), self.spec.image_channels, pixels, pixels), np.float32)
        for start in range(0, len(z), self.rows.max):
            part = slice(start, start + self.rows.max)
            squares[part] = self._call(z[part])
        return squares

    def _call(self, z: Float32) -> Float32:
        missing = max(self.rows.min - len(z), 0)
        return self.run(np.pad(z, ((0, missing), (0, 0), (0, 0), (0, 0)), mode="edge"))[: len(z)]

    def _tiled(self, z: Float32) -> Float32:  # (C, H, W) → (C, H·f, W·f)
        """Decode one image by tiles; two rows of tiles and the output of one call are held beside it."""
        side, factor = self.spec.side, self.spec.factor
        _, height, width = z.shape
        image = np.empty((self.spec.image_channels, height * factor, width * factor), np.float32)
        tops, lefts = tile_starts(height, side), tile_starts(width, side)
        above: list[Float32] = []
        for i, top in enumerate(tops):
            row = list(self._on_rows(np.stack([z[:, top : top + side, left : left + side] for left in lefts])))
            for j, left in enumerate(lefts):
                if i:
                    self._fade_in(row[j], above[j], top - tops[i - 1], axis=1)
                if j:
                    self._fade_in(row[j], row[j - 1], left - lefts[j - 1], axis=2)
                y, x = top * factor, left * factor
                image[:, y : y + side * factor, x : x + side * factor] = row[j]
            above = row
        return image

    def _fade_in(self, tile: Float32, before: Float32, distance: int, *, axis: int) -> None:
        """Fade the first pixels of `tile` in over `before`, in place; `before` starts `distance` latents earlier."""
        count, offset = self.spec.side // OVERLAP * self.spec.factor, distance * self.spec.factor
        share = (np.arange(count, dtype=np.float32) / count)[:, None]
        new, old = np.moveaxis(tile, axis, 1), np.moveaxis(before, axis, 1)
        new[:, :count] = old[:, offset : offset + count] * (1 - share) + new[:, :count] * share


def decoder_input(latents: Float64, spec: DecoderSpec) -> Float32:  # (B, C, H, W) → the same
    """Return z, the input of a decoder, for latents of a model."""
    scale, shift = (np.array(numbers, np.float64).reshape(-1, 1, 1) for numbers in (spec.scale, spec.shift))
    return (latents / scale + shift).astype(np.float32)


def tile_starts(length: int, side: int) -> list[int]:
    """Return where tiles begin along a side of `length` latents: as few as overlap by a quarter, evenly spread."""
    step = side - side // OVERLAP
    gaps = -(-(length - side) // step)
    return [number * (length - side) // gaps for number in range(gaps + 1)] if gaps else [0]

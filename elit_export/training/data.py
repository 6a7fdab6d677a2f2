"""Labelled images for training, held in memory as bytes."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from zlib import error as ZlibError

import numpy as np
from PIL import Image, ImageOps

from elit_export.arrays import Int64, Pixels
from elit_export.errors import InputError

Bytes = Pixels
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
IMAGE_ERRORS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what Pillow raises for damage
IDX_UBYTE = 0x08
GZIP_MAGIC = b"\x1f\x8b"
IDX_SPLITS = {"train": "train", "test": "t10k"}  # what IDX data sets call them


@dataclass(frozen=True)
class LabelledImages:
    """`images` uint8 (n, C, H, W), `labels` int64 (n,), one name per class (may be empty)."""

    images: Bytes
    labels: Int64
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        return len(self.class_names) or int(self.labels.max()) + 1

    @property
    def sha256(self) -> str:
        """Of pixels and labels: tells one data set from another."""
        return hashlib.sha256(self.images.tobytes() + self.labels.tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.labels)


def load_images(folder: Path, *, split: str, size: int, class_names: Sequence[str] = ()) -> LabelledImages:
    """Read IDX files (`train-images-idx3-ubyte[.gz]`, …) or images in `folder/CLASS/` or `folder/SPLIT/CLASS/`.

    Images become size×size: smaller ones are padded with black, larger ones scaled and cropped.
    `split` is `train` or `test`; without split folders all images are for training. Raises InputError.
    """
    if not folder.is_dir():
        raise InputError(f"no data folder at {folder}")
    prefix = IDX_SPLITS[split]
    idx = _idx_file(folder, f"{prefix}-images-idx3-ubyte")
    if idx is None:
        is_whole = split == "train" and not (folder / split).is_dir()
        return _load_class_folders(folder if is_whole else folder / split, size, class_names)
    labels_file = _idx_file(folder, f"{prefix}-labels-idx1-ubyte")
    if labels_file is None:
        raise InputError(f"{folder}: {idx.name} has no {prefix}-labels-idx1-ubyte beside it")
    images = np.stack([_fitted(Image.fromarray(image), size) for image in read_idx(idx, dims=3)])
    labels = read_idx(labels_file, dims=1).astype(np.int64)
    if len(images) != len(labels):
        raise InputError(f"{folder}: {len(images)} images but {len(labels)} labels")
    if class_names and labels.max() >= len(class_names):
        raise InputError(f"{len(class_names)} class names given, but there is a label {labels.max()}")
    return LabelledImages(images, labels, tuple(class_names))


def has_split(folder: Path, split: str) -> bool:
    return (folder / split).is_dir() or _idx_file(folder, f"{IDX_SPLITS[split]}-images-idx3-ubyte") is not None


# ---------------------------------------------------------------- IDX


def _idx_file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def read_idx(path: Path, *, dims: int) -> Bytes:
    """An IDX file of bytes (LeCun's format, gzipped or not) with `dims` axes."""
    try:
        raw = path.read_bytes()
        content = gzip.decompress(raw) if raw.startswith(GZIP_MAGIC) else raw
    except (OSError, EOFError, ZlibError) as error:
        raise InputError(f"{path}: unreadable: {error}") from error
    if len(content) < 4 + 4 * dims or content[:4] != bytes((0, 0, IDX_UBYTE, dims)):
        raise InputError(f"{path}: not an IDX file of bytes with {dims} axes")
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", count=dims, offset=4))
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * dims)
    if values.size != np.prod(shape) or not values.size:
        raise InputError(f"{path}: says shape {shape}, but holds {values.size} bytes")
    return values.reshape(shape)


# ---------------------------------------------------------------- folders


def _load_class_folders(folder: Path, size: int, class_names: Sequence[str]) -> LabelledImages:
    """Classes are the folders in order of name, or those of `class_names`, which then must hold them all."""
    if not folder.is_dir():
        raise InputError(f"no images at {folder}")
    found = {path.name: _image_files(path) for path in _class_folders(folder)}
    names = list(class_names) or list(found)
    if unknown := sorted(set(found) - set(names)):
        raise InputError(f"{folder}: class {unknown[0]!r} is none of {', '.join(names)}")
    if empty := sorted(name for name, files in found.items() if not files):
        raise InputError(f"{folder / empty[0]}: a class without images")
    if not found:
        raise InputError(f"{folder}: neither IDX files nor folders of images, one per class")
    files = [(path, label) for label, name in enumerate(names) for path in found.get(name, ())]
    mode = "L" if all(_mode(path) == "L" for path, _ in files) else "RGB"
    images = np.stack([_fitted(_opened(path).convert(mode), size) for path, _ in files])
    return LabelledImages(images, np.array([label for _, label in files], np.int64), tuple(names))


def _class_folders(folder: Path) -> list[Path]:
    is_class = (path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return sorted(path for path in is_class if path.name not in IDX_SPLITS)


def _image_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)


def _mode(path: Path) -> str:
    """Raises InputError for pixels that are not 8-bit grey or colour: conversion would clip them."""
    try:
        with Image.open(path) as image:
            mode = image.mode
    except IMAGE_ERRORS as error:
        raise InputError(f"{path}: not a readable image: {error}") from error
    if mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"):
        raise InputError(f"{path}: pixels of mode {mode}; only 8-bit grey and colour images are read")
    return mode


def _opened(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except IMAGE_ERRORS as error:
        raise InputError(f"{path}: not a readable image: {error}") from error


def _fitted(image: Image.Image, size: int) -> Bytes:  # → (C, size, size)
    if image.width > size or image.height > size:
        image = ImageOps.fit(image, (size, size))
    padded = Image.new(image.mode, (size, size))
    padded.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    pixels = np.asarray(padded, dtype=np.uint8)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)

"""Labelled images for training, held in memory as bytes."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from elit_export.arrays import Int64, Pixels
from elit_export.bundle.readers import GIB, MIB, read_bytes, read_gzipped
from elit_export.errors import InputError
from elit_export.spec.limits import DATA_BYTES

Bytes = Pixels
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
UNREAD_SUFFIXES = {".gif", ".heic", ".heif", ".avif", ".jxl", ".jp2", ".psd", ".svg"}  # images that are not read
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # 8-bit grey and colour
IMAGE_ERRORS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what Pillow raises for damage
IDX_UBYTE = 0x08
IDX_BYTES = 2 * GIB  # that are read at once; MNIST has 47 MB
IMAGE_BYTES = 256 * MIB
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
        """The hash of pixels and labels, which tells one data set from another."""
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
    raw = read_idx(idx, dims=3)
    _check_memory(folder, len(raw), 1, size)
    images = np.stack([_fitted(Image.fromarray(image), size) for image in raw])
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
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.exists()), None)


def read_idx(path: Path, *, dims: int) -> Bytes:
    """An IDX file of bytes (LeCun's format, gzipped or not) with `dims` axes."""
    head_bytes, shape = 4 + 4 * dims, list[int]()

    def needed(head: bytes) -> int:
        if len(head) < head_bytes or head[:4] != bytes((0, 0, IDX_UBYTE, dims)):
            raise InputError(f"{path}: not an IDX file of bytes with {dims} axes", "download it again")
        shape[:] = np.frombuffer(head, ">u4", count=dims, offset=4).tolist()
        if math.prod(shape) > IDX_BYTES:
            raise InputError(f"{path}: says shape {tuple(shape)}, {IDX_BYTES:,} bytes are the most", "split it")
        return head_bytes + math.prod(shape)

    try:
        content = read_gzipped(path, what="IDX data", error=InputError, needed=needed, head_bytes=head_bytes)
    except OSError as error:
        raise InputError(f"{path}: unreadable: {error}", "download it again") from error
    values = np.frombuffer(content, np.uint8, offset=head_bytes)
    if values.size != math.prod(shape) or not values.size:
        more = "more" if values.size > math.prod(shape) else str(values.size)
        raise InputError(f"{path}: says shape {tuple(shape)}, but holds {more} bytes", "download it again")
    return values.reshape(shape)


# ---------------------------------------------------------------- folders


def _load_class_folders(folder: Path, size: int, class_names: Sequence[str]) -> LabelledImages:
    """Classes are the folders in order of name, or those of `class_names`, which then must hold them all."""
    if not folder.is_dir():
        raise InputError(f"no images at {folder}")
    files_by_class = {path.name: _image_files(path) for path in _class_folders(folder)}
    names = list(class_names) or list(files_by_class)
    if unknown := sorted(set(files_by_class) - set(names)):
        raise InputError(f"{folder}: class {unknown[0]!r} is none of {', '.join(names)}")
    if empty := sorted(name for name, files in files_by_class.items() if not files):
        raise InputError(f"{folder / empty[0]}: a class without images")
    if not files_by_class:
        raise InputError(f"{folder}: neither IDX files nor folders of images, one per class")
    files = [(path, label) for label, name in enumerate(names) for path in files_by_class.get(name, ())]
    mode = "L" if all(_mode(path) == "L" for path, _ in files) else "RGB"
    _check_memory(folder, len(files), len(mode), size)
    images = np.stack([_fitted(_shown(_opened(path)).convert(mode), size) for path, _ in files])
    return LabelledImages(images, np.array([label for _, label in files], np.int64), tuple(names))


def _class_folders(folder: Path) -> list[Path]:
    is_class = (path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return sorted(path for path in is_class if path.name not in IDX_SPLITS)


def _image_files(folder: Path) -> list[Path]:
    """Raises InputError for an image of a kind that is not read, which would be missed in silence."""
    paths = sorted(folder.iterdir())
    for path in paths:
        if path.suffix.lower() in UNREAD_SUFFIXES:
            raise InputError(f"{path}: {path.suffix} files are not read", "convert it to PNG, or move it elsewhere")
    return [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES]


def _check_memory(folder: Path, count: int, channels: int, size: int) -> None:
    """Raise InputError for more bytes than are held in memory."""
    name, remedy = f"{folder}: {count} images of {size}x{size}", "take fewer images or smaller ones"
    DATA_BYTES.check(count * channels * size * size, name, remedy)


def _mode(path: Path) -> str:
    """Raises InputError for pixels that are not 8-bit grey or colour: conversion would clip them."""
    with _named(path), _parsed(path) as image:
        if image.format == "TIFF" and getattr(image, "n_frames", 1) > 1:
            raise InputError(f"{path}: a TIFF of several pages", "save each as a file of its own")
        mode = image.mode
    if mode not in MODES:
        raise InputError(
            f"{path}: pixels of mode {mode}; only 8-bit grey and colour images are read", "convert it to 8 bits"
        )
    return mode


def _opened(path: Path) -> Image.Image:
    with _named(path), _parsed(path) as image:
        image.load()
        return image


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Raise InputError for what Pillow raises of damaged files."""
    try:
        yield
    except InputError:
        raise
    except IMAGE_ERRORS as error:
        raise InputError(f"{path}: not a readable image: {error}", "replace it or move it elsewhere") from error


def _parsed(path: Path) -> Image.Image:
    """An image whose pixels are not decoded yet."""
    return Image.open(io.BytesIO(read_bytes(path, what="an image", error=InputError, limit_bytes=IMAGE_BYTES)))


def _shown(image: Image.Image) -> Image.Image:
    """Render the image upright by its orientation tag, on black, without the colours of transparent pixels."""
    upright = ImageOps.exif_transpose(image)
    if not upright.has_transparency_data:
        return upright
    clear = upright.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", clear.size, (0, 0, 0, 255)), clear)


def _fitted(image: Image.Image, size: int) -> Bytes:  # → (C, size, size)
    if image.width > size or image.height > size:
        image = ImageOps.fit(image, (size, size))
    padded = Image.new(image.mode, (size, size))
    padded.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    pixels = np.asarray(padded, dtype=np.uint8)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)

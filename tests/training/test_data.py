"""Reading labelled images: IDX files, class folders, fitting to a size, and what is refused."""

from __future__ import annotations

import gzip
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from elit_export.errors import InputError
from elit_export.training.data import LabelledImages, has_split, load_images, read_idx

FASHION = Path(__file__).parents[1] / "data" / "fashion"
TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
NAMES = ("top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")


@pytest.fixture(scope="module")
def fashion() -> LabelledImages:
    return load_images(FASHION, split="train", size=28)


@pytest.fixture
def idx(tmp_path: Path) -> Path:
    """The training files without compression, in a folder that may be changed."""
    for name in (TRAIN_IMAGES, TRAIN_LABELS):
        (tmp_path / name).write_bytes(gzip.decompress((FASHION / f"{name}.gz").read_bytes()))
    return tmp_path


def save_folders(images: LabelledImages, folder: Path, count: int = 20) -> None:
    """PNG files in one folder per class."""
    for index in range(count):
        place = folder / f"class {images.labels[index]}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images.images[index, 0]).save(place / f"{index:03}.png")


# ---------------------------------------------------------------- IDX files


def test_idx_files_give_their_bytes_and_labels(fashion: LabelledImages) -> None:
    raw = gzip.decompress((FASHION / f"{TRAIN_IMAGES}.gz").read_bytes())
    labels = gzip.decompress((FASHION / f"{TRAIN_LABELS}.gz").read_bytes())
    assert fashion.images.shape == (96, 1, 28, 28)
    assert fashion.images.tobytes() == raw[16:]
    assert fashion.labels.tolist() == list(labels[8:])
    assert (fashion.images.dtype, fashion.labels.dtype) == (np.uint8, np.int64)


def test_splits_have_their_own_files(fashion: LabelledImages) -> None:
    test = load_images(FASHION, split="test", size=28)
    assert (len(fashion), len(test)) == (96, 32)
    assert not np.array_equal(test.images, fashion.images[:32])


def test_plain_idx_files_equal_compressed_ones(idx: Path, fashion: LabelledImages) -> None:
    plain = load_images(idx, split="train", size=28)
    assert np.array_equal(plain.images, fashion.images)
    assert np.array_equal(plain.labels, fashion.labels)


def test_classes_are_counted_by_name_or_else_by_label(fashion: LabelledImages) -> None:
    assert (fashion.class_names, fashion.num_classes) == ((), 10)
    named = load_images(FASHION, split="train", size=28, class_names=[*NAMES, "hat"])
    assert (named.class_names, named.num_classes) == ((*NAMES, "hat"), 11)


def test_too_few_class_names_are_refused() -> None:
    with pytest.raises(InputError, match="9 class names given, but there is a label 9"):
        load_images(FASHION, split="train", size=28, class_names=NAMES[:9])


# ---------------------------------------------------------------- fitting


def test_small_images_lie_in_the_middle_of_black(fashion: LabelledImages) -> None:
    padded = load_images(FASHION, split="train", size=32).images
    assert padded.shape == (96, 1, 32, 32)
    assert np.array_equal(padded[:, :, 2:30, 2:30], fashion.images)
    assert int(padded.astype(int).sum()) == int(fashion.images.astype(int).sum())


def test_large_images_are_scaled(fashion: LabelledImages) -> None:
    small = load_images(FASHION, split="train", size=14).images.astype(float)
    assert small.shape == (96, 1, 14, 14)
    averaged = fashion.images.reshape(96, 1, 14, 2, 14, 2).mean(axis=(3, 5))
    assert np.abs(small - averaged).mean() < 8


def test_wide_images_lose_both_ends_alike(tmp_path: Path) -> None:
    (tmp_path / "class").mkdir()
    stripes = np.repeat(np.array([[10, 60, 110, 160]], np.uint8), 16, axis=1).repeat(32, axis=0)  # 64 wide, 32 high
    Image.fromarray(stripes).save(tmp_path / "class" / "wide.png")
    found = load_images(tmp_path, split="train", size=16).images[0, 0]
    assert np.abs(found[:, 1:7].astype(int) - 60).max() <= 2
    assert np.abs(found[:, 9:15].astype(int) - 110).max() <= 2


# ---------------------------------------------------------------- class folders


def test_class_folders_equal_the_idx_files_they_came_from(fashion: LabelledImages, tmp_path: Path) -> None:
    save_folders(fashion, tmp_path)
    found = load_images(tmp_path, split="train", size=28)
    order = np.argsort(fashion.labels[:20], kind="stable")
    known = sorted({f"class {label}" for label in fashion.labels[:20]})
    assert found.class_names == tuple(known)
    assert np.array_equal(found.images, fashion.images[:20][order])
    assert [known[label] for label in found.labels] == [f"class {label}" for label in fashion.labels[:20][order]]


def test_split_folders_are_kept_apart(fashion: LabelledImages, tmp_path: Path) -> None:
    save_folders(fashion, tmp_path / "train", count=20)
    save_folders(fashion, tmp_path / "test", count=5)
    assert len(load_images(tmp_path, split="train", size=28)) == 20
    assert len(load_images(tmp_path, split="test", size=28)) == 5


def test_folders_without_splits_are_for_training_only(fashion: LabelledImages, tmp_path: Path) -> None:
    save_folders(fashion, tmp_path)
    assert len(load_images(tmp_path, split="train", size=28)) == 20
    with pytest.raises(InputError, match=r"no images at .*test"):
        load_images(tmp_path, split="test", size=28)


def test_a_split_is_there_as_files_or_as_folders(fashion: LabelledImages, tmp_path: Path) -> None:
    assert has_split(FASHION, "train")
    assert has_split(FASHION, "test")
    save_folders(fashion, tmp_path / "train", count=1)
    assert has_split(tmp_path, "train")
    assert not has_split(tmp_path, "test")


def test_grey_images_have_one_channel_and_one_colour_makes_three(fashion: LabelledImages, tmp_path: Path) -> None:
    save_folders(fashion, tmp_path)
    assert load_images(tmp_path, split="train", size=28).images.shape == (20, 1, 28, 28)
    colour = Image.new("RGB", (28, 28), (255, 128, 0))
    colour.putpixel((20, 3), (0, 0, 200))  # column 20, row 3
    colour.save(tmp_path / "class 0" / "zzz.png")
    found = load_images(tmp_path, split="train", size=28)
    assert found.images.shape == (21, 3, 28, 28)
    last = found.images[found.labels.tolist().index(1) - 1]  # of class 0
    assert last[:, 0, 0].tolist() == [255, 128, 0]
    assert last[:, 3, 20].tolist() == [0, 0, 200]
    first = found.images[0]
    assert np.array_equal(first[0], first[1])
    assert np.array_equal(first[0], first[2])


def test_other_files_and_hidden_folders_do_no_harm(fashion: LabelledImages, tmp_path: Path) -> None:
    save_folders(fashion, tmp_path)
    before = load_images(tmp_path, split="train", size=28)
    (tmp_path / ".cache").mkdir()
    (tmp_path / "class 0" / "notes.txt").write_text("not an image")
    (tmp_path / "README").write_text("not a folder")
    after = load_images(tmp_path, split="train", size=28)
    assert after.class_names == before.class_names
    assert np.array_equal(after.images, before.images)


def test_class_names_fix_the_order_of_folders(fashion: LabelledImages, tmp_path: Path) -> None:
    save_folders(fashion, tmp_path)
    names = [f"class {label}" for label in reversed(range(10))]
    found = load_images(tmp_path, split="train", size=28, class_names=names)
    assert found.class_names == tuple(names)
    order = np.argsort(-fashion.labels[:20], kind="stable")
    assert np.array_equal(found.images, fashion.images[:20][order])
    assert np.array_equal(found.labels, 9 - fashion.labels[:20][order])


def test_a_folder_that_is_no_named_class_is_refused(fashion: LabelledImages, tmp_path: Path) -> None:
    save_folders(fashion, tmp_path)
    with pytest.raises(InputError, match="class 'class 0' is none of bag, boot"):
        load_images(tmp_path, split="train", size=28, class_names=["bag", "boot"])


# ---------------------------------------------------------------- refused: IDX


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no data folder at .*nowhere"):
        load_images(tmp_path / "nowhere", split="train", size=28)


def test_images_without_labels_are_refused(idx: Path) -> None:
    (idx / TRAIN_LABELS).unlink()
    with pytest.raises(InputError, match=f"{TRAIN_IMAGES} has no {TRAIN_LABELS} beside it"):
        load_images(idx, split="train", size=28)


def test_another_number_of_labels_than_images_is_refused(idx: Path) -> None:
    (idx / TRAIN_LABELS).write_bytes(gzip.decompress((FASHION / "t10k-labels-idx1-ubyte.gz").read_bytes()))
    with pytest.raises(InputError, match="96 images but 32 labels"):
        load_images(idx, split="train", size=28)


@pytest.mark.parametrize("name", [TRAIN_IMAGES, TRAIN_LABELS])
@pytest.mark.parametrize("kept", [0, 3, 7, 20, -1])
def test_a_truncated_idx_file_is_refused(idx: Path, name: str, kept: int) -> None:
    (idx / name).write_bytes((idx / name).read_bytes()[:kept])
    with pytest.raises(InputError, match=f"{name}: (not an IDX file of bytes|says shape .* but holds)"):
        load_images(idx, split="train", size=28)


@pytest.mark.parametrize("kept", [2, 30, 5000, -1])
def test_a_truncated_compressed_file_is_refused(tmp_path: Path, kept: int) -> None:
    shutil.copytree(FASHION, tmp_path, dirs_exist_ok=True)
    path = tmp_path / f"{TRAIN_IMAGES}.gz"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InputError, match=f"{TRAIN_IMAGES}.gz: unreadable"):
        load_images(tmp_path, split="train", size=28)


@pytest.mark.parametrize("place", [3, 100, 20_000, -6])
def test_a_damaged_compressed_file_is_refused(tmp_path: Path, place: int) -> None:
    shutil.copytree(FASHION, tmp_path, dirs_exist_ok=True)
    path = tmp_path / f"{TRAIN_IMAGES}.gz"
    content = bytearray(path.read_bytes())
    content[place] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"{TRAIN_IMAGES}.gz: unreadable"):
        load_images(tmp_path, split="train", size=28)


@pytest.mark.parametrize("magic", [b"\x00\x00\x08\x01", b"\x00\x00\x0d\x03", b"\x89PNG", b"\x08\x03\x00\x00"])
def test_a_wrong_magic_number_is_refused(idx: Path, magic: bytes) -> None:
    path = idx / TRAIN_IMAGES
    path.write_bytes(magic + path.read_bytes()[4:])
    with pytest.raises(InputError, match="not an IDX file of bytes with 3 axes"):
        load_images(idx, split="train", size=28)


@pytest.mark.parametrize(
    ("shape", "told"),
    [
        ((95, 28, 28), "but holds more bytes; download it again"),
        ((96, 28, 29), "but holds 75264 bytes; download it again"),
        ((0, 28, 28), "but holds more bytes; download it again"),
        ((2**32 - 1, 2**32 - 1, 2**32 - 1), "2,147,483,648 bytes are the most; split it"),
    ],
)
def test_a_shape_that_does_not_fit_the_bytes_is_refused(idx: Path, shape: tuple[int, int, int], told: str) -> None:
    path = idx / TRAIN_IMAGES
    content = path.read_bytes()
    path.write_bytes(content[:4] + struct.pack(">3I", *shape) + content[16:])
    with pytest.raises(InputError, match=rf"says shape \({shape[0]}, {shape[1]}, {shape[2]}\), {told}"):
        load_images(idx, split="train", size=28)


def test_an_idx_file_of_nothing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "labels"
    path.write_bytes(b"\x00\x00\x08\x01" + struct.pack(">I", 0))
    with pytest.raises(InputError, match=r"says shape \(0,\), but holds 0 bytes"):
        read_idx(path, dims=1)


# ---------------------------------------------------------------- refused: folders


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither IDX files nor folders of images, one per class"):
        load_images(tmp_path, split="train", size=28)


def test_an_empty_class_is_named(fashion: LabelledImages, tmp_path: Path) -> None:
    save_folders(fashion, tmp_path)
    (tmp_path / "zebra").mkdir()
    with pytest.raises(InputError, match="zebra: a class without images"):
        load_images(tmp_path, split="train", size=28)


def test_pixels_of_more_than_8_bits_are_refused(tmp_path: Path) -> None:
    (tmp_path / "class").mkdir()
    Image.new("I;16", (28, 28)).save(tmp_path / "class" / "deep.png")
    with pytest.raises(InputError, match=r"deep\.png: pixels of mode I"):
        load_images(tmp_path, split="train", size=28)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(header: bytes) -> bytes:
    pixels = png_chunk(b"IDAT", zlib.compress(b"\x00" * 29 * 28))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + pixels + png_chunk(b"IEND", b"")


WHOLE_HEADER = struct.pack(">IIBBBBB", 28, 28, 8, 0, 0, 0, 0)


def test_the_png_written_here_is_readable(tmp_path: Path) -> None:
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "a.png").write_bytes(png(WHOLE_HEADER))
    assert not load_images(tmp_path, split="train", size=28).images.any()


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"not an image", id="text"),
        pytest.param(png(WHOLE_HEADER)[:-20], id="truncated"),
        pytest.param(png(WHOLE_HEADER[:-1]), id="short header"),
        pytest.param(png(struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)), id="larger than memory"),
    ],
)
def test_a_file_that_is_no_readable_image_is_named(fashion: LabelledImages, tmp_path: Path, content: bytes) -> None:
    save_folders(fashion, tmp_path, count=3)
    (tmp_path / "class 0" / "broken.png").write_bytes(content)
    with pytest.raises(InputError, match=r"broken\.png: not a readable image"):
        load_images(tmp_path, split="train", size=28)


# ---------------------------------------------------------------- images as a viewer shows them


def in_class(folder: Path, name: str, image: Image.Image, **options: object) -> Path:
    path = folder / "class" / name
    path.parent.mkdir(exist_ok=True)
    image.save(path, **options)  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright_by_their_orientation_tag(tmp_path: Path, suffix: str, orientation: int) -> None:
    """As a viewer shows it the upper half is white, and of that the left half grey."""
    shown = np.zeros((16, 16), np.uint8)
    shown[:8], shown[:8, :8] = 255, 128
    stored = {
        1: shown,
        2: shown[:, ::-1],
        3: shown[::-1, ::-1],
        4: shown[::-1],
        5: shown.T,
        6: np.rot90(shown),
        7: shown[::-1, ::-1].T,
        8: np.rot90(shown, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    in_class(tmp_path, f"a.{suffix}", Image.fromarray(stored.copy()).convert("RGB"), exif=exif)
    found = load_images(tmp_path, split="train", size=16).images[0, 0].astype(int)
    assert np.abs(found - shown).max() < 60, found


def test_transparent_pixels_are_black_whatever_colour_they_hide(tmp_path: Path) -> None:
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[..., 0] = 255  # red that is never seen
    pixels[4:12, 4:12] = (0, 200, 0, 255)
    pixels[4:12, 4:8, 3] = 127
    in_class(tmp_path, "rgba.png", Image.fromarray(pixels))
    in_class(tmp_path, "la.png", Image.fromarray(pixels).convert("LA"))
    palette = Image.fromarray(np.zeros((16, 16), np.uint8), "L").convert("P")
    palette.putpalette([255, 0, 0] * 256)
    in_class(tmp_path, "p.png", palette, transparency=0)
    grey, mapped, coloured = load_images(tmp_path, split="train", size=16).images
    assert coloured[:, 0, 0].tolist() == grey[:, 0, 0].tolist() == [0, 0, 0]
    assert not mapped.any()
    assert coloured[:, 5, 10].tolist() == [0, 200, 0]
    assert abs(int(coloured[1, 5, 5]) - 100) <= 1


def test_tiff_files_are_images(tmp_path: Path, fashion: LabelledImages) -> None:
    for index, suffix in enumerate(("tif", "TIFF")):
        in_class(tmp_path, f"{index}.{suffix}", Image.fromarray(fashion.images[index, 0]))
    assert np.array_equal(load_images(tmp_path, split="train", size=28).images, fashion.images[:2])


def test_a_tiff_of_several_pages_is_refused(tmp_path: Path) -> None:
    page = Image.new("L", (4, 4))
    in_class(tmp_path, "a.tiff", page, save_all=True, append_images=[page])
    with pytest.raises(InputError, match="a TIFF of several pages; save each as a file of its own"):
        load_images(tmp_path, split="train", size=4)


def test_images_of_kinds_that_are_not_read_are_refused_and_not_passed_over(tmp_path: Path) -> None:
    in_class(tmp_path, "a.png", Image.new("L", (4, 4)))
    (tmp_path / "class" / "b.HEIC").write_bytes(b"")
    with pytest.raises(InputError, match=r"b\.HEIC: \.HEIC files are not read; convert it to PNG"):
        load_images(tmp_path, split="train", size=4)

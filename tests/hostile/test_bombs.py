"""Small files that inflate to gigabytes, or say that they will: refused before memory is taken for them."""

from __future__ import annotations

import gzip
import io
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from elit_export.bundle.calibration_inputs import CalibrationFacts
from elit_export.bundle.readers import array_names, plain_arrays
from elit_export.bundle.reading import Bundle
from elit_export.checkpoints.native import load_checkpoint
from elit_export.errors import BundleError, CheckpointError, InputError
from elit_export.training.data import read_idx
from elit_export.verify.parity import load_reference_file
from tests.hostile.test_special_files import takes_text

MB, GB = 1 << 20, 1 << 30
Shape = tuple[int, ...]


def npy_header(shape: Shape, dtype: str) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": False, "shape": shape})
    return stream.getvalue()


def write_npz(path: Path, arrays: dict[str, tuple[Shape, str, int]], real: dict[str, np.ndarray] | None = None) -> None:  # type: ignore[type-arg]
    """Members of a shape and a type with so many bytes of zeros, deflated; and real ones."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, (shape, dtype, size) in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                member.write(npy_header(shape, dtype))
                for _ in range(size // MB):
                    member.write(bytes(MB))
                member.write(bytes(size % MB))
        for name, values in (real or {}).items():
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, values)


@pytest.fixture(scope="session")
def five_gigabytes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive of 5 MB in which `text` has 5 GB of zeros: one deflated GB, repeated in its stream."""
    return bomb(tmp_path_factory.mktemp("bomb") / "bomb.npz", "text", (5 * GB // 32, 1, 8))


def bomb(path: Path, name: str, shape: Shape) -> Path:
    """A member of 5 GB whose deflated blocks are made once and repeated, so that it takes no time."""
    import zlib

    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    head = packer.compress(npy_header(shape, "<f4")) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(16 * MB)) + packer.flush(zlib.Z_FULL_FLUSH)
    raw = head + block * 320 + packer.flush()
    info = zipfile.ZipInfo(f"{name}.npy")
    with zipfile.ZipFile(path, "w") as archive:  # stored, then called deflated in its directory
        archive.writestr(info, raw)
        info.compress_type, info.file_size = zipfile.ZIP_DEFLATED, 5 * GB + len(npy_header(shape, "<f4"))
        info.compress_size = len(raw)
    return path


def test_the_bomb_is_real(five_gigabytes: Path) -> None:
    """What it says is what it holds, in a file of a thousandth."""
    assert five_gigabytes.stat().st_size < 10 * MB
    with zipfile.ZipFile(five_gigabytes) as archive, archive.open("text.npy") as member:
        assert np.lib.format.read_magic(member) == (1, 0)
        shape, _, _ = np.lib.format.read_array_header_1_0(member)
        assert shape == (5 * GB // 32, 1, 8)
        assert member.read(64 * MB) == bytes(64 * MB)


def test_prompts_that_inflate_to_gigabytes_are_refused(
    five_gigabytes: Path, refused: Callable[..., str], bundle: Path
) -> None:
    takes_text(bundle)
    message = refused("sample", bundle, "--prompts", five_gigabytes)
    assert "the embeddings may have 301,989,888; check that it is the file" in message


FACTS = CalibrationFacts(
    package_version="1",
    checkpoint_sha256="0",
    seed=0,
    images=1,
    steps=1,
    sampler="euler",
    schedules=(),
    guidance=(),
    samples=64,
)


@pytest.mark.parametrize("samples", [64, 10**15])
def test_samples_that_inflate_to_more_than_they_say_are_refused(
    refused: Callable[..., str], bundle: Path, tmp_path: Path, samples: int
) -> None:
    """And a number of samples that nobody collects."""
    own = json.loads((bundle / "manifest.json").read_text())["model"]["checkpoint_sha256"]
    facts = FACTS.model_copy(update={"samples": samples, "checkpoint_sha256": own}).model_dump_json()
    real = {"facts": np.array(facts), "kept": np.zeros(64, np.int64)}
    write_npz(tmp_path / "s.npz", {"x": ((64, MB), "<f4", 256 * MB), "conditioning/y": ((64,), "<i8", 512)}, real)
    message = refused("calibrate", "sensitivity", bundle, "--samples", tmp_path / "s.npz", "--precision", "int8")
    told = "its arrays say that they have 26" if samples == 64 else "their number is 1,000,000,000,000,000, at most"
    assert told in message
    assert "elit-export calibrate samples BUNDLE" in message


@pytest.mark.parametrize(("is_own", "told"), [(False, "samples of another checkpoint (0, not "), (True, "may have ")])
def test_samples_are_not_read_for_what_they_say_of_their_number(
    refused: Callable[..., str], bundle: Path, tmp_path: Path, is_own: bool, told: str
) -> None:
    """A million, as may be; nor are more bytes than the file has, which a collection does not compress."""
    own = json.loads((bundle / "manifest.json").read_text())["model"]["checkpoint_sha256"]
    facts = FACTS.model_copy(update={"samples": 10**6, **({"checkpoint_sha256": own} if is_own else {})})
    real = {"facts": np.array(facts.model_dump_json()), "kept": np.zeros(64, np.int64)}
    write_npz(tmp_path / "s.npz", {"x": ((10**6, 64), "<f4", 256 * MB), "conditioning/y": ((64,), "<i8", 512)}, real)
    message = refused("calibrate", "sensitivity", bundle, "--samples", tmp_path / "s.npz", "--precision", "int8")
    assert told in message
    assert "elit-export calibrate samples BUNDLE" in message


def test_too_little_memory_for_arrays_is_not_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    np.savez(tmp_path / "a.npz", a=np.zeros(3))
    monkeypatch.setattr(np.lib.format, "read_array", fail)
    with pytest.raises(MemoryError):
        plain_arrays(tmp_path / "a.npz", ("a",), what="it", error=InputError, limit_bytes=GB)


def test_members_that_nobody_asked_for_are_not_read(tmp_path: Path) -> None:
    """Whatever they hold; and without having been asked for, they do not count."""
    path = tmp_path / "a.npz"
    write_npz(path, {"big": ((10**15,), "<f8", 8)}, {"small": np.arange(3)})
    found = plain_arrays(path, ("small", "missing"), what="it", error=InputError, limit_bytes=1000)
    assert {name: values.tolist() for name, values in found.items()} == {"small": [0, 1, 2]}
    assert array_names(path, what="it", error=InputError) == ["big", "small"]


@pytest.mark.parametrize("shape", [(10**15,), (10**15, 10**15), (2,), (-1,)])
def test_a_shape_that_is_not_what_the_archive_holds_is_refused(tmp_path: Path, shape: Shape) -> None:
    write_npz(tmp_path / "a.npz", {"a": (shape, "<f8", 8)})
    with pytest.raises(ValueError, match=r"no \.npz of plain arrays, or damaged"):
        plain_arrays(tmp_path / "a.npz", ("a",), what="it", error=InputError, limit_bytes=GB)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_methods_that_inflate_without_bound_are_refused(tmp_path: Path, method: int) -> None:
    """Python hands all that a part inflates to at once, and NumPy writes neither."""
    with zipfile.ZipFile(tmp_path / "a.npz", "w", method) as archive, archive.open("a.npy", "w") as member:
        np.lib.format.write_array(member, np.zeros(3))
    with pytest.raises(ValueError, match="or damaged"):
        plain_arrays(tmp_path / "a.npz", ("a",), what="it", error=InputError, limit_bytes=GB)


def test_a_reference_that_inflates_is_refused(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """A build compresses nothing, so that arrays are no larger than their file."""
    write_npz(tmp_path / "reference.npz", {"0/x": ((MB,), "<f4", 4 * MB)})
    with pytest.raises(BundleError, match=r"the reference may have [\d,]+; check"):
        load_reference_file(tmp_path)
    stored = tiny_bundle.manifest.plan_sets[0].reference.artifact
    assert load_reference_file(tiny_bundle.folder / stored.kind / stored.name)


# ---------------------------------------------------------------- IDX


def idx_head(*shape: int) -> bytes:
    return bytes((0, 0, 8, len(shape))) + struct.pack(f">{len(shape)}I", *shape)


def gzip_of(path: Path, head: bytes, megabytes: int) -> None:
    """A gzip stream of members: the head, and so many MB of zeros, compressed once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(head) + gzip.compress(bytes(16 * MB)) * (megabytes // 16))


@pytest.mark.parametrize(
    ("shape", "told"),
    [((96, 28, 28), "but holds more bytes; download it again"), ((10**6, 10**4, 10**4), "are the most; split it")],
)
def test_idx_data_that_inflate_to_gigabytes_are_refused(
    refused: Callable[..., str], tmp_path: Path, shape: Shape, told: str
) -> None:
    gzip_of(tmp_path / "data" / "train-images-idx3-ubyte.gz", idx_head(*shape), 6 << 10)
    (tmp_path / "data" / "train-labels-idx1-ubyte").write_bytes(idx_head(0))
    assert (tmp_path / "data" / "train-images-idx3-ubyte.gz").stat().st_size < 10 * MB
    assert told in refused("train", "data", "--out", "run")


def test_idx_data_of_several_gzip_members_are_read(tmp_path: Path) -> None:
    path = tmp_path / "labels.gz"
    path.write_bytes(gzip.compress(idx_head(5)) + gzip.compress(b"abc") + gzip.compress(b"de"))
    assert read_idx(path, dims=1).tobytes() == b"abcde"


# ---------------------------------------------------------------- weights


def test_weights_whose_pickle_inflates_are_refused(tmp_path: Path) -> None:
    """`torch.save` compresses nothing."""
    torch.save({"ema": {"w": torch.zeros(3)}}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "bomb.pt", "w") as made:
        for info in plain.infolist():
            kind = zipfile.ZIP_DEFLATED if info.filename.endswith("data.pkl") else zipfile.ZIP_STORED
            content = plain.read(info) + (bytes(64 * MB) if kind else b"")
            made.writestr(info.filename, content, kind)
    with pytest.raises(CheckpointError, match=r"torch\.save compresses nothing; save it again with torch\.save"):
        load_checkpoint(tmp_path / "bomb.pt")
    with pytest.raises(CheckpointError, match="missing pos_embed"):
        load_checkpoint(tmp_path / "plain.pt")

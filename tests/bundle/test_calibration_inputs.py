"""Samples on disk: what is written is read, and nothing else is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elit_export.bundle.calibration_inputs import (
    MIN_SAMPLES,
    CalibrationFacts,
    CalibrationInputs,
    load_inputs,
    save_inputs,
)
from elit_export.errors import CalibrationError
from tests.helpers import tiny_spec

SPEC = tiny_spec()
CHECKPOINT = "a" * 64


def samples_of(count: int = MIN_SAMPLES, **changes: Any) -> CalibrationInputs:
    """Numbers of the tiny model's shapes; no engine has seen them."""
    generator = np.random.default_rng(0)
    facts = CalibrationFacts(
        package_version="0.1.0",
        checkpoint_sha256=CHECKPOINT,
        seed=0,
        images=4,
        steps=8,
        sampler="euler",
        schedules=("4of4", "1of4"),
        guidance=("none", "cfg:2"),
        samples=count,
    )
    made = CalibrationInputs(
        facts,
        x=generator.standard_normal((count, *SPEC.sample_shape)).astype(np.float32),
        t=np.linspace(0, 1, count, dtype=np.float32),
        kept=np.arange(count) % SPEC.latents + 1,
        conditioning={"y": np.arange(count) % (SPEC.num_classes + 1)},
    )
    return replace(made, **changes)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "samples.npz"


def test_what_is_saved_is_loaded(path: Path) -> None:
    samples = samples_of()
    save_inputs(samples, path)
    loaded = load_inputs(path, SPEC, CHECKPOINT)
    assert loaded.facts == samples.facts
    for name, values in {"x": samples.x, "t": samples.t, "kept": samples.kept}.items():
        assert np.array_equal(getattr(loaded, name), values)
    assert np.array_equal(loaded.conditioning["y"], samples.conditioning["y"])
    assert loaded.sha256 == samples.sha256


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b.npz"):
        save_inputs(samples_of(), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b.npz"}


def test_the_hash_is_of_every_array() -> None:
    samples = samples_of()
    changed = [samples_of(**{name: getattr(samples, name) + 1}) for name in ("x", "t", "kept")]
    changed += [samples_of(conditioning=conditioning) for conditioning in ({}, {"z": samples.conditioning["y"]})]
    assert len({made.sha256 for made in [samples, *changed]}) == 6
    elsewhere = replace(samples, facts=samples.facts.model_copy(update={"package_version": "9"}))
    assert elsewhere.sha256 == samples.sha256


def test_inputs_are_those_of_the_graph() -> None:
    samples = samples_of()
    rows = list(samples.inputs())
    assert len(rows) == len(samples) == MIN_SAMPLES
    for row, inputs in enumerate(rows):
        assert list(inputs) == [tensor.name for tensor in SPEC.graph("step").inputs]
        for tensor in SPEC.graph("step").inputs:
            assert inputs[tensor.name].dtype == tensor.dtype
            assert inputs[tensor.name].ndim == len(tensor.dims)
        assert np.array_equal(inputs["x"], samples.x[row][None])
        assert inputs["latents"].tolist() == list(range(samples.kept[row]))


# ---------------------------------------------------------------- what is refused


def with_value(name: str, value: float) -> CalibrationInputs:
    samples = samples_of()
    values = samples.conditioning["y"] if name == "y" else getattr(samples, name)
    values.reshape(-1)[7] = value
    return samples


SAMPLES = samples_of()
BAD: list[tuple[CalibrationInputs, str]] = [
    (samples_of(MIN_SAMPLES - 1), f"63 samples are too few, the minimum is {MIN_SAMPLES}"),
    (samples_of(facts=samples_of(100).facts), "holds 64 samples and says 100"),
    (with_value("x", np.nan), "x of sample 0 holds values that are not finite; .*elit-export verify BUNDLE"),
    (with_value("t", np.inf), "t of sample 7 holds values that are not finite"),
    (with_value("t", 1.5), "t runs from 0 to 1.5, in this model from 0 to 1"),
    (with_value("kept", 5), "kept is 5 in some samples, this model runs 1of4 to 4of4"),
    (with_value("kept", 0), "kept is 0 in some samples, this model runs 1of4 to 4of4"),
    (with_value("y", 4), "y runs from 0 to 4, in this model from 0 to 3"),
    (with_value("y", -1), "y runs from -1 to 3"),
    (samples_of(conditioning={}), "conditioned by nothing, this model by y"),
    (samples_of(conditioning={"text": SAMPLES.x}), "conditioned by text, this model by y"),
    (samples_of(conditioning={"y": SAMPLES.t}), r"y is float32 \(64,\), this model takes int64 \(64,\)"),
    (samples_of(x=SAMPLES.x.astype(np.float64)), "x is float64"),
    (samples_of(x=SAMPLES.x[..., :4]), r"x is float32 \(64, 1, 8, 4\), this model takes float32 \(64, 1, 8, 8\)"),
    (samples_of(t=SAMPLES.t[:, None]), r"t is float32 \(64, 1\), this model takes float32 \(64,\)"),
    (samples_of(kept=SAMPLES.kept[:9]), r"kept is int64 \(9,\)"),
    (samples_of(x=np.array(["no"] * 64)), "x is <U2"),
]


@pytest.mark.parametrize(("samples", "problem"), BAD, ids=[problem[:20] for _, problem in BAD])
def test_samples_that_do_not_fit_are_refused_with_the_remedy(
    samples: CalibrationInputs, problem: str, path: Path
) -> None:
    save_inputs(samples, path)
    with pytest.raises(CalibrationError, match=f"{problem}.*elit-export calibrate samples BUNDLE --out {path}"):
        load_inputs(path, SPEC, CHECKPOINT)


def test_samples_of_another_checkpoint_are_refused(path: Path) -> None:
    save_inputs(samples_of(), path)
    with pytest.raises(CalibrationError, match=r"another checkpoint \(aaaaaaaaaaaa, not bbbbbbbbbbbb\).*BUNDLE --out"):
        load_inputs(path, SPEC, "b" * 64)


@pytest.mark.parametrize(
    ("content", "problem"),
    [(None, "no calibration samples there"), (b"", "not a file of"), (b"PK\x03\x04 cut", "not a file of")],
)
def test_what_is_no_file_of_samples_is_refused(content: bytes | None, problem: str, path: Path) -> None:
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CalibrationError, match=f"{problem}.*elit-export calibrate samples BUNDLE"):
        load_inputs(path, SPEC, CHECKPOINT)


def test_other_archives_and_folders_are_refused(tmp_path: Path, path: Path) -> None:
    np.savez(path, x=np.zeros(3))
    with pytest.raises(CalibrationError, match="not a file of calibration samples of this version"):
        load_inputs(path, SPEC, CHECKPOINT)
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(CalibrationError, match="not a file of calibration samples, or damaged"):
        load_inputs(path, SPEC, CHECKPOINT)
    with pytest.raises(CalibrationError, match=r"cannot be read \(Is a directory\)"):
        load_inputs(tmp_path, SPEC, CHECKPOINT)


def test_pickles_are_never_opened(path: Path) -> None:
    np.savez(path, facts=np.array([print], dtype=object), x=np.zeros(64), t=np.zeros(64), kept=np.zeros(64))
    with pytest.raises(CalibrationError, match="or damaged"):
        load_inputs(path, SPEC, CHECKPOINT)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_cut_file_is_refused(share: float, path: Path) -> None:
    save_inputs(samples_of(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CalibrationError, match="elit-export calibrate samples"):
        load_inputs(path, SPEC, CHECKPOINT)


def test_an_altered_byte_is_found(path: Path) -> None:
    save_inputs(samples_of(), path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match="damaged"):
        load_inputs(path, SPEC, CHECKPOINT)


@pytest.mark.parametrize("before", [None, b"old"])
def test_an_interrupted_write_leaves_what_was_there(
    before: bytes | None, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if before is not None:
        path.write_bytes(before)
    write = np.savez

    def interrupted(file: Any, **arrays: Any) -> None:
        write(file, **arrays)
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_inputs(samples_of(), path)
    assert list(path.parent.iterdir()) == ([] if before is None else [path])
    assert before is None or path.read_bytes() == before

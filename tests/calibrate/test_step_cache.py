"""Calibration of the step cache: pairs along trajectories, the fit, and what the bundle keeps of it."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from elit_export import Pipeline, compile_bundle
from elit_export.backends.protocols import FunctionEngine, to_host
from elit_export.bundle.reading import Bundle
from elit_export.bundle.recipe import recipe_from_values
from elit_export.bundle.store import writing
from elit_export.calibrate.step_cache import (
    Pairs,
    Trajectories,
    batch_count,
    fit_pairs,
    image_numbers,
    joined,
    make_calibration,
    record,
    sample_pairs,
)
from elit_export.cli import main
from elit_export.cli.calibrate import advised
from elit_export.errors import BundleError, CalibrationError, InputError
from elit_export.runtime.bank import EngineBank, Slot
from elit_export.runtime.step_cache.fit import increments
from elit_export.spec import COEFFICIENTS, Range
from tests.conftest import recipe_values

LOW, HIGH = 0.02, 0.2


def pairs_of(function: Any, *, noise: float = 0.0, kept: int = 4, count: int = 400) -> Pairs:
    """Distances over [LOW, HIGH] of 40 images at 10 steps each."""
    generator = np.random.default_rng(kept)
    distance = np.linspace(LOW, HIGH, count)
    change = function(distance) + noise * generator.standard_normal(count)
    same = np.ones(count, np.int64)
    return Pairs(distance, change, same * kept, same * 10, np.arange(count) % 40)


def trajectories(pipeline: Pipeline, **changes: Any) -> Trajectories:
    facts: dict[str, Any] = {"images": 6, "steps": (3, 5), "guidance": ("none",), "seed": 1, "rows": 4}
    return Trajectories(**{"budgets": (pipeline.spec.full,), **facts, **changes})


@pytest.fixture(scope="module")
def pipeline(tiny_bundle: Bundle) -> Iterator[Pipeline]:
    with Pipeline.load(tiny_bundle.folder) as opened:
        yield opened


# ---------------------------------------------------------------- pairs


def test_pairs_are_what_a_trajectory_shows(pipeline: Pipeline) -> None:
    """Against the engines called by hand."""
    wanted = trajectories(pipeline, images=4, steps=(3,))
    found = joined(list(sample_pairs(pipeline, wanted)))
    labels = [number % pipeline.spec.num_classes for number in image_numbers(range(4))]
    states = [record.x for record in pipeline.steps(labels, steps=3, sampler="euler", seed=1)]
    start = pipeline.request(labels, steps=3, sampler="euler", seed=1).start
    signal = np.zeros((4, pipeline.spec.tokens, pipeline.spec.hidden_size), np.float32)
    distances, residuals = [], []
    for t, x in zip((1.0, 2 / 3, 1 / 3), (start, *states[:2]), strict=True):
        inputs = {"x": x.astype(np.float32), "t": np.full(4, t, np.float32), "y": np.asarray(labels)}
        probed = pipeline.bank.probe(inputs, signal)
        signal = to_host(probed["signal"])
        distances.append(to_host(probed["distance"]))
        residuals.append(to_host(pipeline.bank(pipeline.spec.full, inputs).outputs["residual"]))
    before, after = np.stack(residuals[:-1]), np.stack(residuals[1:])
    change = np.abs(after - before).mean((2, 3)) / np.abs(before).mean((2, 3))
    assert found.distance == pytest.approx(np.concatenate(distances[1:]), rel=1e-4)
    assert found.change == pytest.approx(change.ravel(), rel=1e-4)


@pytest.mark.parametrize("classes", [1, 2, 4, 10])
def test_what_is_held_out_has_every_label(classes: int) -> None:
    labels = [number % classes for number in image_numbers(range(64))]
    assert set(labels[3::4]) == set(labels) == set(range(classes))


def test_every_image_step_count_budget_and_guidance_is_there(pipeline: Pipeline) -> None:
    small = pipeline.spec.budget(1)
    wanted = trajectories(pipeline, budgets=(pipeline.spec.full, small), guidance=("none", "cfg:2"))
    parts = list(sample_pairs(pipeline, wanted))
    found = joined(parts)
    assert len(parts) == batch_count(pipeline, wanted) == 16
    assert len(found) == 2 * (2 + 4) * (6 + 12)  # budgets, changes, rows without and with guidance
    assert set(found.image.tolist()) == set(range(6))
    assert {*zip(found.kept.tolist(), found.steps.tolist(), strict=True)} == {(4, 3), (4, 5), (1, 3), (1, 5)}


def test_an_image_depends_on_its_number_alone(pipeline: Pipeline) -> None:
    """Not on how many are sampled at once."""
    one, many = (joined(list(sample_pairs(pipeline, trajectories(pipeline, steps=(3,), rows=rows)))) for rows in (1, 4))
    for image in range(6):
        of_one, of_many = (pairs.where(pairs.image == image) for pairs in (one, many))
        assert of_one.distance == pytest.approx(of_many.distance, rel=1e-4)
        assert of_one.change == pytest.approx(of_many.change, rel=1e-4)


def test_the_split_into_parts_is_checked_before_any_is_sampled(pipeline: Pipeline) -> None:
    def refuse(_inputs: Any) -> Any:
        raise AssertionError("sampled")

    slots = [Slot(replace(slot.profile, rows=Range(4, 4, 4)), FunctionEngine(refuse)) for slot in pipeline.bank.slots]
    bank = EngineBank(slots, pipeline.spec.budgets, pipeline.bank.precision, pipeline.bank.cache)
    odd = trajectories(pipeline, images=5, rows=4)
    with pytest.raises(InputError, match=r"5 images cannot be split into parts of at most 4: .*; sample 8 images"):
        list(sample_pairs(Pipeline(bank, pipeline.spec, pipeline.data), odd))


def test_trajectories_that_tell_nothing_are_refused(pipeline: Pipeline) -> None:
    with pytest.raises(CalibrationError, match="3 images are too few"):
        trajectories(pipeline, images=3)
    with pytest.raises(CalibrationError, match="a change needs at least 2"):
        trajectories(pipeline, steps=(5, 1))
    with pytest.raises(CalibrationError, match="no named budget is covered"):
        trajectories(pipeline, budgets=())
    bare = Pipeline(
        EngineBank(pipeline.bank.slots, pipeline.spec.budgets, pipeline.bank.precision), pipeline.spec, pipeline.data
    )
    with pytest.raises(CalibrationError, match="no graph `probe`"):
        list(sample_pairs(bare, trajectories(pipeline)))


# ---------------------------------------------------------------- fits


@pytest.mark.parametrize(
    "function", [lambda d: 3 * d, lambda d: 0.01 + 2 * d + 20 * d**2, lambda d: d + 500 * d**4], ids=["1", "2", "4"]
)
def test_what_is_a_polynomial_is_found(function: Any) -> None:
    fit = fit_pairs(pairs_of(function), None)
    reach = np.linspace(LOW, HIGH, 50)
    found = increments(fit.fit, reach.astype(np.float32))
    assert found == pytest.approx(function(reach), rel=1e-4)
    assert len(fit.fit.coefficients) == COEFFICIENTS
    assert (fit.fit.low, fit.fit.high) == pytest.approx((LOW, HIGH))
    assert fit.r2 == pytest.approx(1)


def test_noise_is_not_fitted() -> None:
    """The error is of images that the fit has not seen."""
    fit = fit_pairs(pairs_of(lambda d: 3 * d, noise=0.05), None)
    assert fit.held_out_error == pytest.approx(0.05, rel=0.25)
    assert 0.5 < fit.r2 < 0.95


def test_a_fit_never_falls() -> None:
    """The best polynomial of a curve that rises and falls would."""
    fit = fit_pairs(pairs_of(lambda d: d * (0.35 - d)), None)
    values = increments(replace(fit.fit, low=0, high=1), np.linspace(LOW, HIGH, 99).astype(np.float32))
    assert (np.diff(values) >= -1e-7).all()


def test_a_change_that_falls_with_the_distance_is_refused() -> None:
    with pytest.raises(CalibrationError, match="does not change more where the input changes more"):
        fit_pairs(pairs_of(lambda d: 1 - d), None)


def test_numbers_that_are_not_finite_are_refused() -> None:
    with pytest.raises(CalibrationError, match="not finite"):
        fit_pairs(pairs_of(lambda d: np.where(d > 0.1, np.nan, d)), None)


def test_the_size_of_a_step_is_not_taken_for_knowledge() -> None:
    """Two step counts with a change each: the distance tells which, and nothing beyond."""
    parts = []
    for steps, middle in ((10, 0.1), (40, 0.02)):
        generator = np.random.default_rng(steps)
        distance = middle * (1 + 0.1 * generator.standard_normal(200))
        change = middle * (2 + 0.2 * generator.standard_normal(200))
        same = np.ones(200, np.int64)
        parts.append(Pairs(distance, change, same * 4, same * steps, np.arange(200)))
    fit = fit_pairs(joined(parts), None)
    assert fit.r2 > 0.9
    assert fit.r2_same_steps < 0.1
    assert abs(fit.rank_same_steps) < 0.4  # of 50 held-out pairs each


@pytest.mark.parametrize("sign", [1, -1])
def test_a_change_that_falls_at_equal_steps_is_told(pipeline: Pipeline, sign: int) -> None:
    """Between step counts it rises, so there is a fit; within each the sign decides."""
    parts = []
    for steps, middle in ((10, 0.1), (40, 0.02)):
        along = np.linspace(-0.1, 0.1, 200)
        same = np.ones(200, np.int64)
        parts.append(
            Pairs(middle * (1 + along), middle * (2 + sign * along), same * 4, same * steps, np.arange(200) % 40)
        )
    fit = fit_pairs(joined(parts), None)
    assert fit.r2 > 0.9
    assert fit.rank_same_steps == pytest.approx(sign)
    calibration = make_calibration(joined(parts), trajectories(pipeline), "0" * 64)
    assert (advised(calibration) == ("teacache:0.2", "")) == (sign > 0)


@pytest.mark.parametrize(("slope", "fits"), [(1.05, [None]), (5.0, [1, 4])])
def test_a_budget_has_its_own_fit_only_if_that_halves_the_error(
    pipeline: Pipeline, slope: float, fits: list[int | None]
) -> None:
    pairs = joined([pairs_of(lambda d: d, noise=0.02, kept=4), pairs_of(lambda d: slope * d, noise=0.02, kept=1)])
    calibration = make_calibration(pairs, trajectories(pipeline), "0" * 64)
    assert [fit.kept for fit in calibration.fits] == fits
    assert calibration.fit_for(3) == calibration.fits[-1].fit


# ---------------------------------------------------------------- the command


@pytest.fixture
def copied(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle.folder, tmp_path / "copied"))


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


SMALL = ("--images", "8", "--steps", "4", "--steps", "12")


def test_a_calibrated_bundle_samples_with_teacache(copied: Path, tmp_path: Path) -> None:
    before = run("sample", copied, "--cache", "teacache:0.2", "--out", tmp_path / "a.png")
    assert before.exit_code == 2
    assert "elit-export calibrate cache" in before.output
    done = run("calibrate", "cache", copied, *SMALL, "--plot", tmp_path / "fit.png", "--json", tmp_path / "fit.json")
    assert done.exit_code == 0, done.output
    kept = Bundle.open(copied).manifest.cache_calibration
    assert kept
    assert json.loads((tmp_path / "fit.json").read_text()) == kept.model_dump(mode="json")
    assert (tmp_path / "fit.png").read_bytes().startswith(b"\x89PNG")
    after = run(
        "sample", copied, "--cache", "teacache:0.2", "--steps", "12", "--sampler", "euler", "--out", tmp_path / "a.png"
    )
    assert after.exit_code == 0, after.output
    assert "cache teacache:0.2: " in after.output
    assert "12 calls reused after 11 probes; computed: 2 fixed before sampling" in after.output
    assert run("verify", copied).exit_code == 0
    assert "R²" in run("inspect", copied).output


def test_a_rebuild_keeps_it_and_another_model_drops_it(copied: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    run("calibrate", "cache", copied, *SMALL)
    kept = Bundle.open(copied).manifest.cache_calibration
    rows = {"rows": {"min": 1, "opt": 2, "max": 5}}
    recipe = recipe_from_values(recipe_values(tiny_checkpoint) | rows, "test")
    assert compile_bundle(recipe, "cpu", out=copied).manifest.cache_calibration == kept is not None
    renamed = recipe_from_values(recipe_values(tiny_checkpoint, name="other"), "test")
    assert compile_bundle(renamed, "cpu", out=copied).manifest.cache_calibration is None


def test_the_bundle_of_another_checkpoint_is_not_written_into(copied: Path) -> None:
    run("calibrate", "cache", copied, *SMALL)
    opened = Bundle.open(copied)
    calibration = opened.manifest.cache_calibration
    assert calibration
    with pytest.raises(BundleError, match="built from another checkpoint meanwhile"):
        record(opened, calibration.model_copy(update={"checkpoint_sha256": "f" * 64}))
    assert Bundle.open(copied).manifest == opened.manifest


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--images", "3"), "3 images are too few"),
        (("--steps", "1"), "at least 2"),
        (("--budget", "5"), "keeps 1 to 4"),
        (("--guidance", "ccfg:2@1"), "samples with guidance none or cfg:SCALE"),
    ],
)
def test_bad_input_leaves_the_bundle_as_it_was(copied: Path, arguments: tuple[str, ...], problem: str) -> None:
    before = Bundle.open(copied).manifest
    done = run("calibrate", "cache", copied, *arguments)
    assert done.exit_code == 2
    assert problem in " ".join(done.output.split())
    assert Bundle.open(copied).manifest == before


def worked(*_: object, **__: object) -> None:
    raise AssertionError("the work began")


def test_a_build_in_progress_is_not_disturbed(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is told before trajectories that could not be recorded."""
    monkeypatch.setattr("elit_export.calibrate.step_cache.sample_pairs", worked)
    with writing(copied):
        done = run("calibrate", "cache", copied, *SMALL)
    assert done.exit_code == 2
    assert "another build is writing" in done.output


def test_a_bundle_that_cannot_be_written_is_told_before_the_work(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where its folder is immutable, for the superuser too: nothing can be made in it."""

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr("elit_export.calibrate.step_cache.sample_pairs", worked)
    monkeypatch.setattr(os, "mkdir", refuse)
    done = run("calibrate", "cache", copied, *SMALL)
    assert done.exit_code == 2
    problem = f"cannot write into {copied}: Operation not permitted; let it be written, or take a copy of the bundle"
    assert problem in done.output


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_plot_that_fails_does_not_cost_the_calibration(copied: Path, tmp_path: Path) -> None:
    (tmp_path / "fit.png").symlink_to("/dev/full")
    done = run("calibrate", "cache", copied, *SMALL, "--plot", tmp_path / "fit.png")
    assert (done.exit_code, "No space left on device" in done.output) == (2, True), done.output
    assert Bundle.open(copied).manifest.cache_calibration

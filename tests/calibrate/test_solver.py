"""Calibration of solvers: the reference, the start, derivatives and their equations, and what the bundle keeps.

Most of it runs on a flow whose velocity is known, that of two Gaussians in each pixel, so that a run takes no time.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from elit_export import Pipeline
from elit_export.backends.protocols import FunctionEngine
from elit_export.bundle.reading import Bundle
from elit_export.calibrate.flow import Flow, Method, Trajectories, image_errors, roll
from elit_export.calibrate.gauss_newton import derivatives, normal_equations, parameters, with_parameters
from elit_export.calibrate.least_squares import adams_bashforth
from elit_export.calibrate.reference import resolved_steps, solution, traced
from elit_export.calibrate.solver import References, SolverConfig, TableFit, is_better, record
from elit_export.calibrate.solver_budgets import PLACES, patterns
from elit_export.calibrate.solver_state import NAME, State, discard
from elit_export.cli import main
from elit_export.errors import BundleError, CalibrationError, InputError
from elit_export.runtime.bank import EngineBank, Slot
from elit_export.spec import PIXELS, Precision, Range, default_profiles
from elit_export.spec.solver import MAX_CALLS
from tests.helpers import a_solver, tiny_spec
from tests.runtime.test_samplers import mixture_velocity

SPEC = tiny_spec()
CONFIG = SolverConfig((5,), 32, 0, "none", None, "full", None)
SOME = Trajectories(4, 3, "none")


def pipeline_of(velocity: Any, rows: int = 64) -> Pipeline:
    """A model whose velocity is a function of x (B, C, H, W) and t (B,)."""

    def function(inputs: Any) -> Any:
        return {"velocity": velocity(inputs["x"], inputs["t"]).astype(np.float32)}

    profiles = default_profiles(SPEC.full.kept, Range(1, rows, rows))
    slots = [Slot(profile, FunctionEngine(function)) for profile in profiles]
    return Pipeline(EngineBank(slots, SPEC.budgets, Precision.FP32), SPEC, PIXELS)


def of_mixture(x: np.ndarray, t: np.ndarray) -> np.ndarray:
    return mixture_velocity(x.ravel().astype(np.float64), float(t[0])).reshape(x.shape)


@pytest.fixture(scope="module")
def references() -> References:
    return References(pipeline_of(of_mixture), CONFIG)


def some_method(calls: int = 4) -> Method:
    times = np.linspace(1, 0, calls + 1) ** 1.3
    return Method(times, adams_bashforth(times))


# ---------------------------------------------------------------- the reference


def test_the_reference_is_refined_until_two_resolutions_agree() -> None:
    pipeline = pipeline_of(of_mixture)
    steps, found = resolved_steps(pipeline, SOME)
    finest = solution(pipeline, SOME, 4 * steps)
    assert 10 * np.log10(np.square(finest).sum() / np.square(found - finest).sum()) > 55


def test_velocities_that_are_noise_have_no_reference() -> None:
    def noisy(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        rng = np.random.default_rng(int(t[0] * 1e6))
        return np.asarray(rng.standard_normal(x.shape))

    with pytest.raises(CalibrationError, match=r"no reference solution; .*--precision fp32"):
        resolved_steps(pipeline_of(noisy), SOME)


def test_a_curve_goes_through_its_states() -> None:
    pipeline = pipeline_of(of_mixture)
    coarse, fine = (traced(Flow(pipeline, SOME, steps), steps) for steps in (24, 48))
    np.testing.assert_array_equal(coarse.at(float(coarse.times[7])), coarse.states[7])
    np.testing.assert_array_equal(coarse.at(0.0), coarse.states[-1])
    between = float(fine.times[13])
    np.testing.assert_allclose(coarse.at(between), fine.states[13], atol=2e-3)


# ---------------------------------------------------------------- derivatives


def test_derivatives_are_those_of_the_samples() -> None:
    """Along a random direction the samples change as the derivatives say."""
    part, method = Flow(pipeline_of(of_mixture), SOME, 4).parts[0], some_method()
    slopes = np.stack(list(derivatives(part, method, roll(part, method))))
    values = parameters(method)
    direction = np.random.default_rng(0).standard_normal(len(values)) * 1e-3
    assert slopes.shape == (len(values), 4, SPEC.in_channels * SPEC.input_size**2)
    ends = [roll(part, with_parameters(method, values + sign * direction)).samples for sign in (1, -1)]
    expected = (ends[0] - ends[1]).reshape(4, -1) / 2
    found = np.tensordot(direction, slopes, 1)
    assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)


def test_the_gradient_is_that_of_the_weighted_error() -> None:
    pipeline, method = pipeline_of(of_mixture), some_method()
    flow, expected = Flow(pipeline, SOME, 4), solution(pipeline, SOME, 60)
    weights = np.array([1.0, 2.0, 0.5, 3.0])
    found = normal_equations(flow, method, expected, weights).gradient

    def weighted(values: np.ndarray) -> float:
        errors = image_errors(flow.samples(with_parameters(method, values)), expected)
        return float((weights * errors).sum()) * expected[0].size / 2

    values = parameters(method)
    for place in (0, 5, 9, 11):  # three weights and a time
        moved = np.zeros(len(values))
        moved[place] = 1e-3
        slope = (weighted(values + moved) - weighted(values - moved)) / 2e-3
        assert found[place] == pytest.approx(slope, rel=0.05, abs=1e-3)


def test_parts_add_up() -> None:
    """The equations do not depend on how the images are split."""
    method, weights = some_method(), np.linspace(1, 2, 4)
    expected = solution(pipeline_of(of_mixture), SOME, 60)
    whole, parts = (
        normal_equations(Flow(pipeline_of(of_mixture, rows), SOME, 4), method, expected, weights) for rows in (64, 2)
    )
    np.testing.assert_allclose(parts.matrix, whole.matrix, rtol=2e-3, atol=1e-3 * np.abs(whole.matrix).max())
    np.testing.assert_allclose(parts.gradient, whole.gradient, rtol=2e-3, atol=1e-3 * np.abs(whole.gradient).max())


# ---------------------------------------------------------------- fits


def test_a_fit_beats_its_start_which_beats_ab3(references: References) -> None:
    fit = TableFit(references, 5)
    start = fit.start()
    *_, last = fit.iterations(start)
    begun, ended, ab3 = fit.error(start.now.method), fit.error(last.best), references.sampler_error("ab3", 4)
    assert ab3.calls == ended.calls == 5
    assert begun.pooled_db > ab3.pooled_db + 3
    assert ended.pooled_db > begun.pooled_db + 3
    assert is_better(ended, ab3)
    assert not is_better(ab3, ab3)


def test_a_table_samples_as_its_method(references: References) -> None:
    method = some_method(5)
    solvers = (a_solver(table=method.table(), guidance="none"),)
    bank = references.pipeline.bank
    pipeline = Pipeline(bank, SPEC, PIXELS, solvers=solvers)
    found = pipeline.sample([0, 1, 2, 0], sampler="solver:5", seed=3).latents
    np.testing.assert_allclose(found, Flow(pipeline, SOME, 5).samples(method), atol=1e-12)
    assert Method.of(method.table()).table() == method.table()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"calls": (1,)}, "a table of 1 calls; choose 2 to 32 calls"),
        ({"calls": (33,)}, "a table of 33 calls"),
        ({"images": 31}, "31 images are too few.*give --images 32 or more"),
        ({"images": 10**9}, "at most 100,000 trajectories"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(changed: dict[str, Any], words: str) -> None:
    with pytest.raises((CalibrationError, InputError), match=words):
        replace(CONFIG, **changed)


def test_guidance_that_the_rows_cannot_run_is_refused_at_once() -> None:
    profiles = default_profiles(SPEC.full.kept, Range(1, 1, 1))
    slots = [Slot(profile, FunctionEngine(lambda _: pytest.fail("an engine ran"))) for profile in profiles]
    pipeline = Pipeline(EngineBank(slots, SPEC.budgets, Precision.FP32), SPEC, PIXELS)
    with pytest.raises(InputError, match="2 rows"):
        References(pipeline, replace(CONFIG, guidance="cfg:2"))


# ---------------------------------------------------------------- budgets


def test_patterns_use_the_time_that_there_is() -> None:
    full, half, low = SPEC.full, SPEC.budget("half"), SPEC.budget("quarter")
    cost = {(full, full): 10.0, (half, half): 6.0, (low, low): 4.0, (full, half): 8.0, (full, low): 7.0}
    found = {pattern.name: pattern for pattern in patterns(6, full, {"half": half, "quarter": low}, cost, guided=True)}
    assert len(found) == 2 * 2 * len(PLACES) + 2
    first = found["2 at quarter first"]
    assert (first.calls, first.share) == (7, pytest.approx((2 * 4 + 5 * 10) / 60))
    assert first.budgets.strong == (low, low, *(full,) * 5)
    assert found["4 at half alternating"].budgets.strong == (half, full, half, full, half, full, half)
    assert found["2 at half last"].budgets.strong == (*(full,) * 4, half, half)
    weak = found["weak at quarter"]
    assert (weak.calls, weak.budgets.weak, weak.share) == (8, (low,) * 8, pytest.approx(56 / 60))
    assert all(pattern.share <= 1 for pattern in found.values())


# ---------------------------------------------------------------- interrupted


def test_an_interrupted_fit_goes_on_where_it_was(references: References, tmp_path: Path) -> None:
    fit, identity = TableFit(references, 5), {"seed": 0, "guidance": "none"}
    iterations = fit.iterations(fit.start())
    first = next(iterations)
    State(tmp_path, identity).note(fit, first)
    again = State(tmp_path, identity)
    found = again.progress(fit)
    assert found is not None
    assert found.iterations == 1
    np.testing.assert_array_equal(found.now.method.weights, first.now.method.weights)
    after, expected = next(fit.iterations(found)), next(iterations)
    np.testing.assert_allclose(after.now.method.times, expected.now.method.times, rtol=1e-6)
    assert again.progress(TableFit(references, 4)) is None
    discard(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_state_of_another_calibration_is_refused(references: References, tmp_path: Path) -> None:
    fit = TableFit(references, 5)
    State(tmp_path, {"seed": 0, "images": 32}).note(fit, fit.start())
    with pytest.raises(CalibrationError, match=r"with another seed; .*--restart"):
        State(tmp_path, {"seed": 1, "images": 32})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"identity": 3, "reached": {}, "cost": {}}',
        '{"identity": {}, "reached": {"5": {"now": 3}}, "cost": {}}',
    ],
)
def test_a_damaged_state_is_refused(references: References, tmp_path: Path, text: str) -> None:
    (tmp_path / NAME).write_text(text)
    with pytest.raises(CalibrationError, match=f"{NAME}.*; (delete it|give its options)"):
        State(tmp_path, {}).progress(TableFit(references, 5))


# ---------------------------------------------------------------- into a bundle


@pytest.fixture(scope="module")
def copied(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("solver") / "bundle"
    shutil.copytree(tiny_bundle.folder, folder)
    return folder


def command(folder: Path, *more: str) -> list[str]:
    return ["calibrate", "solver", str(folder), "--calls", "3,4", "--images", "32", "--guidance", "none", *more]


@pytest.fixture(scope="module")
def calibrated(copied: Path) -> tuple[Path, Result]:
    plot, facts = copied.parent / "solvers.png", copied.parent / "solvers.json"
    more = ["--plot", str(plot), "--json", str(facts), "--budgets", "auto"]
    return copied, CliRunner().invoke(main, command(copied, *more), catch_exceptions=False)


def _beats(facts: dict[str, Any], name: str) -> bool:
    return bool(facts["error"][name] > facts["compared"][0][name])


def test_tables_that_beat_ab3_are_stored_and_used(calibrated: tuple[Path, Result]) -> None:
    folder, said = calibrated
    assert said.exit_code == 0, said.output
    told = json.loads((folder.parent / "solvers.json").read_text())
    assert [facts["table"]["budgets"] for facts in told["solvers"][:2]] == [None, None]
    assert all(facts["table"]["budgets"] for facts in told["solvers"][2:])
    assert all(0 < pattern["time"] <= 1 for tried in told["budgets"].values() for pattern in tried)
    better = [facts for facts in told["solvers"] if all(_beats(facts, name) for name in ("median_db", "pooled_db"))]
    assert better, told["compared"]
    solvers = Bundle.open(folder).manifest.solvers
    assert [facts.table.weights for facts in solvers] == [
        tuple(tuple(row) for row in facts["table"]["weights"]) for facts in better
    ]
    assert (folder.parent / "solvers.png").read_bytes().startswith(b"\x89PNG")
    assert not (folder / NAME).exists()
    with Pipeline.load(folder) as pipeline:
        sample = pipeline.sample([0, 1], sampler=solvers[0].name)
    assert len(sample.records) == solvers[0].table.calls


def test_the_next_line_samples(
    calibrated: tuple[Path, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, said = calibrated
    line = said.stdout.strip().splitlines()[-1].partition("next: ")[2]
    monkeypatch.chdir(tmp_path)
    program, *words = shlex.split(line)
    assert (program, "--sampler" in words) == ("elit-export", True)
    done = CliRunner().invoke(main, words, catch_exceptions=False)
    assert (done.exit_code, (tmp_path / "samples.png").exists()) == (0, True), done.output


def test_tables_are_replaced_by_those_of_the_same_place(calibrated: tuple[Path, Result]) -> None:
    folder, _ = calibrated
    bundle = Bundle.open(folder)
    first = bundle.manifest.solvers[0]
    other = replace(first, guidance="cfg:2")
    record(bundle, [replace(first, seed=77), other])
    found = Bundle.open(folder).manifest.solvers
    assert [facts.seed for facts in found if facts.guidance == "none" and facts.table.calls == first.table.calls] == [
        77
    ]
    assert other in found
    with pytest.raises(BundleError, match="another checkpoint meanwhile; calibrate it again"):
        record(bundle, [replace(first, checkpoint_sha256="0" * 64)])


def test_budgets_are_searched_for_guidance_without_one(copied: Path) -> None:
    shown = command(copied, "--budgets", "auto", "--guidance", "ccfg:2@1")
    said = CliRunner().invoke(main, shown)
    assert (said.exit_code, "leave out --budgets auto" in said.output) == (2, True)


def test_budgets_are_searched_beside_the_full_one(copied: Path) -> None:
    said = CliRunner().invoke(main, command(copied, "--budgets", "auto", "--schedule", "half"))
    assert (said.exit_code, "leave out --schedule" in said.output) == (2, True)


def test_no_pattern_has_more_calls_than_a_table() -> None:
    full, low = SPEC.full, SPEC.budget("quarter")
    cost = {(full, full): 10.0, (low, low): 1.0, (full, low): 5.0}
    found = patterns(30, full, {"quarter": low}, cost, guided=True)
    assert found
    assert max(pattern.calls for pattern in found) <= MAX_CALLS


def test_a_calibration_is_at_one_budget(copied: Path) -> None:
    said = CliRunner().invoke(main, command(copied, "--schedule", "0-1:half,2-3:full"))
    assert (said.exit_code, "0-1:half" in said.output) == (2, True)


@pytest.mark.parametrize("calls", ["", "x", "8,", "-3", "2.5"])
def test_calls_are_numbers(copied: Path, calls: str) -> None:
    said = CliRunner().invoke(main, ["calibrate", "solver", str(copied), "--calls", calls])
    assert (said.exit_code, "e.g. 6,8,10" in said.output) == (2, True)


def test_a_kill_leaves_the_bundle_as_it_was(copied: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(copied, folder)
    before = (folder / "manifest.json").read_bytes()
    shown = [sys.executable, "-m", "elit_export", *command(folder, "--calls", "12")]
    process = subprocess.Popen(shown, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (folder / NAME).exists():
        assert process.poll() is None, "it ended before its first iteration"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert (folder / "manifest.json").read_bytes() == before
    assert json.loads((folder / NAME).read_text())["reached"]["12"]
    said = CliRunner().invoke(main, command(folder, "--seed", "5"))
    assert (said.exit_code, "with another seed" in said.output) == (2, True)

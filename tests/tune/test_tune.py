"""Whole searches of the tiny model: by the command, and with an evaluator that sees what it is told to."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from elit_export import Pipeline
from elit_export.arrays import Float64, Int64, Pixels
from elit_export.bundle.presets import MADE_WITH
from elit_export.bundle.reading import MANIFEST, Bundle
from elit_export.cli import main
from elit_export.cli.tune import tune as tune_command
from elit_export.errors import CalibrationError
from elit_export.evaluate.protocol import Evaluator
from elit_export.spec import Precision, Range, SolverTable
from elit_export.tune import finals, images, space, study
from elit_export.tune.finals import Measured, refuse_unmet, verdict
from elit_export.tune.pareto import Quality
from elit_export.tune.ready import belongings, checked_space, reference_plan_set, short_hash
from elit_export.tune.run import Origin, Tuned, tune
from elit_export.tune.search import ALL, LARGEST, Job, Search
from elit_export.tune.study import Study
from elit_export.tune.target import Target
from tests.evaluate.test_quality import FACTS
from tests.helpers import a_solver
from tests.tune.test_pareto import distance, errors

SLOW_MS = 60_000.0  # no sampling of the tiny model takes as long, however busy the machine is


@pytest.fixture(autouse=True)
def _few_samplings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches of the tiny model need no such reference, nor so many controls and rounds."""
    monkeypatch.setattr(images, "REFERENCE_STEPS", 24)
    monkeypatch.setattr(space, "BASELINE_STEPS", 12)
    monkeypatch.setattr(space, "EULER_STEPS", (2, 6, 12))
    monkeypatch.setattr(space, "MULTISTEP_STEPS", (2, 5))
    monkeypatch.setattr(finals, "TIMED_MS", 1.0)
    monkeypatch.setattr(finals, "AGAIN_MS", 1.0)


@pytest.fixture
def copied(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle.folder, tmp_path / "bundle"))


def typed(*words: str | Path) -> Result:
    return CliRunner().invoke(main, ["tune", *map(str, words)])


def tuned(folder: Path, *words: str | Path) -> Any:
    """The facts of a search by the command, of few images and without an evaluator."""
    out = folder.parent / "tuned.json"
    done = typed(folder, "--images", "32", "--trials", "6", "--classifier", "none", "--json", out, *words)
    assert done.exit_code == 0, done.output
    return json.loads(out.read_text())["tune"] | {"said": done.output}


def refused(folder: Path, *words: str | Path) -> str:
    before = (folder / MANIFEST).read_bytes()
    done = typed(folder, "--images", "32", "--trials", "3", *words)
    assert done.exit_code == 2, done.output
    assert (folder / MANIFEST).read_bytes() == before
    return " ".join(done.output.split())


# ---------------------------------------------------------------- by the command


def test_a_target_becomes_presets_that_are_used(copied: Path) -> None:
    plot = copied.parent / "front.png"
    facts = tuned(copied, "--latency", f"{SLOW_MS}ms", "--plot", plot)
    assert [preset["name"] for preset in facts["presets"]] == ["fast", "balanced", "best"]
    assert all(preset["remeasured_ms"] <= SLOW_MS * 1.05 for preset in facts["presets"])
    assert all(row["keeps_solution"] and row["options"]["schedule"] == "full" for row in facts["found"])
    assert any(
        re.search(r"without an evaluator only samplings at the largest budget.*; the samples are \(1, 8, 8\)", note)
        for note in facts["notes"]
    )
    rows = {(row["name"], row["plan_set"]): row for row in facts["found"]}
    assert {row["family"] for row in facts["found"]} >= {"euler", "ab3", "cache alone"}
    best = [row["sqnr_db"] for row in facts["found"] if row["on_front"]]
    assert max(best) == max(row["sqnr_db"] for row in facts["found"])
    manifest = Bundle.open(copied).manifest
    for stored, preset in zip(manifest.presets, facts["presets"], strict=True):
        row = rows[preset["row"], preset["plan_set"]]
        assert stored.options.model_dump(mode="json") == row["options"]
        assert (stored.measured.seed, stored.measured.sqnr_db) == (1001, row["sqnr_db"])
        assert stored.command == (
            f"elit-export tune BUNDLE --latency {SLOW_MS}ms --classifier none --images 32 --trials 6"
        )
        assert (preset["command"] in facts["said"], preset["python"] in facts["said"]) == (True, True)
    with Pipeline.load(copied, preset="fast") as pipeline:
        assert pipeline.sample([0]).latents.shape == (1, 1, 8, 8)
    with Image.open(plot) as picture:
        assert picture.format == "PNG"
        assert picture.width > 300


def test_decibels_are_reached_at_least_cost(copied: Path) -> None:
    facts = tuned(copied, "--min-sqnr", "25", "--name", "sharp", "--trials", "8")
    (preset,) = facts["presets"]
    row = next(row for row in facts["found"] if row["name"] == preset["row"])
    assert preset["name"] == "sharp"
    assert row["sqnr_db"] >= 25 - 0.45
    assert any("the target is in dB" in note for note in facts["notes"])
    assert not any("--classifier" in note for note in facts["notes"])
    assert row["ms"] <= max(each["ms"] for each in facts["found"])


def test_a_latency_below_a_single_call_names_the_smallest(copied: Path) -> None:
    said = refused(copied, "--latency", "0.0001ms", "--classifier", "none")
    match = re.search(r"0\.0001 ms is below a single call: .* takes (\S+) ms; give --latency (\S+)ms or more", said)
    assert match, said
    assert float(match[1]) > 0.01
    said = refused(copied, "--speedup", "1e6", "--classifier", "none", "--study", copied.parent / "other")
    assert re.search(r"is below a single call: .*; give --speedup \S+ or less", said)


def test_decibels_that_nothing_has_name_the_nearest(copied: Path) -> None:
    said = refused(copied, "--min-sqnr", "300")
    assert re.search(
        r"nothing that was found has 300 dB; .* comes nearest with \S+ dB; give --min-sqnr \d+ or less", said
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "a search needs one target; give one of --latency 40ms, --speedup 10, --min-sqnr 34"),
        (["--latency", "1s", "--speedup", "2"], "give one of --latency"),
        (["--latency", "soon"], "is not a time; write it as 40ms or 0.04s"),
        (
            ["--latency", "1s", "--images", "31"],
            "31 images are too few to compare samplings by; give --images 32 or more",
        ),
        (["--latency", "1s", "--name", "../up"], "--name '../up' is not a name; use letters"),
        (["--latency", "1s", "--guidance", "cfg"], "guidance 'cfg' is none of"),
        (["--latency", "1s", "--guidance", ""], "guidance '' is none of"),
        (["--latency", "1s", "--seed", str((1 << 64) - 1)], "is not in the range 0<=x<=18446744073709551614"),
        (
            ["--latency", "1s", "--classifier", "shipped:fashion_classifier"],
            "the samples are (1, 8, 8), the classifier",
        ),
        (["--latency", "1s", "--targets", "gpu"], "no plan set for --targets gpu"),
    ],
)
def test_what_cannot_be_is_refused_before_engines_open(
    tiny_bundle: Bundle, words: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("elit_export.runtime.opening._opened")
    assert said in refused(tiny_bundle.folder, *words)


def test_guidance_that_no_profile_takes_is_refused_before_engines_open(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("elit_export.runtime.opening._opened")
    opened = Bundle.open(copied)
    (plan_set,) = opened.manifest.plan_sets
    one_row = [facts.model_copy(update={"rows": Range(1, 1, 1)}) for facts in plan_set.profiles]
    narrow = plan_set.model_copy(update={"profiles": tuple(one_row)})
    with pytest.raises(
        ValueError, match=r"an image is 2 rows at budget 4of4: .* takes 1..1..1 rows.*choose guidance of"
    ):
        checked_space(opened, [narrow], "cfg:2", rows=1, images=32, seed=0)
    assert checked_space(opened, [narrow], "none", rows=1, images=32, seed=0).budgets[0] == "full"


def test_images_that_a_solver_was_fitted_to_are_refused(tiny_bundle: Bundle) -> None:
    checkpoint = tiny_bundle.manifest.model.checkpoint_sha256
    fitted = a_solver(checkpoint_sha256=checkpoint, guidance="cfg:2", seed=7)
    manifest = tiny_bundle.manifest.model_copy(update={"solvers": (fitted,)})
    bundle = Bundle(tiny_bundle.folder, manifest)
    for seed in (6, 7, 8):
        with pytest.raises(ValueError, match=r"calibrated on images of seed [78]; give another --seed"):
            checked_space(bundle, manifest.plan_sets, "cfg:2", rows=1, images=32, seed=seed)
    for seed, guidance in ((5, "cfg:2"), (9, "cfg:2"), (7, "cfg:3")):
        checked_space(bundle, manifest.plan_sets, guidance, rows=1, images=32, seed=seed)


def test_a_study_belongs_to_the_numbers_of_solver_tables(tiny_bundle: Bundle) -> None:
    def stored(*weights: tuple[float, ...]) -> Any:
        table = SolverTable(times=(1.0, 0.5, 0.0), weights=weights)
        checkpoint = tiny_bundle.manifest.model.checkpoint_sha256
        solvers = (a_solver(checkpoint_sha256=checkpoint, guidance="none", table=table),)
        bundle = Bundle(tiny_bundle.folder, tiny_bundle.manifest.model_copy(update={"solvers": solvers}))
        (plan_set,) = bundle.manifest.plan_sets
        choices = checked_space(bundle, [plan_set], "none", rows=1, images=32, seed=1000)
        job = Job(
            space=choices,
            reference=plan_set.name,
            evaluator=None,
            target=Target(latency_ms=1),
            names=("best",),
            rows=1,
            images=32,
            trials=1,
            seed=1000,
        )
        return belongings(bundle, [plan_set], job)

    one, same, other = stored((-0.5,), (0, -0.5)), stored((-0.5,), (0, -0.5)), stored((-0.5,), (0.1, -0.6))
    assert one == same
    assert [name for name in one if one[name] != other[name]] == ["solver tables"]
    assert short_hash(one) != short_hash(other)  # so each has a file of its own


def test_the_reference_is_computed_by_what_takes_it(tiny_bundle: Bundle) -> None:
    """A plan set in fp32 without the largest budget of the space does not."""
    (exact,) = tiny_bundle.manifest.plan_sets
    other = exact.model_copy(update={"target": "other", "precision": Precision.FP16})
    small = [facts.model_copy(update={"latents": Range(1, 1, 1)}) for facts in exact.profiles]
    narrow = exact.model_copy(update={"profiles": tuple(small)})
    for first, expected in ((exact, "cpu fp32"), (narrow, "other fp16")):
        manifest = tiny_bundle.manifest.model_copy(update={"plan_sets": (first, other)})
        bundle = Bundle(tiny_bundle.folder, manifest)
        choices = checked_space(bundle, [other], "cfg:2", rows=1, images=32, seed=1000)
        assert reference_plan_set(bundle, [other], choices, images=32).name == expected


def test_stored_options_are_those_of_the_command() -> None:
    options = {max(param.opts, key=len) for param in tune_command.params if isinstance(param, click.Option)}
    assert options - set(MADE_WITH) == {"--study", "--plot", "--trust", "--json"}
    assert set(MADE_WITH) <= options


# ---------------------------------------------------------------- interrupted


def test_a_search_that_is_killed_goes_on_with_every_trial(copied: Path) -> None:
    words = ["tune", str(copied), "--min-sqnr", "20", "--images", "32", "--study", str(copied.parent / "kept.tune")]
    file = copied.parent / "kept.tune"
    before = (copied / MANIFEST).read_bytes()
    with subprocess.Popen([sys.executable, "-m", "elit_export", "-q", *words, "--trials", "500"]) as process:
        wait_for(lambda: file.exists() and file.read_bytes().count(b'"made"') >= 3)
        process.send_signal(signal.SIGKILL)
    assert (copied / MANIFEST).read_bytes() == before
    whole = file.read_bytes().rpartition(b"\n")[0]
    made = whole.count(b'"made"')
    facts = tuned(copied, "--min-sqnr", "20", "--trials", str(made + 2), "--study", file)
    assert file.read_bytes().startswith(whole)
    assert facts["trials"] == {LARGEST: made + 2}
    assert file.read_bytes().count(b'"made"') <= made + 3  # two more, and the one that was killed
    assert [preset.name for preset in Bundle.open(copied).manifest.presets]


def wait_for(is_there: Callable[[], bool], seconds: float = 120.0) -> None:
    ends = time.monotonic() + seconds
    while not is_there():
        assert time.monotonic() < ends
        time.sleep(0.02)


def test_a_study_of_another_search_is_refused(copied: Path) -> None:
    file = copied.parent / "kept.tune"
    assert "comes nearest" in refused(copied, "--min-sqnr", "299", "--study", file)
    said = refused(copied, "--min-sqnr", "21", "--study", file)
    assert "target was 'at least 299 dB', now it is 'at least 21 dB'; give another file with --study, or remove" in said


def test_without_optuna_the_extra_is_named(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.delitem(sys.modules, study.__name__)
    for name in ("run", "search", "finals"):
        monkeypatch.delitem(sys.modules, f"elit_export.tune.{name}", raising=False)
    said = refused(tiny_bundle.folder, "--latency", "1s", "--classifier", "none")
    assert re.search(r"tune needs optuna; pip install .*\[tune\]", said)


# ---------------------------------------------------------------- with an evaluator


def look(pictures: Pixels) -> tuple[Float64, Int64]:
    """Means of three parts of an image."""
    rows = pictures.reshape(len(pictures), -1).astype(float) / 255
    features = np.stack([part.mean(axis=1) for part in np.array_split(rows, 3, axis=1)], axis=1)
    return features, np.zeros(len(pictures), np.int64)


def judged(folder: Path, target: Target, names: tuple[str, ...], *, trials: int = 12) -> Tuned:
    opened = Bundle.open(folder)
    (plan_set,) = opened.manifest.plan_sets
    choices = checked_space(opened, [plan_set], "cfg:2", rows=1, images=32, seed=0)
    with Pipeline.load(folder) as pipeline:
        job = Job(
            space=choices,
            reference=plan_set.name,
            evaluator=Evaluator(look, FACTS),
            target=target,
            names=names,
            rows=1,
            images=32,
            trials=trials,
            seed=0,
        )
        searched = Study(folder.parent / "judged.tune", {"a": 1}, seed=0)
        origin = Origin(opened, {plan_set.name: plan_set}, {"gpu fp16": "no GPU"}, "elit-export tune BUNDLE")
        return tune(job, {plan_set.name: pipeline}, searched, origin, lambda *_: None)


def test_an_evaluator_judges_other_budgets_too(copied: Path) -> None:
    result = judged(copied, Target(latency_ms=SLOW_MS), ("best",)).result
    assert result.trials == {LARGEST: 7, ALL: 5}
    assert all(row.distance is not None and row.distance_error is not None for row in result.found)
    assert {row.family for row in result.found} >= {"smaller budget alone"}
    assert {row.sqnr_db is None for row in result.found} == {True, False}
    assert all((row.sqnr_db is not None) == row.keeps_solution for row in result.found)
    (preset,) = result.presets
    assert preset.row in {row.name for row in result.found}


def test_one_trial_is_enough(copied: Path) -> None:
    result = judged(copied, Target(latency_ms=SLOW_MS), ("best",), trials=1).result
    assert (result.trials, [preset.name for preset in result.presets]) == ({LARGEST: 1, ALL: 0}, ["best"])
    assert "gpu fp16 was not searched: no GPU" in result.notes


# ---------------------------------------------------------------- verdicts


def row_of(ms: float, quality: Quality, *, family: str = "euler", steps: int = 1) -> Measured:
    config = space.Config("cpu fp32", space.PresetOptions(sampler="euler", steps=steps))
    return Measured(config, family, ms, ms, 1.0, steps, quality)


def test_a_preset_is_held_against_controls_at_equal_or_more_time() -> None:
    preset = row_of(10, Quality(errors(30, 31), distance(2.0)), family="found")
    faster = row_of(9, Quality(errors(60, 61), distance(0.1)), steps=2)
    near = row_of(10, Quality(errors(29, 30), distance(2.0)), steps=3)
    slow = row_of(90, Quality(errors(60, 61), distance(2.1)), steps=4)
    assert (verdict(preset, [faster, near, slow]).compared_with, verdict(preset, [faster, near, slow]).worse_than) == (
        2,
        [],
    )
    better = row_of(50, Quality(None, distance(1.0)), steps=5)  # by distance every one counts
    assert verdict(preset, [near, slow, better]).worse_than == [str(better.config)]
    in_db = row_of(11, Quality(errors(40, 41), None), steps=6)  # in dB the nearest of a family
    assert verdict(preset, [in_db, slow]).worse_than == [str(in_db.config)]
    assert verdict(preset, [near, in_db]).worse_than == []


# ---------------------------------------------------------------- refusals


def remedy_of(target: Target, names: tuple[str, ...], *measured: Measured) -> str:
    search: Any = SimpleNamespace(job=SimpleNamespace(target=target, goals=target.goals(names)))
    final: Any = SimpleNamespace(measured={each.config: each for each in measured})
    with pytest.raises(CalibrationError) as caught:
        refuse_unmet(search, final)
    return caught.value.remedy


def test_a_target_that_is_advised_is_reached() -> None:
    """Also by `fast` alone, which has 35 % of the time, and in dB by `best` alone, which has 6 more."""
    one = row_of(1234.4, Quality(errors(30.2, 30.2)))
    advised = re.fullmatch(r"give --latency (\S+)ms", remedy_of(Target(latency_ms=1300), ("fast",), one))
    assert advised
    assert 1234.4 <= 0.35 * float(advised[1]) <= 1234.4 * 1.06
    quick = replace(row_of(2000, Quality(), steps=2), speedup=20.0)  # slower, but of a slower plan set
    advised = re.fullmatch(r"give --speedup (\S+)", remedy_of(Target(speedup=90), ("fast", "balanced"), one, quick))
    assert advised
    assert float(advised[1]) == pytest.approx(20 * 0.6 * 0.95, rel=0.01)
    assert remedy_of(Target(min_sqnr_db=40), ("fast", "best"), one) == "give --min-sqnr 30 or less, or more --trials"
    assert remedy_of(Target(min_sqnr_db=40), ("best",), one) == "give --min-sqnr 24 or less, or more --trials"
    assert remedy_of(Target(min_sqnr_db=40), ("best",), row_of(1, Quality(errors(5, 5)))) == "give more --trials"


def test_where_no_trial_is_within_the_target_the_nearest_is_named() -> None:
    near = space.Config("cpu fp32", space.PresetOptions(sampler="ab3", steps=3))
    costs = {near.key: 1.4, space.Config("cpu fp32", space.PresetOptions(sampler="euler", steps=9)).key: 2.0}
    keys = dict(zip((LARGEST, ALL), reversed(costs), strict=True))
    search: Any = SimpleNamespace(
        smallest=(1.0, near),
        job=SimpleNamespace(trial_counts=keys, target=Target(latency_ms=40)),
        _study=SimpleNamespace(nearest=keys.get),
        cost=lambda config: costs[config.key],
        predicted_ms=lambda config: costs[config.key] * 40,
    )
    with pytest.raises(CalibrationError, match=r"no trial .*; the nearest, ab3 3, is .* 56.0 ms; give more --trials"):
        Search.refuse_empty(search)

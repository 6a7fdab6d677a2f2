"""Whole images beside PyTorch eager: what is compared, what the numbers are, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from elit_export import Pipeline
from elit_export.bench.contenders import Choices, SamplingConfig, named_options
from elit_export.bench.whole_image import WholeImageResult, can_solve, check_config, once
from elit_export.bundle.reading import Bundle
from elit_export.bundle.store import writing
from elit_export.checkpoints.native import save_checkpoint
from elit_export.cli import main
from elit_export.cli.bench.whole_image import Asked, is_given
from elit_export.errors import InputError, pip_install
from elit_export.evaluate.classifier import Classifier
from elit_export.evaluate.evaluator import save_evaluator
from elit_export.runtime import opening
from elit_export.runtime.conditioning import numbered
from elit_export.spec import Range
from elit_export.tune.costs import rehearsed
from elit_export.verify.metrics import SampleError, difference, sample_error
from tests.evaluate.test_quality import FACTS
from tests.helpers import preset_of, tiny_model
from tests.runtime.test_solver_tables import ab2_table, facts_of

IMAGES = "8"
SOLVER_SEED = 5


@pytest.fixture(scope="module")
def tuned(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with two presets and a solver table."""
    folder = Path(shutil.copytree(tiny_bundle.folder, tmp_path_factory.mktemp("tuned") / "bundle"))
    sha256 = tiny_bundle.manifest.model.checkpoint_sha256
    solver = facts_of(ab2_table(6), "cfg:2", checkpoint_sha256=sha256, seed=SOLVER_SEED)
    presets = (
        preset_of(tiny_bundle, "fast", sampler="solver:6", steps=None, guidance_interval=None),
        preset_of(tiny_bundle, "small", steps=4, schedule="quarter", guidance_interval=None),
    )
    with writing(folder) as store:
        assert store.manifest
        store.commit(store.manifest.model_copy(update={"solvers": (solver,), "presets": presets}))
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of random weights that takes the tiny model's images."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("classifier") / "c.safetensors"
    save_evaluator(path, Classifier(FACTS.spec), FACTS)
    return path


def run(bundle: Path, *options: str | Path) -> Result:
    return CliRunner().invoke(main, ["bench", "samplers", str(bundle), *map(str, options)])


def compared(bundle: Path, checkpoint: Path, *options: str | Path) -> tuple[dict[str, Any], str]:
    done = run(bundle, "--whole-image", "--checkpoint", checkpoint, "--rounds", "2", "--json", "-", *options)
    assert done.exit_code == 0, done.output
    facts: dict[str, Any] = json.loads(done.stdout)["whole_image"]
    return facts, " ".join(done.stderr.split())


@pytest.fixture(scope="module")
def whole(tuned: Path, tiny_checkpoint: Path, classifier: Path) -> tuple[dict[str, Any], str]:
    """One run for all tests of its numbers: PyTorch, two presets, and Euler's 50 steps on the engines."""
    return compared(tuned, tiny_checkpoint, "--row", "euler:50", "--images", IMAGES, "--classifier", classifier)


# ---------------------------------------------------------------- numbers


def test_presets_and_named_samplings_stand_beside_pytorch(whole: tuple[dict[str, Any], str]) -> None:
    facts, said = whole
    configs = facts["configs"]
    assert [(config["name"], config["plan_set"], config["engine_calls"]) for config in configs] == [
        ("PyTorch eager", "PyTorch eager", 50),
        ("preset fast", "cpu fp32", 6),
        ("preset small", "cpu fp32", 5),
        ("euler:50", "cpu fp32", 50),
    ]
    assert all(config["timing"]["runs"] == 2 and 0 < config["outside_engines"] < 1 for config in configs)
    (call,) = facts["calls"]
    assert (call["plan_set"], call["budget"], call["rows"]) == ("cpu fp32", "4of4", 2)
    assert call["lead"] == pytest.approx(call["eager"]["median_ms"] / call["engine"]["median_ms"])
    eager_ms = configs[0]["timing"]["median_ms"]
    for config in configs[1:]:
        assert config["speedup"] == pytest.approx(eager_ms / config["timing"]["median_ms"])
        assert config["over_lead"] == pytest.approx(config["speedup"] / call["lead"])
    assert (configs[0]["speedup"], configs[0]["over_lead"]) == (1, None)
    assert configs[1]["speedup"] > 3  # a ninth of the calls
    assert "lead per call of cpu fp32" in said


def test_errors_are_of_one_ode_and_pytorch_has_those_of_the_engines(whole: tuple[dict[str, Any], str]) -> None:
    eager, fast, small, euler = whole[0]["configs"]
    assert whole[0]["reference"] == "cpu fp32"
    assert euler["error"] == pytest.approx(eager["error"], abs=0.01)
    assert euler["gain"] == pytest.approx(dict.fromkeys(("pooled_db", "median_db", "worst_db"), 0), abs=0.01)
    assert fast["gain"]["pooled_db"] == pytest.approx(fast["error"]["pooled_db"] - eager["error"]["pooled_db"])
    assert small["error"] is small["gain"] is None  # another budget solves another equation
    assert eager["error"]["worst_db"] < eager["error"]["median_db"]


def test_distances_are_paired_with_those_of_pytorch(whole: tuple[dict[str, Any], str]) -> None:
    facts, said = whole
    eager, fast, small, euler = (config["distance"] for config in facts["configs"])
    assert (eager["change"], eager["change_error"]) == (0, 0)
    assert fast["change"] == pytest.approx(fast["value"] - eager["value"])
    assert abs(euler["change"]) < 1e-3 * eager["value"]
    assert small["change_error"] > 0
    over = facts["configs"][2]["change_over_error"]
    assert over == pytest.approx(small["change"] / small["change_error"])
    assert facts["configs"][0]["change_over_error"] == 0
    assert "change of Fréchet" in said


def test_pytorch_samples_as_the_engines_do(tiny_bundle: Bundle) -> None:
    from elit_export.verify.reference import torch_pipeline

    options = named_options("ab3:9", "cfg:2", 3)
    with Pipeline.load(tiny_bundle.folder) as pipeline:
        of_engines = pipeline.sampled([0, 1, 2], options).latents
    of_pytorch = torch_pipeline(tiny_model()).sampled([0, 1, 2], options).latents
    assert 100 < difference(of_engines, of_pytorch).sqnr_db < np.inf


def test_times_alone_and_limits_of_them(tuned: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Rows of each plan set in one table; a limit that does not hold is status 1."""
    (tmp_path / "limits.json").write_text('[{"metric": "whole_image.configs.1.speedup", "min": 1e6}]')
    options = ("--no-quality", "--rows", "2", "--rounds", "1", "--check", tmp_path / "limits.json")
    done = run(tuned, "--whole-image", "--checkpoint", tiny_checkpoint, "--json", tmp_path / "w.json", *options)
    assert done.exit_code == 1, done.output
    assert "the limit is at least 1e+06" in done.output
    assert "median image" not in done.output
    facts = json.loads((tmp_path / "w.json").read_text())["whole_image"]
    assert set(facts) == set(WholeImageResult.__dataclass_fields__)
    assert (facts["rows"], facts["images"], facts["reference"], facts["evaluator"]) == (2, 0, None, None)
    assert facts["calls"][0]["rows"] == 4
    assert {config["error"] is config["distance"] is None for config in facts["configs"]} == {True}


def test_without_a_classifier_that_fits_it_says_why(tuned: Path, tiny_checkpoint: Path) -> None:
    facts, said = compared(tuned, tiny_checkpoint, "--images", "2", "--rounds", "1")
    assert facts["configs"][1]["distance"] is None
    assert facts["no_distance"].startswith("the shipped classifier does not fit: the samples are")
    assert f"no distance from real images: {facts['no_distance']}" in said


def test_a_recipe_names_the_checkpoint(tuned: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        f'name = "r"\ncheckpoint = "{tiny_checkpoint}"\nrows = {{ min = 1, opt = 1, max = 1 }}\n'
        '[targets.cpu]\nbackend = "onnxruntime"\ndevice = "cpu"\nprecision = "fp32"\n'
    )
    facts, _ = compared(tuned, recipe, "--no-quality", "--rounds", "1")
    assert [config["name"] for config in facts["configs"]] == ["PyTorch eager", "preset fast", "preset small"]


def test_the_error_of_samples_is_told_three_ways() -> None:
    expected = np.ones((3, 2, 2))
    actual = expected + np.array([0.1, 0.01, 0.001])[:, None, None]
    error = sample_error(actual, expected)
    assert (error.median_db, error.worst_db) == (pytest.approx(40), pytest.approx(20))
    assert error.pooled_db == pytest.approx(10 * np.log10(3 / (0.01 + 1e-4 + 1e-6)))
    assert error - SampleError(1, 2, 3) == SampleError(error.pooled_db - 1, error.median_db - 2, error.worst_db - 3)


# ---------------------------------------------------------------- what is refused


@pytest.fixture
def _no_engine_opens(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Opening a plan is a bug here."""
    with monkeypatch.context() as patch:
        patch.delattr(opening, "_opened")
        yield


def refused(bundle: Path, *options: str | Path) -> str:
    done = run(bundle, *options)
    assert done.exit_code == 2, done.output
    return " ".join(done.output.split())


WHOLE = ("--whole-image", "--checkpoint", "CHECKPOINT")


@pytest.mark.usefixtures("_no_engine_opens")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--whole-image",), "compares with PyTorch; give --checkpoint RECIPE or --checkpoint FILE too"),
        (("--row", "ab3:4"), "--row is of --whole-image; give that too, or leave it out"),
        (("--no-quality",), "--no-quality is of --whole-image; give that too"),
        (("--seed", "0"), "--seed is of --whole-image; give that too"),
        ((*WHOLE, "--row", "ab3"), "row 'ab3' is not SAMPLER:STEPS"),
        ((*WHOLE, "--row", "ab3:4@fifth"), "fifth"),
        ((*WHOLE, "--row", "euler-maruyama:9"), "draws noise at every step, so its images could not be compared"),
        ((*WHOLE, "--row", "solver:7"), "elit-export calibrate solver BUNDLE --calls 7 --guidance cfg:2"),
        ((*WHOLE, "--row", "magic:7"), "unknown sampler 'magic:7'"),
        ((*WHOLE, "--seed", str(SOLVER_SEED)), "solver:6 was calibrated on images of seed 5; give another --seed"),
        ((*WHOLE, "--seed", str(SOLVER_SEED + 1)), "solver:6 was calibrated on images of seed 6; give another --seed"),
        ((*WHOLE, "--guidance", "magic:2"), "guidance 'magic:2' is none of"),
        ((*WHOLE, "--guidance", ""), "guidance '' is none of"),
        ((*WHOLE, "--classifier", "shipped:fashion_classifier"), "the samples are (1, 8, 8), the classifier takes"),
        ((*WHOLE, "--no-quality", "--classifier", "c"), "leave --classifier or --no-quality out"),
        ((*WHOLE, "--target", "gpu"), "no plan set for --target gpu"),
    ],
)
def test_what_cannot_be_compared(tuned: Path, tiny_checkpoint: Path, options: tuple[str, ...], said: str) -> None:
    given = [str(tiny_checkpoint) if option == "CHECKPOINT" else option for option in options]
    assert said in refused(tuned, *given)


def test_an_empty_guidance_is_not_the_default(tiny_bundle: Bundle) -> None:
    assert "guidance '' is none of" in refused(tiny_bundle.folder, "--guidance", "")


def test_a_seed_of_0_is_the_one_that_is_used() -> None:
    assert is_given(0)
    assert not any(map(is_given, (None, False, ())))
    assert Asked.of({"--checkpoint": "c", "--seed": 0}).choices(None, None).seed == 0


@pytest.mark.usefixtures("_no_engine_opens")
def test_a_bundle_without_presets_names_the_command_that_makes_them(
    tiny_bundle: Bundle, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    said = refused(tiny_bundle.folder, "--whole-image", "--checkpoint", tiny_checkpoint)
    assert f"elit-export tune {tiny_bundle.folder} --speedup 10; or name samplings, e.g. --row ab3:14" in said


@pytest.mark.usefixtures("_no_engine_opens")
def test_presets_and_weights_of_another_checkpoint(tuned: Path, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "other.safetensors", tiny_model(core_depth=1))
    said = refused(tuned, "--whole-image", "--checkpoint", tmp_path / "other.safetensors")
    assert "sha256 differs" in said
    assert "give its own checkpoint" in said
    folder = Path(shutil.copytree(tuned, tmp_path / "copied"))
    with writing(folder) as store:
        assert store.manifest
        preset = store.manifest.presets[0].model_copy(update={"checkpoint_sha256": "1" * 64})
        store.commit(store.manifest.model_copy(update={"presets": (preset,)}))
    said = refused(folder, "--whole-image", "--checkpoint", "shipped:fashion")
    assert "of another checkpoint" in said
    assert "make it again: elit-export tune" in said


def test_latents_without_a_decoder_are_timed_and_have_errors(golden_g4_bundle: Bundle) -> None:
    checkpoint = golden_g4_bundle.folder.parent / "g4.safetensors"
    facts, _ = compared(
        golden_g4_bundle.folder, checkpoint, "--row", "ab3:4", "--images", "2", "--rounds", "1", "--guidance", "none"
    )
    eager, ab3 = facts["configs"]
    assert facts["calls"][0]["rows"] == 1
    assert ab3["gain"]["pooled_db"] == pytest.approx(ab3["error"]["pooled_db"] - eager["error"]["pooled_db"])
    assert "the samples are latents of a VAE" in facts["no_distance"]


@pytest.mark.usefixtures("_no_engine_opens")
def test_limits_of_what_is_not_measured(tuned: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "limits.json").write_text('[{"metric": "whole_image.configs.1.error.pooled_db", "min": 1}]')
    options = ("--whole-image", "--checkpoint", tiny_checkpoint, "--check", tmp_path / "limits.json")
    assert "leave --no-quality out" in refused(tuned, *options, "--no-quality")


def test_without_torch_it_names_the_extra(tuned: Path, tiny_checkpoint: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; from elit_export.cli import main; main()"
    command = [sys.executable, "-c", code, "bench", "samplers", str(tuned), "--whole-image"]
    options = ["--checkpoint", str(tiny_checkpoint), "--no-quality"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert pip_install("export") in done.stderr


def test_engine_calls_are_all_that_a_sampling_makes(tiny_bundle: Bundle) -> None:
    """As a preset counts them: those that reuse too, and those of every part."""
    options = replace(named_options("euler:6", "none", 1), cache="static:every@2")
    with Pipeline.load(tiny_bundle.folder) as pipeline:
        config = SamplingConfig("one", "cpu fp32", pipeline, options, pipeline.decode)
        images = numbered(pipeline.spec, range(12), None)
        assert len(pipeline.prepared(images, options).part_sizes) == 2
        expected = rehearsed(pipeline, pipeline.prepared(images, options))
        assert once(config, images).engine_calls == len(expected) == 12
        assert any(call.reused for call in expected)


def test_images_are_checked_as_they_are_split(tiny_bundle: Bundle) -> None:
    """Quality is sampled a few images at once, which a profile of many rows does not take."""
    plan_set = tiny_bundle.manifest.plan_sets[0]
    choices = Choices(rows=64, rounds=1, images=64, guidance="none", seed=1)
    on = opening.unopened(tiny_bundle, plan_set)
    check_config(on, named_options("ab3:4", "none", 1), choices)
    assert can_solve(on, choices)
    profiles = tuple(replace(profile, rows=Range(64, 64, 64)) for profile in on.coverage.profiles)
    large = replace(on, coverage=replace(on.coverage, profiles=profiles))
    check_config(large, named_options("ab3:4", "none", 1), replace(choices, images=0))
    with pytest.raises(InputError, match="parts of at most 16") as caught:
        check_config(large, named_options("ab3:4", "none", 1), choices)
    assert caught.value.remedy.endswith("or measure times alone: --no-quality")
    assert not can_solve(large, choices)


def test_a_named_sampling_is_read_as_it_is_typed() -> None:
    options = named_options("ab3:9@half", "cfg:3", 4)
    assert (options.sampler, options.steps, options.schedule) == ("ab3", 9, "half")
    assert (options.guidance, options.seed) == ("cfg:3", 4)
    solver = named_options("solver:8", "none", 4)
    assert (solver.sampler, solver.steps, solver.schedule) == ("solver:8", None, "full")
    with pytest.raises(InputError, match="at most 10,000 steps"):
        named_options("ab3:1000000", "none", 0)

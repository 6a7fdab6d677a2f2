"""A model that takes text through the whole toolchain: engines, trajectories, guidance, caches, what is refused."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from elit_export import Pipeline, compile_bundle
from elit_export.bench import cache as cache_sweep
from elit_export.bundle.reading import Bundle
from elit_export.bundle.recipe import Recipe, recipe_from_values
from elit_export.bundle.store import writing
from elit_export.calibrate.step_cache import Trajectories, joined, sample_pairs
from elit_export.checkpoints.native import save_checkpoint
from elit_export.cli import main
from elit_export.cost.flops import flops, flops_per_image
from elit_export.errors import BundleError, InputError, RecipeError
from elit_export.runtime.guidance import Guidance
from elit_export.runtime.prompts import Embedded, Prompts
from elit_export.spec import CACHE_GRAPHS, Range
from elit_export.verify.reference import torch_pipeline
from tests.conftest import recipe_values
from tests.helpers import calibrate, fit_of, max_relative, tiny_spec
from tests.text_models import shallow_text_model, text_model

TEXT = {"min": 2, "opt": 5, "max": 9}
RANGE = Range(2, 5, 9)


def recipe_of(checkpoint: Path, *, fused: bool = False, **changes: Any) -> Recipe:
    values: Any = recipe_values(checkpoint) | {"text": TEXT, "rows": {"min": 1, "opt": 2, "max": 8}}
    values["targets"]["cpu"]["fused"] = fused
    values["targets"]["ov"] = {"backend": "openvino", "precision": "fp32", "threads": 1}
    rtx = {"backend": "tensorrt-rtx", "precision": "fp16", "compute_capabilities": ["8.9"], "fused": fused}
    values["targets"] |= {"rtx": rtx, "rtx-multi": rtx | {"layout": "multi-profile"}}
    return recipe_from_values({name: value for name, value in (values | changes).items() if value is not None}, "test")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.safetensors"
    save_checkpoint(path, text_model())
    return path


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Bundle:
    """Do not change it: copy it first."""
    return compile_bundle(recipe_of(checkpoint), "cpu", out=checkpoint.parent / "bundle")


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a model that is exported with `fused` too."""
    path = tmp_path_factory.mktemp("shallow") / "text.safetensors"
    save_checkpoint(path, shallow_text_model())
    return path


@pytest.fixture
def pipeline(bundle: Bundle) -> Iterator[Pipeline]:
    with Pipeline.load(bundle.folder) as loaded:
        yield loaded


def embedded(lengths: list[int], longest: int, *, seed: int = 0) -> Embedded:
    text = np.random.default_rng(seed).standard_normal((len(lengths), longest, 24)).astype(np.float32)
    return Embedded(text, (np.arange(longest) < np.array(lengths)[:, None]).astype(np.int64))


PROMPTS = Prompts(embedded([5, 3, 7], 7), embedded([2, 4, 1], 4, seed=1))

# ---------------------------------------------------------------- engines and trajectories


def output_of(*arguments: str, stdout: bool = False) -> str:
    done = CliRunner().invoke(main, list(arguments))
    assert done.exit_code == 0, done.output
    return done.stdout if stdout else " ".join(done.output.split())


def test_verify_passes(bundle: Bundle) -> None:
    done = CliRunner().invoke(main, ["verify", str(bundle.folder)])
    assert done.exit_code == 0, done.output
    assert "mixed" in done.output


def test_a_bundle_with_fused_passes(shallow: Path, tmp_path: Path) -> None:
    built = compile_bundle(recipe_of(shallow, fused=True), "cpu", out=tmp_path / "bundle")
    assert "fused" in output_of("verify", str(built.folder))


def test_cases_reach_the_ends_of_the_range_of_text(bundle: Bundle) -> None:
    (plan_set,) = bundle.manifest.plan_sets
    assert {case.text for case in plan_set.reference.cases} == {2, 5, 9}
    assert all(facts.profile.text == RANGE for facts in plan_set.profiles)


def test_profiles_whose_rows_share_no_number_of_images_are_compared_without_trajectories(
    checkpoint: Path, tmp_path: Path
) -> None:
    profiles = [
        {"name": name, "latents": {"min": kept, "opt": kept, "max": kept}, "rows": {"min": n, "opt": n, "max": n}}
        for name, kept, n in (("low", 4, 1), ("high", 16, 2))
    ]
    built = compile_bundle(recipe_of(checkpoint, profiles=profiles), "cpu", out=tmp_path / "bundle")
    (plan_set,) = built.manifest.plan_sets
    assert plan_set.reference.trajectories == ()
    assert all(facts.parity.status == "passed" for facts in plan_set.profiles)


def test_inspect_tells_how_long_text_may_be_and_counts_the_usual_length(bundle: Bundle) -> None:
    said = output_of("inspect", str(bundle.folder))
    assert "2..5..9" in said
    assert "one image and 5 text tokens" in said
    assert "one image and 7 text tokens" in output_of("inspect", str(bundle.folder), "--text", "7")
    facts = json.loads(output_of("inspect", str(bundle.folder), "--json", "-", stdout=True))
    assert {profile["text"] for profile in facts["plan_sets"][0]["profiles"]} == {"2..5..9"}
    assert facts["budgets"][0]["flops"] == flops(text_model().spec, text_model().spec.full, text=5).total


def test_comparisons_tell_the_length_of_text(bundle: Bundle) -> None:
    found = json.loads(output_of("verify", str(bundle.folder), "--json", "-", stdout=True))
    points = [comparison["point"] for comparison in found if comparison["part"] == "profile full"]
    assert "K=16 rows=8 text=9 velocity" in points
    assert all(" text=" in point for point in points)


CHOICES: dict[str, dict[str, Any]] = {
    "plain": {"schedule": "0-1:1,2-3:full"},
    "true cfg, both in a call": {"guidance": "cfg:3,norm", "time_grid": "shift:2.0"},
    "a cheap weak branch with its own length": {"guidance": "ccfg:3@1,norm", "sampler": "heun"},
    "autoguidance": {"guidance": "autoguidance:2@1"},
    "cached": {"guidance": "ccfg:2@quarter", "cache": "static:every@2"},
    "cached by time": {"cache": "static:time@1.5"},
}


REUSED = {"cached": "0100", "cached by time": "0100"}  # of 4 steps; the others reuse none


@pytest.mark.parametrize("choice", list(CHOICES))
def test_trajectories_equal_those_of_torch(pipeline: Pipeline, choice: str) -> None:
    given: Any = {"steps": 4, "seed": 2} | CHOICES[choice]
    found = pipeline.sample(PROMPTS, **given)
    assert max_relative(found.latents, torch_pipeline(text_model()).sample(PROMPTS, **given).latents) <= 1e-4
    assert found.labels == ()
    assert "3 images in 4 steps" in found.summary()
    for record in found.records:
        assert {call.reused for call in record.calls} == {REUSED.get(choice, "0000")[record.index] == "1"}


def test_prompts_are_split_with_their_negative_ones(pipeline: Pipeline) -> None:
    """Nine guided images are 18 rows, and a call takes 8."""
    many, given = PROMPTS.repeated(3), {"steps": 3, "guidance": "cfg:3,norm", "seed": 4}
    found = pipeline.sample(many, **given)
    assert found.part_sizes == (3, 3, 3)
    parts = [
        pipeline.sample(many.at(np.arange(first, first + 3)), first_image=first, **given).latents for first in (0, 3, 6)
    ]
    assert max_relative(found.latents, np.concatenate(parts)) <= 1e-5  # the text of a part alone may have less padding


def test_a_prompt_gives_its_image_whatever_is_beside_it(pipeline: Pipeline) -> None:
    """Nor does padding matter, of its own or of the negative text."""
    given: Any = {"steps": 3, "guidance": "cfg:3,norm"}
    together = pipeline.sample(PROMPTS, **given).latents
    positive, negative = PROMPTS.positive, PROMPTS.negative
    assert negative
    alone = Prompts(
        Embedded(positive.text[1:2, :3], positive.mask[1:2, :3]), Embedded(negative.text[1:2], negative.mask[1:2])
    )
    noise = pipeline.request(PROMPTS, **given).start[1:2]
    np.testing.assert_allclose(
        pipeline.sample(alone, noise=noise, **given).latents, together[1:2], rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("guidance", ["none", "cfg:3,norm", "ccfg:3@1", "autoguidance:2@1"])
def test_short_prompts_are_filled_up_to_what_engines_take(pipeline: Pipeline, guidance: str) -> None:
    """To 2 tokens here; PyTorch runs on one alone."""
    short = Prompts(embedded([1, 1], 1), embedded([1, 1], 1, seed=1))
    given: Any = {"steps": 3, "guidance": guidance}
    found = pipeline.sample(short, **given)
    assert max_relative(found.latents, torch_pipeline(text_model()).sample(short, **given).latents) <= 1e-4
    assert {call.text for call in found.calls} == {2}


def test_padding_that_ends_every_prompt_is_left_out(pipeline: Pipeline) -> None:
    """As encoders write it that fill up to a length of their own."""
    wide = Prompts(*(Embedded(*joined_with_padding(each)) for each in (PROMPTS.positive, PROMPTS.negative) if each))
    found, expected = (pipeline.sample(told, steps=2, guidance="ccfg:3@1") for told in (wide, PROMPTS))
    assert np.array_equal(found.latents, expected.latents)
    assert [call.text for call in found.calls] == [call.text for call in expected.calls] == [7, 4] * 3


def joined_with_padding(told: Embedded) -> tuple[Any, Any]:
    return np.pad(told.text, [(0, 0), (0, 60), (0, 0)]), np.pad(told.mask, [(0, 0), (0, 60)])


def test_flops_count_the_text_of_each_call(pipeline: Pipeline) -> None:
    spec = pipeline.spec
    sample = pipeline.sample(PROMPTS, steps=2, sampler="euler", guidance="ccfg:3@1")
    strong, weak = flops(spec, spec.full, text=7).total, flops(spec, spec.budget(1), text=4).total
    assert flops_per_image(sample, spec) == 2 * (strong + weak)
    joint = pipeline.sample(PROMPTS, steps=2, sampler="euler", guidance="cfg:3")
    assert flops_per_image(joint, spec) == 2 * 2 * strong


UNGUIDED = [
    {"guidance": "cfg:1"},
    {"guidance": "ccfg:1@1"},
    {"guidance": "cfg:3", "guidance_interval": (0.3, 0.4)},  # between two of the times 1, 0.5, 0
    {"guidance": "cfg:3", "guidance_interval": (0.0, 0.0), "sampler": "heun"},  # whose last step ends by Euler
]


@pytest.mark.parametrize("choices", UNGUIDED, ids=str)
def test_guidance_that_no_step_uses_needs_no_negative_prompt(pipeline: Pipeline, choices: dict[str, Any]) -> None:
    alone = Prompts(PROMPTS.positive)
    given: Any = {"steps": 2, "sampler": "euler"} | choices
    plain = pipeline.sample(alone, steps=2, sampler=given["sampler"])
    assert np.array_equal(pipeline.sample(alone, **given).latents, plain.latents)


def test_what_a_calibration_sees_needs_no_text(pipeline: Pipeline) -> None:
    """The engines of `probe` take none, and refuse it."""
    wanted = Trajectories(images=4, steps=(4,), budgets=(pipeline.spec.full,), guidance=("cfg:2",), seed=1, rows=8)
    found = joined(list(sample_pairs(pipeline, wanted)))
    assert (found.distance > 0).all()
    assert (found.change > 0).all()


def test_teacache_decides_as_with_torch(bundle: Bundle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle.folder, tmp_path / "bundle"))
    calibrate(folder, fit_of(None))
    choices: Any = {"steps": 6, "cache": "teacache:0.5", "guidance": "ccfg:2@quarter"}
    with Pipeline.load(folder) as pipeline:
        found = pipeline.sample(PROMPTS, **choices)
        bank = torch_pipeline(text_model()).bank
        reference = Pipeline(bank, pipeline.spec, pipeline.data, fits=pipeline.coverage.fits)
        expected = reference.sample(PROMPTS, **choices)
    assert [call.reused for call in found.calls] == [call.reused for call in expected.calls]
    assert 0 < sum(call.reused for call in found.calls) < len(found.calls) - 2
    assert max_relative(found.latents, expected.latents) <= 1e-4


def test_a_call_tells_how_long_its_text_is(pipeline: Pipeline) -> None:
    calls = pipeline.sample(PROMPTS, steps=2, guidance="ccfg:2@1", sampler="euler").calls
    assert [(call.role, call.text) for call in calls] == [("strong", 7), ("weak", 4)] * 2
    joined_calls = pipeline.sample(PROMPTS, steps=2, guidance="cfg:2", sampler="euler").calls
    assert [(call.role, call.text) for call in joined_calls] == [("joined", 7)] * 2


def test_caches_are_swept_with_random_prompts(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few ways of few steps; guidance keeps its `norm` where the weak branch is cheaper."""
    few = {"REFERENCE_STEPS": 8, "EULER_STEPS": (4,), "MULTISTEP_STEPS": (4,), "COMBINED_STEPS": (6,)}
    for name, value in few.items():
        monkeypatch.setattr(cache_sweep, name, value)
    folder = Path(shutil.copytree(bundle.folder, tmp_path / "bundle"))
    calibrate(folder, fit_of(None))
    with Pipeline.load(folder) as pipeline:
        found = cache_sweep.sweep(
            pipeline, schedule="full", guidance="cfg:3,norm", images=2, rounds=1, fine_steps=6, on_way=lambda *_: None
        )
    rows = {row.name: row for row in found.rows}
    assert rows["ab3 14, weak at quarter"].options["guidance"] == "ccfg:3@4,norm"
    assert rows["every@2,order=1"].reused == 3
    assert all(np.isfinite(row.sqnr_db) and row.ms_per_image > 0 and row.over_parts > 0 for row in found.rows)


def test_bench_counts_the_text(bundle: Bundle) -> None:
    arguments = [str(bundle.folder), "--rows", "2", "--rounds", "1", "--no-sampling"]
    facts = json.loads(output_of("bench", "engines", *arguments, "--json", "-", stdout=True))
    spec = text_model().spec
    expected = [flops(spec, budget, text=RANGE.opt).total for budget in spec.named_budgets.values()]
    assert [row["flops"] for row in facts["budgets"]] == expected


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="needs openvino")
def test_openvino_meets_its_tolerance(checkpoint: Path, tmp_path: Path) -> None:
    """`time` among its graphs, whose products it would merge, with another rounding: 108 dB."""
    built = compile_bundle(recipe_of(checkpoint), "ov", out=tmp_path / "bundle")
    (plan_set,) = built.manifest.plan_sets
    assert {parity.status for parity in plan_set.parities} == {"passed"}
    given: Any = {"steps": 3, "guidance": "cfg:4,norm", "time_grid": "shift:2.0", "sampler": "heun"}
    with Pipeline.load(built.folder) as pipeline:
        found = pipeline.sample(PROMPTS, **given).latents
    assert max_relative(found, torch_pipeline(text_model()).sample(PROMPTS, **given).latents) <= 1e-4


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt-rtx")
@pytest.mark.parametrize(("target", "plans"), [("rtx", 3), ("rtx-multi", 1)])
def test_tensorrt_for_rtx_builds_plans_that_are_not_run(shallow: Path, tmp_path: Path, target: str, plans: int) -> None:
    built = compile_bundle(recipe_of(shallow, fused=True), target, out=tmp_path / "bundle")
    (plan_set,) = built.manifest.plan_sets
    assert all(facts.parity.status == "not run" for facts in plan_set.profiles)
    assert all(facts.profile.text == RANGE for facts in plan_set.profiles)
    assert len({facts.plan.artifact.name for facts in plan_set.profiles}) == plans
    assert set(plan_set.cache) == set(CACHE_GRAPHS)
    assert plan_set.fused


# ---------------------------------------------------------------- guidance that keeps lengths


def test_norm_gives_every_token_the_length_that_the_strong_branch_has() -> None:
    generator = np.random.default_rng(0)
    strong, weak = generator.standard_normal((2, 2, 3, 4, 6)).astype(np.float32)
    guidance = Guidance.parse("cfg:4,norm", tiny_spec())
    found, plain = (each.combine([strong, weak], patch=2) for each in (guidance, replace(guidance, norm=False)))
    for row in range(2):
        for top in range(0, 4, 2):
            for left in range(0, 6, 2):
                token = np.s_[row, :, top : top + 2, left : left + 2]
                assert np.linalg.norm(found[token]) == pytest.approx(np.linalg.norm(strong[token]), rel=1e-6)
                direction = plain[token] / np.linalg.norm(plain[token])
                np.testing.assert_allclose(found[token] / np.linalg.norm(found[token]), direction, rtol=1e-6)


def packed(x: np.ndarray, patch: int) -> np.ndarray:  # (B, C, H, W) → (B, N, C·p·p), as diffusers' pipeline does it
    rows, channels, height, width = x.shape
    squares = x.reshape(rows, channels, height // patch, patch, width // patch, patch)
    return squares.transpose(0, 2, 4, 1, 3, 5).reshape(rows, -1, channels * patch**2)


def test_a_step_is_that_of_diffusers(pipeline: Pipeline) -> None:
    """`true_cfg_scale` of QwenImagePipeline, whose norms are over packed latents: those of a token."""
    model, spec = torch_pipeline(text_model()), pipeline.spec
    given: Any = {"steps": 1, "sampler": "euler", "seed": 3}
    assert PROMPTS.negative
    start = model.request(PROMPTS, **given).start
    conditional, unconditional = (
        packed(start - model.sample(Prompts(told), **given).latents, spec.patch_size)  # x₀ = x₁ − v
        for told in (PROMPTS.positive, PROMPTS.negative)
    )
    combined = unconditional + 4 * (conditional - unconditional)
    lengths = [np.linalg.norm(each, axis=-1, keepdims=True) for each in (conditional, combined)]
    expected = packed(start, spec.patch_size) - combined * (lengths[0] / lengths[1])
    found = pipeline.sample(PROMPTS, guidance="cfg:4,norm", **given).latents
    assert max_relative(packed(found, spec.patch_size), expected) <= 1e-4


def test_a_token_without_length_stays_nothing() -> None:
    nothing = np.zeros((1, 1, 2, 2), np.float32)
    assert not Guidance.parse("cfg:4,norm", tiny_spec()).combine([nothing, nothing], patch=2).any()


@pytest.mark.parametrize("text", ["cfg:4,norm", "ccfg:2@1,norm", "autoguidance:2@1,norm", "cfg:4"])
def test_guidance_reads_what_it_prints(text: str) -> None:
    assert str(Guidance.parse(text, tiny_spec())) == text


@pytest.mark.parametrize("text", ["cfg:4,length", "none,norm", "cfg:4,", "cfg:4,norm,norm"])
def test_other_words_behind_the_scale_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="is none of"):
        Guidance.parse(text, tiny_spec())


# ---------------------------------------------------------------- what is refused


def changed(**arrays: Any) -> Prompts:
    return Prompts(replace(PROMPTS.positive, **arrays), PROMPTS.negative)


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "labels": ([0, 1], {}, r"this model takes prompts, not \[0, 1\]"),
    "another width": (changed(text=np.zeros((3, 7, 23))), {}, r"text has shape \(3, 7, 23\), must be .*, 24\)"),
    "no tokens": (changed(text=np.zeros((3, 0, 24))), {}, r"text has shape \(3, 0, 24\)"),
    "a mask of another shape": (
        changed(mask=np.ones((3, 6))),
        {},
        r"mask has shape \(3, 6\), the text \(3, 7\)",
    ),
    "a mask of other numbers": (changed(mask=np.full((3, 7), 2)), {}, r"mask must hold 1 .* and 0"),
    "numbers that are none": (changed(text=np.full((3, 7, 24), np.nan)), {}, "not finite"),
    "longer than the profile": (
        Prompts(embedded([10], 10)),
        {},
        r"prompts of 10 tokens: profile full takes 2\.\.5\.\.9",
    ),
    "no prompts": (Prompts(None), {}, r"prompts: positive is None, must be Embedded\(text, mask\)"),  # type: ignore[arg-type]
    "longer than any": (Prompts(embedded([1025], 1025)), {}, "1025 tokens, the model has positions for 1024"),
    "fewer negative ones": (Prompts(embedded([5], 5), embedded([2, 3], 3)), {}, "1 prompts and 2 negative ones"),
    "guidance away from nothing": (Prompts(embedded([5], 5)), {"guidance": "cfg:2"}, "negative prompts, and there are"),
}


@pytest.mark.parametrize("what", list(REFUSED))
def test_what_the_model_cannot_take_is_refused(pipeline: Pipeline, what: str) -> None:
    subjects, choices, told = REFUSED[what]
    with pytest.raises(InputError, match=told):
        pipeline.sample(subjects, steps=2, **choices)


def test_a_model_of_classes_takes_no_prompts(tiny_bundle: Bundle) -> None:
    with Pipeline.load(tiny_bundle.folder) as pipeline, pytest.raises(InputError, match="takes labels 0 to 3, not"):
        pipeline.sample(PROMPTS, steps=2)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "this model takes text; say how many tokens, e.g. text = "),
        ({"min": 1, "opt": 2, "max": 1025}, r"text\.max is 1,025, at most 1,024 tokens of text"),
    ],
)
def test_a_recipe_must_say_how_long_text_is(checkpoint: Path, tmp_path: Path, text: Any, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        compile_bundle(recipe_of(checkpoint, text=text), "cpu", out=tmp_path / "bundle")


def test_a_recipe_of_a_model_of_classes_says_nothing_of_text(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="this model takes classes; leave `text` out"):
        compile_bundle(recipe_of(tiny_checkpoint), "cpu", out=tmp_path / "bundle")


def test_the_demo_of_a_text_model_says_how_to_draw(bundle: Bundle, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["demo", "--bundle", str(bundle.folder), "--out", str(tmp_path / "out")])
    assert done.exit_code == 2
    told = f"the demo draws classes, and {bundle.folder} takes text; elit-export sample {bundle.folder} --prompt TEXT"
    assert told in " ".join(done.output.split())


@pytest.mark.parametrize(
    ("limits", "told"),
    [(None, "has no range of text, which the model takes"), (Range(1, 2, 3), "has text, which the model does not")],
)
def test_a_manifest_that_does_not_fit_its_model_is_refused(
    bundle: Bundle, tiny_bundle: Bundle, tmp_path: Path, limits: Any, told: str
) -> None:
    source = tiny_bundle if limits else bundle
    folder = Path(shutil.copytree(source.folder, tmp_path / "bundle"))
    (plan_set,) = source.manifest.plan_sets
    profiles = tuple(facts.model_copy(update={"text": limits}) for facts in plan_set.profiles)
    plan_sets = (plan_set.model_copy(update={"profiles": profiles}),)
    with writing(folder) as writer:
        writer.commit(source.manifest.model_copy(update={"plan_sets": plan_sets}))
    with pytest.raises(BundleError, match=f"profile full of target cpu {told}"):
        Bundle.open(folder)


def test_what_judges_classes_says_so(bundle: Bundle) -> None:
    done = CliRunner().invoke(main, ["evaluate", str(bundle.folder)])
    assert done.exit_code == 2
    assert "works with class-conditional models only, this one takes text" in " ".join(done.output.split())

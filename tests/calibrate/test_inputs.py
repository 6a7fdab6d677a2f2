"""Samples for quantization: what is taken along trajectories, and the command."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from elit_export import Pipeline
from elit_export.arrays import HostArray
from elit_export.backends.protocols import Array, FunctionEngine, to_host
from elit_export.bundle.calibration_inputs import CalibrationInputs, load_inputs
from elit_export.bundle.reading import Bundle
from elit_export.calibrate.inputs import (
    DEFAULT_RECIPE,
    T_PARTS,
    RecordedRow,
    SampleRecipe,
    SelectedSamples,
    _in_order,
    batch_count,
    load_sample_recipe,
    recorded_rows,
    select_samples,
)
from elit_export.cli import main
from elit_export.errors import CalibrationError, EngineError, InputError
from elit_export.runtime.bank import EngineBank, Slot

RECIPES = Path(__file__).parent.parent.parent / "calibration"
CHECKPOINT = "a" * 64
SMALL = SampleRecipe(images=5, steps=8, sampler="euler", guidance=("none", "cfg:2"), samples=96, seed=4, rows=3)


@pytest.fixture(scope="module")
def pipeline(tiny_bundle: Bundle) -> Iterator[Pipeline]:
    with Pipeline.load(tiny_bundle.folder) as opened:
        yield opened


def sampled(pipeline: Pipeline, **changes: Any) -> SelectedSamples:
    recipe = SMALL.model_copy(update=changes)
    return select_samples(list(recorded_rows(pipeline, recipe)), pipeline, recipe, CHECKPOINT)


@pytest.fixture(scope="module")
def small(pipeline: Pipeline) -> SelectedSamples:
    return sampled(pipeline)


def key(inputs: Mapping[str, Array]) -> bytes:
    return b"".join(to_host(inputs[name]).tobytes() for name in sorted(inputs))


# ---------------------------------------------------------------- what is taken


def test_every_sample_is_what_an_engine_was_given(pipeline: Pipeline, small: SelectedSamples) -> None:
    """Sampled again by the public way, with the engines watched from below."""
    given: set[bytes] = set()

    def watching(slot: Slot) -> Slot:
        def call(inputs: Mapping[str, HostArray]) -> Mapping[str, HostArray]:
            for row in range(len(inputs["x"])):
                rows = {name: array if name == "latents" else array[row : row + 1] for name, array in inputs.items()}
                given.add(key(rows))
            return {name: to_host(array) for name, array in slot.engine(inputs).items()}

        return Slot(slot.profile, FunctionEngine(call))

    bank = EngineBank([watching(slot) for slot in pipeline.bank.slots], pipeline.spec.budgets, pipeline.bank.precision)
    watched = Pipeline(bank, pipeline.spec, pipeline.data)
    again = select_samples(list(recorded_rows(watched, SMALL)), watched, SMALL, CHECKPOINT)
    assert again.samples.sha256 == small.samples.sha256
    assert all(key(inputs) in given for inputs in small.samples.inputs())


def test_the_seed_alone_decides(pipeline: Pipeline, small: SelectedSamples) -> None:
    assert sampled(pipeline).samples.sha256 == small.samples.sha256
    assert sampled(pipeline, seed=5).samples.sha256 != small.samples.sha256


def assert_same_rows(found: CalibrationInputs, expected: CalibrationInputs) -> None:
    """The same up to the order of sums, and in the same order."""
    np.testing.assert_allclose(found.x, expected.x, atol=1e-5)
    for name in ("t", "kept"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    np.testing.assert_array_equal(found.conditioning["y"], expected.conditioning["y"])


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 50])
def test_rows_at_once_select_the_same_samples(pipeline: Pipeline, small: SelectedSamples, rows: int) -> None:
    found = sampled(pipeline, rows=rows)
    assert_same_rows(found.samples, small.samples)
    np.testing.assert_array_equal(found.guided, small.guided)
    np.testing.assert_array_equal(found.null, small.null)


def test_rows_are_ordered_as_the_default_recipe_records_them(pipeline: Pipeline) -> None:
    """Parts of 5 of its 10 images: the samples that were stored so far are selected again."""
    recipe = SMALL.model_copy(update={"images": 10, "rows": 5, "guidance": ("none", "none"), "budgets": ("full",)})
    parts = list(recorded_rows(pipeline, recipe))
    assert len(parts) == 4
    recorded = [row for part in parts for row in part]
    assert _in_order(list(reversed(recorded)), recipe.images) == recorded


def test_no_two_samples_are_the_same(small: SelectedSamples) -> None:
    assert len({key(inputs) for inputs in small.samples.inputs()}) == SMALL.samples


def test_every_profile_is_there_at_its_corners_and_over_all_of_t(pipeline: Pipeline, small: SelectedSamples) -> None:
    samples = small.samples
    corners = {kept for slot in pipeline.bank.slots for kept in slot.profile.latents.corners()}
    counts = Counter(samples.kept.tolist())
    assert set(counts) == corners == {1, 2, 3, 4}
    assert set(counts.values()) == {SMALL.samples // len(corners)}
    for kept in corners:
        parts = Counter(np.minimum(samples.t[samples.kept == kept] * T_PARTS, T_PARTS - 1).astype(int).tolist())
        assert set(parts) == set(range(1, T_PARTS))  # 8 steps start from t = 1 to 1/8
        assert set(parts.values()) == {3, 4}  # 24 samples over 7 parts


def test_guided_and_unguided_rows_of_every_class_are_there(pipeline: Pipeline, small: SelectedSamples) -> None:
    labels, null = small.samples.conditioning["y"], pipeline.spec.null_class
    assert np.array_equal(labels == null, small.null)
    assert set(labels.tolist()) == {0, 1, 2, null}
    assert not (small.null & ~small.guided).any()
    for kept in (1, 2, 3, 4):
        here = small.samples.kept == kept
        kinds = Counter(zip(small.guided[here].tolist(), small.null[here].tolist(), strict=True))
        assert min(kinds[kind] for kind in ((False, False), (True, False), (True, True))) >= 4


def test_samples_follow_the_model_and_are_no_noise(small: SelectedSamples) -> None:
    """Noise alone at t=1, and less of it the further a trajectory went."""
    samples = small.samples
    spread = samples.x.std(axis=(1, 2, 3))
    assert abs(spread[samples.t == 1].mean() - 1) < 0.2
    late = samples.x[samples.t < 0.2]
    assert not np.allclose(late.std(axis=(1, 2, 3)).mean(), 1, atol=0.02)


def test_facts_say_where_they_are_from(small: SelectedSamples) -> None:
    facts = small.samples.facts
    assert facts.checkpoint_sha256 == CHECKPOINT
    assert (facts.seed, facts.images, facts.steps, facts.sampler) == (4, 5, 8, "euler")
    assert facts.schedules == ("4of4", "3of4", "2of4", "1of4")
    assert facts.guidance == ("none", "cfg:2")
    assert facts.samples == len(small.samples) == 96


def test_budgets_may_be_named(pipeline: Pipeline) -> None:
    found = sampled(pipeline, budgets=("half", 1), guidance=("cfg:2",), images=8)
    assert set(found.samples.kept.tolist()) == {1, 2}
    assert found.guided.all()


def test_the_weak_budget_of_guidance_is_seen_too(pipeline: Pipeline) -> None:
    found = sampled(pipeline, budgets=("full",), guidance=("ccfg:2@1",), images=12, sampler="heun")
    assert set(found.samples.kept.tolist()) == {1, 4}
    assert np.array_equal(found.null, found.samples.kept == 1)


def test_a_batch_at_a_time(pipeline: Pipeline) -> None:
    parts = list(recorded_rows(pipeline, SMALL))
    assert len(parts) == batch_count(pipeline, SMALL) == 4 * 2 * 2
    assert sum(map(len, parts)) == 4 * 8 * (5 + 10)
    assert all(isinstance(row, RecordedRow) for part in parts for row in part)


# ---------------------------------------------------------------- what is refused


def test_trajectories_that_show_too_little_are_refused_before_any_is_sampled(pipeline: Pipeline) -> None:
    with pytest.raises(
        CalibrationError, match=r"give 64 rows, fewer than the 96 samples of the recipe; raise images or steps"
    ):
        next(recorded_rows(pipeline, SMALL.model_copy(update={"images": 1})))
    with pytest.raises(InputError, match="keeps 1 to 4"):
        next(recorded_rows(pipeline, SMALL.model_copy(update={"budgets": (7,)})))
    with pytest.raises(InputError, match="sampler"):
        next(recorded_rows(pipeline, SMALL.model_copy(update={"sampler": "none"})))


def test_an_engine_that_gives_no_numbers_is_an_error(pipeline: Pipeline) -> None:
    def poisoned(inputs: Mapping[str, HostArray]) -> Mapping[str, HostArray]:
        velocity = np.zeros_like(inputs["x"])
        velocity[inputs["t"] < 0.5] = np.nan
        return {"velocity": velocity, "residual": velocity}

    slots = [Slot(slot.profile, FunctionEngine(poisoned)) for slot in pipeline.bank.slots]
    bank = EngineBank(slots, pipeline.spec.budgets, pipeline.bank.precision)
    with pytest.raises(EngineError, match="not finite"):
        list(recorded_rows(Pipeline(bank, pipeline.spec, pipeline.data), SMALL))


# ---------------------------------------------------------------- recipes


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.name)
def test_committed_recipes_are_sound(path: Path) -> None:
    assert load_sample_recipe(path).samples >= 256


def test_the_default_is_the_recipe_of_the_shipped_model() -> None:
    assert load_sample_recipe(RECIPES / "fashion.toml") == DEFAULT_RECIPE


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"imagse": 3}, r"imagse: unknown key \(did you mean 'images'\?\)"),
        ({"zzz": 3}, "zzz: unknown key$"),
        ({"samples": 63}, "samples: input should be greater than or equal to 64"),
        ({"steps": "10"}, "steps: input should be a valid integer"),
        ({"guidance": []}, "guidance: "),
    ],
)
def test_wrong_recipes_are_refused(change: dict[str, Any], problem: str, tmp_path: Path) -> None:
    values = {**json.loads(SMALL.model_dump_json()), **change}
    path = tmp_path / "recipe.toml"
    path.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items() if value is not None))
    with pytest.raises(CalibrationError, match=problem) as caught:
        load_sample_recipe(path)
    assert str(path) in str(caught.value)


def test_every_key_of_a_recipe_has_a_default(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text("")
    assert load_sample_recipe(path) == DEFAULT_RECIPE
    path.write_text("images = 4\n")
    assert load_sample_recipe(path) == DEFAULT_RECIPE.model_copy(update={"images": 4})


def test_more_rows_at_once_than_the_engines_take_are_split(pipeline: Pipeline) -> None:
    """Nine guided images are 18 rows, and a call takes 8: parts of at most 4, in which each image is what it was."""
    many, few = ({"images": 9, "rows": rows, "budgets": ("full",)} for rows in (9, 2))
    recipe = SMALL.model_copy(update=many)
    parts = list(recorded_rows(pipeline, recipe))
    assert len(parts) == batch_count(pipeline, recipe) == 2 + 3  # unguided: 5 and 4; guided: three of 3
    assert [len(part) for part in parts] == [8 * 5, 8 * 4, 8 * 6, 8 * 6, 8 * 6]

    def starts(recipe: SampleRecipe) -> list[bytes]:
        return sorted(
            row.inputs["x"].tobytes() for part in recorded_rows(pipeline, recipe) for row in part if row.t == 1
        )

    assert starts(recipe) == starts(SMALL.model_copy(update=few))


def test_missing_and_broken_recipes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="leave --recipe out"):
        load_sample_recipe(tmp_path / "none.toml")
    (tmp_path / "broken.toml").write_text("images =")
    with pytest.raises(CalibrationError, match="not TOML"):
        load_sample_recipe(tmp_path / "broken.toml")


# ---------------------------------------------------------------- the command


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    values = json.loads(SMALL.model_dump_json())
    path = tmp_path / "recipe.toml"
    path.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items()))
    return path


def test_the_command_writes_samples_that_load(tiny_bundle: Bundle, recipe: Path, tmp_path: Path) -> None:
    out, facts = tmp_path / "made" / "samples.npz", tmp_path / "facts.json"
    done = run("calibrate", "samples", tiny_bundle.folder, "--recipe", recipe, "--out", out, "--json", facts)
    assert done.exit_code == 0, done.output
    model = tiny_bundle.manifest.model
    samples = load_inputs(out, model.spec, model.checkpoint_sha256)
    said = json.loads(facts.read_text())
    assert said["sha256"] == samples.sha256
    assert [budget["kept"] for budget in said["budgets"]] == [4, 3, 2, 1]
    assert sum(budget["samples"] for budget in said["budgets"]) == len(samples) == 96
    for word in ("latents kept", "of these no class", "euler", "96 samples"):
        assert word in done.output


def test_the_command_takes_rows(tiny_bundle: Bundle, recipe: Path, tmp_path: Path) -> None:
    """Whatever the recipe says, and more than a call takes."""
    found = []
    for rows in ("1", "50"):
        out = tmp_path / f"{rows}.npz"
        done = run("calibrate", "samples", tiny_bundle.folder, "--recipe", recipe, "--rows", rows, "--out", out)
        assert done.exit_code == 0, done.output
        model = tiny_bundle.manifest.model
        found.append(load_inputs(out, model.spec, model.checkpoint_sha256))
    assert len(found[0]) == len(found[1]) == 96
    assert_same_rows(*found)


def test_the_command_refuses_with_status_2_and_writes_nothing(
    tiny_bundle: Bundle, recipe: Path, tmp_path: Path
) -> None:
    recipe.write_text(recipe.read_text().replace("images = 5", "images = 1"))
    done = run("calibrate", "samples", tiny_bundle.folder, "--recipe", recipe, "--out", tmp_path / "s.npz")
    assert done.exit_code == 2
    assert "raise images or steps" in " ".join(done.output.split())
    assert list(tmp_path.iterdir()) == [recipe]
    bare = run("calibrate", "samples", tmp_path, "--out", tmp_path / "s.npz")
    assert bare.exit_code == 2
    assert "elit-export build" in bare.output

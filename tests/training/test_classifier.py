"""The classifier that judges samples: its training, its file, and the shipped one."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from elit_export.checkpoints.native import load_checkpoint
from elit_export.checkpoints.stored import checkpoint_path
from elit_export.cli import main
from elit_export.errors import CheckpointError, InputError
from elit_export.evaluate.classifier import Classifier
from elit_export.evaluate.evaluator import load_evaluator, save_evaluator
from elit_export.evaluate.facts import FORMAT, MEAN, SHIPPED
from elit_export.evaluate.protocol import Evaluator
from elit_export.evaluate.statistics import ClassifierSpec, EvaluatorFacts, Gaussian, frechet_distance
from elit_export.training.classifier import (
    ClassifierConfig,
    check_data,
    evaluator_facts,
    learning_rate,
    mirrored,
    train_classifier,
)
from elit_export.training.data import LabelledImages, load_images
from elit_export.training.trainer import generator_for

FASHION = Path(__file__).parents[1] / "data" / "fashion"
SPEC = ClassifierSpec(channels=1, size=32, num_classes=10, width=8, features=8)
SHIPPED_MOST_BYTES = 1_000_000


@pytest.fixture(scope="module")
def train() -> LabelledImages:
    return load_images(FASHION, split="train", size=32)


@pytest.fixture(scope="module")
def test() -> LabelledImages:
    return load_images(FASHION, split="test", size=32)


def config(**changes: Any) -> ClassifierConfig:
    return ClassifierConfig(**({"steps": 40, "batch_size": 32, "learning_rate": 1e-2, "seed": 0} | changes))


def trained(data: LabelledImages, **changes: Any) -> tuple[Classifier, list[float]]:
    losses: list[float] = []
    made = train_classifier(SPEC, data, config(**changes), on_step=lambda _, loss: losses.append(loss))
    return made, losses


@pytest.fixture(scope="module")
def tiny(train: LabelledImages, test: LabelledImages) -> tuple[Classifier, EvaluatorFacts]:
    made, _ = trained(train)
    return made, evaluator_facts(made, train, test, command="as tested")


@pytest.fixture(scope="module")
def saved(tiny: tuple[Classifier, EvaluatorFacts], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("classifier") / "tiny.safetensors"
    save_evaluator(path, *tiny)
    return path


@pytest.fixture(scope="module")
def shipped() -> Evaluator:
    return load_evaluator(SHIPPED)


# ---------------------------------------------------------------- training


def test_it_learns(train: LabelledImages, tiny: tuple[Classifier, EvaluatorFacts]) -> None:
    _, losses = trained(train)
    assert len(losses) == 40
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    _, predicted = tiny[0].look(train.images)
    assert (predicted == train.labels).mean() > 0.3  # chance is 0.1


def test_the_seed_decides_every_weight(train: LabelledImages) -> None:
    one, again, other = (trained(train, steps=3, seed=seed)[0].state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["to_features.weight"], other["to_features.weight"])


def test_weights_are_what_half_precision_holds(tiny: tuple[Classifier, EvaluatorFacts]) -> None:
    assert all(torch.equal(tensor, tensor.half().float()) for tensor in tiny[0].state_dict().values())


def test_the_rate_rises_then_falls() -> None:
    rates = [learning_rate(config(), step) for step in range(40)]
    assert max(rates) == rates[3] == pytest.approx(1e-2)
    assert rates == [*sorted(rates[:4]), *sorted(rates[4:], reverse=True)]
    assert 0 < rates[-1] < 1e-3


def test_about_half_of_the_images_are_mirrored(train: LabelledImages) -> None:
    pixels = torch.from_numpy(train.images)
    seen = mirrored(pixels, generator_for(0))
    is_same, is_flipped = ((seen == these).flatten(1).all(dim=1) for these in (pixels, pixels.flip(3)))
    assert (is_same | is_flipped).all()
    assert 0.3 < is_flipped.float().mean() < 0.7


def test_an_image_is_seen_alone(train: LabelledImages, tiny: tuple[Classifier, EvaluatorFacts]) -> None:
    whole, _ = tiny[0].look(train.images)
    alone, _ = tiny[0].look(train.images[5:6])
    np.testing.assert_allclose(whole[5:6], alone, rtol=1e-4, atol=1e-5)


def test_facts_are_those_of_the_test_images(
    tiny: tuple[Classifier, EvaluatorFacts], train: LabelledImages, test: LabelledImages
) -> None:
    made, facts = tiny
    features, predicted = made.look(test.images)
    np.testing.assert_allclose(facts.real.mean, features.mean(axis=0))
    np.testing.assert_allclose(facts.real.covariance, np.cov(features.T))
    assert facts.test_accuracy == (predicted == test.labels).mean()
    assert (facts.train_sha256, facts.test_sha256) == (train.sha256, test.sha256)
    assert [floor.images for floor in facts.floors] == [16]


@pytest.mark.parametrize(
    ("spec", "changes", "said"),
    [
        (replace(SPEC, size=16), {}, r"images are \(1, 32, 32\), the classifier takes \(1, 16, 16\)"),
        (replace(SPEC, num_classes=3), {}, "the data has 10 classes, the classifier 3"),
        (SPEC, {"batch_size": 97}, "batch_size 97 is more than the 96 images"),
        (replace(SPEC, features=48), {}, "32 test images are too few for 48 features.*--features 15"),
    ],
)
def test_data_that_does_not_fit_is_refused(
    spec: ClassifierSpec, changes: dict[str, Any], said: str, train: LabelledImages, test: LabelledImages
) -> None:
    with pytest.raises(InputError, match=said):
        check_data(spec, train, test, config(**changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
    ],
)
def test_choices_that_cannot_be_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        config(**changes)


# ---------------------------------------------------------------- its file


def test_a_file_gives_back_what_was_saved(
    saved: Path, tiny: tuple[Classifier, EvaluatorFacts], test: LabelledImages
) -> None:
    made, facts = tiny
    evaluator = load_evaluator(saved)
    for found, expected in zip(evaluator.look(test.images), made.look(test.images), strict=True):
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(evaluator.facts.real.covariance, facts.real.covariance)
    np.testing.assert_array_equal(evaluator.facts.real.mean, facts.real.mean)
    assert replace(evaluator.facts, real=facts.real).__dict__ == facts.__dict__


def rewritten(source: Path, target: Path, *, facts: dict[str, Any] | None = None, **tensors: torch.Tensor) -> Path:
    """A copy with other facts and tensors."""
    with safe_open(source, framework="pt") as file:
        known = json.loads(file.metadata()["facts"])
    weights = load_file(source) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file(weights, target, {"format": FORMAT, "facts": json.dumps(known | (facts or {}))})
    return target


@pytest.mark.parametrize(
    ("facts", "tensors", "said"),
    [
        ({"spec": {"channels": 1}}, {}, "missing 4 required"),
        ({"spec": {**SPEC.__dict__, "width": 10**9}}, {}, r"width is 1000000000, must be a whole number in 1\.\.128"),
        ({"spec": {**SPEC.__dict__, "width": 16}}, {}, "the model needs"),
        ({"floors": []}, {}, "no baselines"),
        ({"floors": [{"images": "4", "distance": 1, "spread": 1}]}, {}, "not supported between"),
        ({"floors": [{"images": 4, "distance": -1, "spread": 1}]}, {}, "below zero"),
        ({"test_accuracy": 1.5}, {}, "accuracy outside"),
        ({}, {"real__mean": torch.full((8,), float("nan"), dtype=torch.float64)}, "not finite"),
        ({}, {"real__mean": torch.zeros(9, dtype=torch.float64)}, "mean and covariance are not those of 8 features"),
        ({}, {"weights__more": torch.zeros(1)}, "unexpected weights.more"),
    ],
)
def test_a_file_that_describes_no_classifier_is_refused(
    facts: dict[str, Any], tensors: dict[str, torch.Tensor], said: str, saved: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=said):
        load_evaluator(rewritten(saved, tmp_path / "other.safetensors", facts=facts, **tensors))


def test_a_damaged_file_is_refused(saved: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(saved.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_evaluator(cut)
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load_evaluator(tmp_path / "none.safetensors")


def test_models_and_classifiers_are_not_taken_for_each_other(saved: Path, tiny_checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="its format is 'elit_export/1', this version reads"):
        load_evaluator(tiny_checkpoint)
    with pytest.raises(CheckpointError, match="its format is 'elit_export classifier/1'"):
        load_checkpoint(saved)


# ---------------------------------------------------------------- the shipped one


def test_the_shipped_file_is_small_and_good(shipped: Evaluator) -> None:
    assert checkpoint_path(SHIPPED).stat().st_size <= SHIPPED_MOST_BYTES
    facts = shipped.facts
    assert facts.test_accuracy >= 0.91
    assert (facts.test_images, facts.spec.features, facts.spec.num_classes) == (10_000, 48, 10)
    assert {512, 5000} <= {floor.images for floor in facts.floors}
    assert facts.halves_baseline.distance < facts.baseline_at(512).distance


def test_the_shipped_classifier_is_as_accurate_as_it_says(shipped: Evaluator, test: LabelledImages) -> None:
    """On 32 test images: at its accuracy, fewer than 26 right happen once in thousands of draws."""
    _, predicted = shipped.look(test.images)
    assert (predicted == test.labels).sum() >= 26


def test_the_shipped_facts_are_of_real_images(shipped: Evaluator, train: LabelledImages, test: LabelledImages) -> None:
    """Real images are near; the same images upside down are far."""
    images = np.concatenate([train.images, test.images])
    real, turned = (shipped.look(np.ascontiguousarray(these))[0] for these in (images, images[:, :, ::-1]))
    near = frechet_distance(shipped.facts.real, Gaussian.fit(real))
    assert near < 3 * shipped.facts.baseline_at(128).distance
    assert frechet_distance(shipped.facts.real, Gaussian.fit(turned)) > 5 * near


def test_the_card_says_what_the_file_says(shipped: Evaluator) -> None:
    card = checkpoint_path(SHIPPED).with_suffix(".md").read_text(encoding="utf-8")
    facts = shipped.facts
    assert facts.command.replace(str(checkpoint_path(SHIPPED)), "FILE") in " ".join(card.replace("\\\n", " ").split())
    assert f"{facts.test_accuracy:.2%}" in card
    for floor in facts.floors:
        assert f"| {floor.images} | {floor.distance:.3f} | {floor.spread:.3f} |" in card


# ---------------------------------------------------------------- the command


TINY = ["--steps", "3", "--batch-size", "16", "--width", "8", "--features", "8"]


def test_the_command_trains_writes_and_tells(tmp_path: Path) -> None:
    out = tmp_path / "made" / "c.safetensors"
    files = ["--out", str(out), "--json", str(tmp_path / "facts.json")]
    done = CliRunner().invoke(main, ["train-classifier", str(FASHION), *TINY, *files])
    assert done.exit_code == 0, done.output
    assert "32 test images, accuracy" in done.output
    facts = load_evaluator(out).facts
    told = json.loads((tmp_path / "facts.json").read_text())
    assert told["test_accuracy"] == facts.test_accuracy
    assert [floor["distance"] for floor in told["floors"]] == [floor.distance for floor in facts.floors]
    again = tmp_path / "again.safetensors"
    words = facts.command.replace(str(out), str(again)).split()[1:]
    assert CliRunner().invoke(main, words).exit_code == 0
    before, after = load_file(out), load_file(again)
    assert all(torch.equal(before[name], after[name]) for name in {*before, MEAN})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--features", "48"], "--features 15"),
        (["--size", "30"], "multiple of 8"),
        (["--class-names", "a,b"], "2 class names given"),
    ],
)
def test_the_command_refuses_before_it_trains(change: list[str], said: str, tmp_path: Path) -> None:
    out = tmp_path / "c.safetensors"
    done = CliRunner().invoke(main, ["train-classifier", str(FASHION), "--out", str(out), *TINY, *change])
    assert done.exit_code == 2, done.output
    assert said in done.output
    assert not out.exists()


def test_data_without_held_out_images_is_refused(tmp_path: Path) -> None:
    for path in FASHION.glob("train-*"):
        shutil.copy(path, tmp_path)
    done = CliRunner().invoke(main, ["train-classifier", str(tmp_path), "--out", str(tmp_path / "c.safetensors")])
    assert done.exit_code == 2
    assert "add IDX t10k files or a folder test/" in done.output

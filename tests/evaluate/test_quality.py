"""The quality of samples, judged by a stand-in that sees what it is told to, and by the shipped classifier."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from elit_export import Pipeline
from elit_export.arrays import Float64, Int64, Pixels
from elit_export.bundle.manifest import Parity
from elit_export.bundle.reading import Bundle
from elit_export.cli import main, plan_sets
from elit_export.cli.plan_sets import verified_plan_sets
from elit_export.errors import BundleError, InputError, pip_install
from elit_export.evaluate.evaluator import load_evaluator
from elit_export.evaluate.facts import SHIPPED
from elit_export.evaluate.paired import resampled_within
from elit_export.evaluate.protocol import Evaluator
from elit_export.evaluate.quality import (
    DEFAULT_CONFIGS,
    QualityResult,
    SamplerConfig,
    options_of,
    quality,
)
from elit_export.evaluate.statistics import (
    Baseline,
    ClassifierSpec,
    EvaluatorFacts,
    Gaussian,
    frechet_distance,
)
from elit_export.runtime.noise import SeededNoise
from elit_export.spec import SD_VAE, DataFacts, Precision
from elit_export.verify.metrics import difference

FEATURES = 3
IMAGES = 24
FEW = (SamplerConfig("euler", 4), SamplerConfig("ab3", 3))


def look(images: Pixels) -> tuple[Float64, Int64]:
    """Means of three parts of an image; its class from the first pixels."""
    rows = images.reshape(len(images), -1).astype(float) / 255
    features = np.stack([part.mean(axis=1) for part in np.array_split(rows, FEATURES, axis=1)], axis=1)
    return features, (rows[:, 0] * 2.999).astype(np.int64)


FACTS = EvaluatorFacts(
    spec=ClassifierSpec(channels=1, size=8, num_classes=3, width=8, features=FEATURES),
    real=Gaussian(np.full(FEATURES, 0.5), np.eye(FEATURES) / 100),
    test_images=1000,
    test_accuracy=0.9,
    floors=(Baseline(16, 0.2, 0.01), Baseline(64, 0.05, 0.005), Baseline(500, 0.01, 0.001)),
    class_names=(),
    train_sha256="0" * 64,
    test_sha256="1" * 64,
    command="none",
)
EVALUATOR = Evaluator(look, FACTS)


def measured(
    opened: Any, evaluator: Evaluator = EVALUATOR, heard: list[tuple[str, int, int]] | None = None, **choices: Any
) -> Any:
    given: dict[str, Any] = {"images": IMAGES, "guidance": "cfg:2", "sampler_configs": FEW, "seed": 0, "skipped": {}}
    said = [] if heard is None else heard

    def on_images(what: str, done: int, *, total: int) -> None:
        said.append((what, done, total))

    return quality(opened, evaluator, **(given | choices), on_images=on_images)


@pytest.fixture
def pipeline(tiny_bundle: Bundle) -> Iterator[Pipeline]:
    with Pipeline.load(tiny_bundle.folder) as opened:
        yield opened


# ---------------------------------------------------------------- rows


def test_a_row_for_every_way_and_budget_and_all_evaluations_heard(pipeline: Pipeline) -> None:
    heard: list[tuple[str, int, int]] = []
    result: QualityResult = measured([("cpu", pipeline)], heard=heard)
    assert [(row.way, row.name) for row in result.rows] == [
        (way, name) for way in ("euler 4", "ab3 3") for name in ("full", "half", "quarter")
    ]
    assert {(row.target, row.precision) for row in result.rows} == {("cpu", "fp32")}
    assert [row.calls for row in result.rows[::3]] == [4, 4]
    assert {total for _, _, total in heard} == {sum(done for _, done, _ in heard)} == {3 * IMAGES * (4 + 4)}
    assert (result.floor, result.halves_floor) == (FACTS.floors[0], FACTS.floors[2])


def test_numbers_are_those_of_the_samples(pipeline: Pipeline) -> None:
    """Against one batch of all images by hand."""
    result: QualityResult = measured([("cpu", pipeline)])
    labels = [image % 3 for image in range(IMAGES)]
    limit = pipeline.bank.slots[0].profile.rows.max
    assert limit < 2 * IMAGES  # so the rows above came in parts
    steered = {"steps": 3, "sampler": "ab3", "guidance": "cfg:2"}
    noise = SeededNoise(0, IMAGES, pipeline.spec.sample_shape)()
    halves = [slice(start, start + limit // 2) for start in range(0, IMAGES, limit // 2)]

    def sampled(budget: str) -> list[Any]:
        return [
            pipeline.sample(labels[part], schedule=budget, noise=noise[part], **steered)  # type: ignore[arg-type]
            for part in halves
        ]

    full, quarter = (sampled(budget) for budget in ("full", "quarter"))
    features, predicted = look(np.concatenate([sample.images for sample in quarter]).transpose(0, 3, 1, 2))
    row = result.rows[-1]
    assert row.agreement.value == (predicted == labels).mean()
    assert row.frechet.value == pytest.approx(frechet_distance(FACTS.real, Gaussian.fit(features)), rel=1e-4)
    one, other = (np.concatenate([sample.latents for sample in taken]) for taken in (quarter, full))
    assert row.sqnr_db == pytest.approx(difference(one, other).sqnr_db, abs=0.01)


def test_the_first_rows_are_what_others_are_compared_with(pipeline: Pipeline) -> None:
    rows = measured([("cpu", pipeline), ("again", pipeline)]).rows
    first, again = rows[0], rows[len(rows) // 2]
    assert first.sqnr_db is None
    assert (first.frechet_change.value, first.frechet_change.error) == (0, 0)
    assert (first.agreement_change.value, first.agreement_change.error) == (0, 0)
    assert rows[3].sqnr_db is None  # of its own way
    assert rows[3].frechet_change.value == pytest.approx(rows[3].frechet.value - first.frechet.value)
    assert again.sqnr_db == np.inf  # the same samples in a second plan set
    assert (again.frechet_change.value, again.frechet_change.error) == (0, 0)


def test_differences_are_paired(pipeline: Pipeline) -> None:
    """A smaller budget changes samples a little, so the error of the change is far below that of the row."""
    row = measured([("cpu", pipeline)], sampler_configs=(SamplerConfig("euler", 4),)).rows[1]
    assert 0 < row.frechet_change.error < 0.5 * row.frechet.error


def test_the_seed_decides(pipeline: Pipeline) -> None:
    one, again, other = (measured([("cpu", pipeline)], seed=seed) for seed in (0, 0, 1))
    assert one == again != other


def test_agreement_and_its_errors(pipeline: Pipeline) -> None:
    def always_one(images: Pixels) -> tuple[Float64, Int64]:
        return look(images)[0], np.ones(len(images), np.int64)

    row = measured([("cpu", pipeline)], Evaluator(always_one, FACTS)).rows[1]
    assert (row.agreement.value, row.agreement.error) == (1 / 3, pytest.approx((2 / 9 / IMAGES) ** 0.5))
    assert (row.agreement_change.value, row.agreement_change.error) == (0, 0)


def test_the_bootstrap_draws_within_classes() -> None:
    labels = np.arange(50) % 4
    draws = resampled_within(labels, np.random.default_rng(0), 20)
    assert draws.shape == (20, 50)
    assert (labels[draws] == labels).all()
    assert len({tuple(draw) for draw in draws.tolist()}) == 20


def test_the_error_of_a_distance_is_its_spread_over_seeds(pipeline: Pipeline) -> None:
    rows = [measured([("cpu", pipeline)], sampler_configs=FEW[:1], seed=seed).rows[0] for seed in range(12)]
    spread = np.std([row.frechet.value for row in rows], ddof=1)
    assert 0.4 < np.mean([row.frechet.error for row in rows]) / spread < 2.5


# ---------------------------------------------------------------- parts


@pytest.mark.parametrize(("guidance", "most"), [("none", 8), ("cfg:2", 4), ("ccfg:2@quarter", 8)])
def test_no_part_has_more_rows_than_the_profiles_take(pipeline: Pipeline, guidance: str, most: int) -> None:
    parts = pipeline.prepared([0] * 21, options_of(FEW[0], "full", guidance, seed=0)).part_sizes
    assert sum(parts) == 21
    assert max(parts) <= most
    assert max(parts) - min(parts) <= 1
    assert len(parts) == -(-21 // most)


def test_ways_are_read() -> None:
    assert [SamplerConfig.parse("euler:50"), SamplerConfig.parse("ab3:14")] == list(DEFAULT_CONFIGS)
    assert [way.calls for way in DEFAULT_CONFIGS] == [50, 15]
    for text, said in (
        ("euler", "is not SAMPLER:STEPS"),
        ("euler:x", "is not SAMPLER:STEPS"),
        ("rk:5", "rk"),
        ("euler-maruyama:9", "draws noise"),
    ):
        with pytest.raises(InputError, match=said):
            SamplerConfig.parse(text)


# ---------------------------------------------------------------- what cannot be judged


def evaluator_of(**changes: Any) -> Evaluator:
    names = {name: changes.pop(name) for name in ("class_names",) if name in changes}
    return Evaluator(look, replace(FACTS, spec=replace(FACTS.spec, **changes), **names))


@pytest.mark.parametrize(
    ("evaluator", "choices", "said"),
    [
        (evaluator_of(size=16), {}, r"samples are \(1, 8, 8\), the classifier takes \(1, 16, 16\).*train-classifier"),
        (evaluator_of(num_classes=4), {}, "model has 3 classes, the classifier 4.*--classifier FILE"),
        (EVALUATOR, {"images": 3}, "3 images .* 3 features; give at least 4"),
        (EVALUATOR, {"guidance": "cfg:x"}, "not a number"),
        (EVALUATOR, {"sampler_configs": (SamplerConfig("ab3", 0),)}, "at least"),
    ],
)
def test_nothing_is_sampled_for_what_cannot_be_judged(
    evaluator: Evaluator, choices: dict[str, Any], said: str, pipeline: Pipeline
) -> None:
    heard: list[tuple[str, int, int]] = []
    with pytest.raises(InputError, match=said):
        measured([("cpu", pipeline)], evaluator, heard, **choices)
    assert heard == []


def test_classes_of_another_order_are_refused(pipeline: Pipeline) -> None:
    pipeline.data = DataFacts(kind="pixels", class_names=("a", "b", "c"))
    with pytest.raises(InputError, match="the model's classes are a, b, c, the classifier's a, c, b"):
        measured([("cpu", pipeline)], evaluator_of(class_names=("a", "c", "b")))


def test_latents_of_a_vae_are_refused(pipeline: Pipeline) -> None:
    pipeline.data = SD_VAE
    with pytest.raises(InputError, match="latents of a VAE"):
        measured([("cpu", pipeline)])


# ---------------------------------------------------------------- plan sets


def with_plan_sets(bundle: Bundle, **changes: Any) -> Bundle:
    """The bundle's plan set, and a changed copy of it before it."""
    (own,) = bundle.manifest.plan_sets
    other = own.model_copy(update=changes)
    return Bundle(bundle.folder, bundle.manifest.model_copy(update={"plan_sets": (other, own)}))


def test_all_plan_sets_that_can_run_are_measured_the_most_precise_first(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No backend that is always there has two precisions, so whether they can run is not asked."""
    monkeypatch.setattr(plan_sets, "incompatibility", lambda _plan_set: "")
    both = with_plan_sets(tiny_bundle, target="other", precision=Precision.FP16)
    found, skipped = verified_plan_sets(both, None, None)
    assert [(plan_set.target, plan_set.precision.value) for plan_set in found] == [("cpu", "fp32"), ("other", "fp16")]
    assert skipped == {}
    assert [plan_set.target for plan_set in verified_plan_sets(both, "other", None)[0]] == ["other"]
    assert [plan_set.target for plan_set in verified_plan_sets(both, None, "fp32")[0]] == ["cpu"]


def test_a_plan_set_that_cannot_run_is_left_out_and_named(tiny_bundle: Bundle) -> None:
    both = with_plan_sets(tiny_bundle, target="strange", device="abacus")
    found, skipped = verified_plan_sets(both, None, None)
    assert [plan_set.target for plan_set in found] == ["cpu"]
    assert "abacus" in skipped["strange fp32"]
    with pytest.raises(InputError, match="no plan set for target='none'"):
        verified_plan_sets(both, "none", None)


def test_a_plan_set_that_was_never_verified_is_refused(tiny_bundle: Bundle) -> None:
    (own,) = tiny_bundle.manifest.plan_sets
    unknown = tuple(
        facts.model_copy(update={"parity": Parity(status="not run", reason="built elsewhere")})
        for facts in own.profiles
    )
    with pytest.raises(BundleError, match="elit-export verify"):
        verified_plan_sets(with_plan_sets(tiny_bundle, target="other", profiles=unknown), None, None)


# ---------------------------------------------------------------- the command


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(main, ["evaluate", *map(str, words)])


def test_the_command_judges_the_shipped_model(fashion_bundle: Bundle, tmp_path: Path) -> None:
    """50 images in 5 calls: most are what was asked for, and the smallest budget is worse than the full one."""
    options = ("--images", "50", "--way", "ab3:4", "--json", tmp_path / "q.json")
    done = run(fashion_bundle.folder, *options)
    assert done.exit_code == 0, done.output
    facts = load_evaluator(SHIPPED).facts
    said = " ".join(done.output.split())
    assert f"of real test images {facts.test_accuracy:.3f}" in said
    assert f"one half of these to the other {facts.halves_baseline.distance:.3g}" in said
    result = json.loads((tmp_path / "q.json").read_text())["quality"]
    rows = {row["name"]: row for row in result["rows"]}
    assert (result["images"], result["guidance"], result["floor"]["images"]) == (50, "cfg:2", 64)
    assert list(rows) == ["full", "half", "quarter", "eighth", "sixteenth"]
    assert rows["full"]["agreement"]["value"] > 0.6
    assert rows["full"]["frechet"]["value"] > result["floor"]["distance"]
    assert rows["sixteenth"]["frechet_change"]["value"] > 0
    assert rows["full"]["sqnr_db"] is None
    assert rows["half"]["sqnr_db"] > rows["sixteenth"]["sqnr_db"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--plot", "p.png"), "No such option"),
        (("--way", "euler"), "SAMPLER:STEPS"),
        (("--classifier", "none.safetensors"), "no checkpoint at none.safetensors"),
        ((), "train-classifier"),  # the shipped classifier is of larger images
        (("--target", "gpu"), "no plan set for --target gpu"),
    ],
)
def test_the_command_refuses(options: tuple[str, ...], said: str, tiny_bundle: Bundle) -> None:
    done = run(tiny_bundle.folder, *options)
    assert done.exit_code == 2, done.output
    assert said in done.output


def test_without_torch_the_command_names_the_extra(fashion_bundle: Bundle) -> None:
    code = "import sys; sys.modules['torch'] = None; from elit_export.cli import main; main()"
    words = [sys.executable, "-c", code, "evaluate", str(fashion_bundle.folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert pip_install("export") in done.stderr

"""Fréchet distances against closed forms, and the real-vs-real baselines."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elit_export.errors import InputError
from elit_export.evaluate.statistics import (
    ClassifierSpec,
    Gaussian,
    balanced_order,
    baselines,
    check_images,
    frechet_distance,
    share_of,
)

WIDTH = 6


def gaussian(seed: int, *, rank: int = WIDTH, width: int = WIDTH) -> Gaussian:
    rng = np.random.default_rng(seed)
    factor = rng.standard_normal((width, rank))
    return Gaussian(rng.standard_normal(width), factor @ factor.T)


# ---------------------------------------------------------------- the distance


def test_of_diagonal_gaussians_it_is_the_closed_form() -> None:
    """|m₁ − m₂|² + Σ (σ₁ − σ₂)²."""
    one = Gaussian(np.array([0.0, 1.0, 2.0]), np.diag([1.0, 4.0, 9.0]))
    other = Gaussian(np.array([0.5, 1.0, 0.0]), np.diag([4.0, 4.0, 0.25]))
    assert frechet_distance(one, other) == pytest.approx(0.25 + 4.0 + 1.0 + 0.0 + 6.25, rel=1e-12)


def test_of_equal_gaussians_it_is_zero() -> None:
    assert frechet_distance(gaussian(0), gaussian(0)) == pytest.approx(0.0, abs=1e-10)


def test_it_is_symmetric_and_positive() -> None:
    there, back = frechet_distance(gaussian(1), gaussian(2)), frechet_distance(gaussian(2), gaussian(1))
    assert there == pytest.approx(back, rel=1e-10)
    assert there > 1


def brute_force(one: Gaussian, other: Gaussian) -> float:
    """tr (C₁·C₂)^½ from the eigenvalues of the product, which is not symmetric."""
    values = np.linalg.eigvals(one.covariance @ other.covariance)
    shared = np.sqrt(values.astype(complex)).sum().real
    gap = ((one.mean - other.mean) ** 2).sum()
    return float(gap + np.trace(one.covariance + other.covariance) - 2 * shared)


@pytest.mark.parametrize("seed", range(5))
def test_it_is_what_the_root_of_the_product_gives(seed: int) -> None:
    one, other = gaussian(seed), gaussian(seed + 100)
    assert frechet_distance(one, other) == pytest.approx(brute_force(one, other), rel=1e-8)


def test_covariances_without_full_rank_are_no_trouble() -> None:
    """Rounding makes eigenvalues slightly negative there."""
    flat, round_one = gaussian(3, rank=2), gaussian(4)
    assert math.isfinite(frechet_distance(flat, round_one))
    assert frechet_distance(flat, flat) == pytest.approx(0.0, abs=1e-6)


@given(st.integers(0, 10_000), st.floats(0.1, 10))
def test_scaling_features_scales_it_by_the_square(seed: int, scale: float) -> None:
    one, other = gaussian(seed, width=4, rank=4), gaussian(seed + 1, width=4, rank=4)
    larger = [Gaussian(it.mean * scale, it.covariance * scale**2) for it in (one, other)]
    assert frechet_distance(*larger) == pytest.approx(scale**2 * frechet_distance(one, other), rel=1e-6)


def test_a_fit_is_the_mean_and_the_covariance() -> None:
    features = np.random.default_rng(0).standard_normal((50, 3)) * [1, 2, 3] + [0, 1, 2]
    fitted = Gaussian.fit(features)
    centred = features - features.mean(axis=0)
    np.testing.assert_allclose(fitted.covariance, centred.T @ centred / 49)
    np.testing.assert_allclose(fitted.mean, features.mean(axis=0))


@pytest.mark.parametrize("images", [1, 3])
def test_too_few_images_for_a_covariance_are_refused(images: int) -> None:
    with pytest.raises(InputError, match=rf"{images} images .* 3 features; give at least 4"):
        Gaussian.fit(np.ones((images, 3)))
    check_images(4, 3)


# ---------------------------------------------------------------- baselines


def test_a_floor_falls_with_the_number_of_images_and_ends_with_halves() -> None:
    rng = np.random.default_rng(0)
    found = list(baselines(rng.standard_normal((1200, 4)), rng.integers(0, 3, 1200), seed=0))
    assert [floor.images for floor in found] == [64, 128, 256, 512, 600]
    assert found[0].distance > 2 * found[1].distance > 2 * found[3].distance > 0
    assert all(0 < floor.spread < floor.distance for floor in found)


def test_baselines_depend_on_the_seed_alone() -> None:
    features, labels = np.random.default_rng(1).standard_normal((200, 3)), np.arange(200) % 5
    one, again, other = (list(baselines(features, labels, seed=seed)) for seed in (0, 0, 1))
    assert one == again != other


def test_too_few_images_for_two_halves_are_refused() -> None:
    with pytest.raises(InputError, match=r"9 test images are too few for 4 features.* at least 5.*--features 3"):
        list(baselines(np.ones((9, 4)), np.zeros(9, np.int64), seed=0))


def test_every_beginning_holds_the_classes_evenly() -> None:
    labels = np.array([0] * 10 + [1] * 30 + [2] * 20)
    order = balanced_order(labels, np.random.default_rng(0))
    assert sorted(order.tolist()) == list(range(60))
    for count in (3, 15, 30):
        assert np.bincount(labels[order[:count]]).tolist() == [count // 3] * 3
    assert order.tolist() != balanced_order(labels, np.random.default_rng(1)).tolist()


def test_a_share_and_its_error() -> None:
    assert share_of(np.array([True, True, True, False])) == (0.75, math.sqrt(0.75 * 0.25 / 4))
    assert share_of(np.array([True, True])) == (1.0, 0.0)


# ---------------------------------------------------------------- spec


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"features": 65}, "features is 65, must be a whole number in 1..64"),
        ({"size": 28}, "size is 28, must be a multiple of 8"),
        ({"width": 12}, "width is 12, must be a multiple of 8"),
        ({"channels": True}, "channels is True"),
        ({"num_classes": 0}, "num_classes is 0"),
    ],
)
def test_a_classifier_that_cannot_be_is_refused(changes: dict[str, Any], said: str) -> None:
    facts = {"channels": 1, "size": 32, "num_classes": 10, "width": 8, "features": 8}
    with pytest.raises(InputError, match=said):
        ClassifierSpec(**(facts | changes))

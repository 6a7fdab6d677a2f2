"""Reference cases must suit whatever rows a recipe asks for."""

from __future__ import annotations

import numpy as np
import pytest

from elit_export.models.sit import ElitSiT
from elit_export.runtime.bank import EngineBank, Slot
from elit_export.runtime.pipeline import Pipeline
from elit_export.spec import Precision, Profile, Range, default_profiles
from elit_export.verify.cases import (
    case_inputs,
    decoder_rows,
    reference_cases,
    reference_trajectories,
    trajectory_profiles,
    trajectory_states,
)
from elit_export.verify.reference import torch_engine
from tests.helpers import tiny_model

NAMES = ("plain", "guided", "mixed", "multistep")


@pytest.fixture(scope="module")
def model() -> ElitSiT:
    return tiny_model()


@pytest.mark.parametrize(
    ("rows", "images", "names"),
    [
        (Range(1, 2, 8), 2, NAMES),
        (Range(1, 1, 3), 1, NAMES),
        (Range(1, 2, 2), 1, NAMES),
        (Range(1, 1, 1), 1, ("plain", "mixed", "multistep")),
        (Range(4, 4, 8), 4, NAMES),
        (Range(4, 4, 4), 4, ("plain", "mixed", "multistep")),
        (Range(3, 3, 3), 3, ("plain", "mixed", "multistep")),
    ],
)
def test_trajectories_run_within_the_rows(model: ElitSiT, rows: Range, images: int, names: tuple[str, ...]) -> None:
    profiles = default_profiles(model.spec.latents, rows)
    slots = [Slot(profile, torch_engine(model)) for profile in profiles]
    pipeline = Pipeline(EngineBank(slots, model.spec.budgets, Precision.FP32), model.spec, model.data)
    trajectories = reference_trajectories(profiles, model.spec)
    assert tuple(trajectory.name for trajectory in trajectories) == names
    for trajectory in trajectories:
        assert len(trajectory.labels) == images
        assert all(np.isfinite(state).all() for state in trajectory_states(pipeline, trajectory))


@pytest.mark.parametrize(
    ("latents", "rows", "expected"),
    [
        (Range(2, 3, 4), Range(1, 2, 5), [(2, 1), (3, 2), (4, 5), (2, 5), (4, 1)]),
        (Range(2, 2, 3), Range(1, 1, 5), [(2, 1), (3, 5), (2, 5), (3, 1)]),
        (Range(4, 4, 4), Range(1, 2, 5), [(4, 1), (4, 2), (4, 5)]),
        (Range(1, 1, 1), Range(1, 1, 1), [(1, 1)]),
    ],
)
def test_cases_are_the_corners_each_once(latents: Range, rows: Range, expected: list[tuple[int, int]]) -> None:
    profiles = [Profile("a", latents, rows), Profile("b", latents, rows)]
    cases = [(case.profile, case.kept, case.rows) for case in reference_cases(profiles)]
    assert cases == [(profile.name, *corner) for profile in profiles for corner in expected]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [((1, 1, 4), (1, 2)), ((1, 2, 4), (1, 2)), ((1, 4, 8), (1, 4)), ((3, 3, 4), (3, 4)), ((1, 1, 1), (1,))],
)
def test_a_decoder_is_asked_with_two_numbers_of_rows(rows: tuple[int, int, int], expected: tuple[int, ...]) -> None:
    assert decoder_rows(Range(*rows)) == expected


def test_inputs_repeat_themselves(model: ElitSiT) -> None:
    cases = reference_cases(default_profiles(4, Range(1, 2, 5)))
    first, second = (case_inputs(cases[3], 3, model.spec) for _ in range(2))
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name])


def test_a_trajectory_knows_the_profiles_that_serve_it(model: ElitSiT) -> None:
    profiles = default_profiles(model.spec.latents, Range(1, 2, 8))
    slots = [Slot(profile, torch_engine(model)) for profile in profiles]
    pipeline = Pipeline(EngineBank(slots, model.spec.budgets, Precision.FP32), model.spec, model.data)
    used = {
        trajectory.name: trajectory_profiles(pipeline, trajectory)
        for trajectory in reference_trajectories(profiles, model.spec)
    }
    assert used == {
        "plain": ("full",),
        "guided": ("full",),
        "mixed": ("quarter", "full"),
        "multistep": ("quarter", "full"),
    }

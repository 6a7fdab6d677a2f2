"""Polygraphy's Comparator runs our engines and compares plan sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elit_export.arrays import Arrays
from elit_export.backends.protocols import FunctionEngine
from elit_export.bundle.manifest import PlanSet
from elit_export.bundle.reading import Bundle
from elit_export.errors import BundleError, InputError
from elit_export.spec import STEP

pytest.importorskip("polygraphy")
from polygraphy.comparator import Comparator, RunResults, SnrCompareFunc
from polygraphy.exception import PolygraphyException

from elit_export.integrations.polygraphy import EngineRunner, plan_set_runner, reference_inputs


def plan_set_of(bundle: Bundle, target: str) -> PlanSet:
    return next(one for one in bundle.manifest.plan_sets if one.target == target)


def results_of(bundle: Bundle, *targets: str) -> RunResults:
    plan_sets = [plan_set_of(bundle, target) for target in targets]
    runners = [plan_set_runner(bundle, one) for one in plan_sets]
    return Comparator.run(runners, data_loader=reference_inputs(bundle, plan_sets[0]))


def agree(results: RunResults, least_db: float) -> bool:
    return bool(Comparator.compare_accuracy(results, compare_func=SnrCompareFunc(snr_threshold=least_db)))


def test_the_comparator_compares_plan_sets_of_two_backends(openvino_bundle: Bundle) -> None:
    """ONNX Runtime and OpenVINO in fp32 agree as two sums in another order do; their names tell them apart."""
    results = results_of(openvino_bundle, "cpu", "ov-fp32")
    assert [name for name, _ in results] == ["cpu fp32", "ov-fp32 fp32"]
    cases = len(plan_set_of(openvino_bundle, "cpu").reference.cases)
    assert all(len(answers) == cases for _, answers in results)
    assert agree(results, 110)
    assert not agree(results, 200)


def test_the_comparator_compares_precisions(openvino_bundle: Bundle) -> None:
    lower = [one for one in openvino_bundle.manifest.plan_sets if one.precision.value in ("bf16", "int8")]
    if not lower:
        pytest.skip("this CPU has neither bf16 nor int8")
    results = results_of(openvino_bundle, "ov-fp32", lower[0].target)
    assert agree(results, 20)
    assert not agree(results, 100)


def test_what_a_runner_gives_is_what_the_engine_gives(tiny_bundle: Bundle) -> None:
    """Against PyTorch's stored outputs, through every profile; the time it took is told."""
    (plan_set,) = tiny_bundle.manifest.plan_sets
    with np.load(tiny_bundle.verified(plan_set.reference.artifact) / "reference.npz") as file:
        arrays = dict(file)
    with plan_set_runner(tiny_bundle, plan_set) as runner:
        for index, inputs in enumerate(reference_inputs(tiny_bundle, plan_set)):
            outputs = runner.infer(inputs)
            assert runner.last_inference_time() > 0
            for name in ("velocity", "residual"):
                np.testing.assert_allclose(outputs[name], arrays[f"{index}/{name}"], atol=1e-4)
    assert not runner.is_active


def test_any_engine_is_a_runner_and_is_closed_with_it(tiny_bundle: Bundle) -> None:
    graph, closed = tiny_bundle.manifest.model.spec.graph(STEP), []

    class Closing(FunctionEngine):
        def close(self) -> None:
            closed.append(True)

    def answer(inputs: Arrays) -> Arrays:
        return {"velocity": -inputs["x"]}

    (inputs, *_) = reference_inputs(tiny_bundle, tiny_bundle.manifest.plan_sets[0])
    with EngineRunner(lambda: Closing(answer), graph, "mine") as runner:
        np.testing.assert_array_equal(runner.infer(inputs)["velocity"], -inputs["x"])
        assert closed == []
    assert closed == [True]


@pytest.mark.parametrize("change", ["type", "shape", "missing"])
def test_polygraphy_checks_inputs_against_the_graph(tiny_bundle: Bundle, change: str) -> None:
    (plan_set,) = tiny_bundle.manifest.plan_sets
    (inputs, *_) = reference_inputs(tiny_bundle, plan_set)
    wrong: dict[str, Any] = {
        "type": {**inputs, "x": inputs["x"].astype(np.float64)},
        "shape": {**inputs, "x": inputs["x"][:, :, :4]},
        "missing": {name: array for name, array in inputs.items() if name != "t"},
    }
    with plan_set_runner(tiny_bundle, plan_set) as runner, pytest.raises(PolygraphyException):
        runner.infer(wrong[change])


def test_a_call_that_no_profile_serves_is_refused(tiny_bundle: Bundle) -> None:
    (plan_set,) = tiny_bundle.manifest.plan_sets
    (inputs, *_) = reference_inputs(tiny_bundle, plan_set)
    many = {name: array if name == "latents" else np.repeat(array, 100, axis=0) for name, array in inputs.items()}
    with plan_set_runner(tiny_bundle, plan_set) as runner, pytest.raises(InputError, match="rows"):
        runner.infer(many)


def test_plans_are_opened_on_activation_and_verified(tiny_bundle: Bundle, tmp_path: Path) -> None:
    bundle = Bundle(tmp_path, tiny_bundle.manifest)  # a folder without plans
    runner = plan_set_runner(bundle, bundle.manifest.plan_sets[0])
    with pytest.raises(BundleError, match="missing; copy the bundle again"):
        runner.activate()

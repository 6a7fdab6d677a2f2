"""A plan that is wrong in any way that matters must not pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elit_export.arrays import HostArray
from elit_export.backends.protocols import FunctionEngine, to_host
from elit_export.bundle.reading import Bundle
from elit_export.errors import BundleError, EngineError, ParityError
from elit_export.models.sit import ElitSiT
from elit_export.runtime.bank import EngineBank, Slot
from elit_export.runtime.opening import open_bank
from elit_export.spec import CACHE_GRAPHS, Precision
from elit_export.verify.compare import Comparison, require
from elit_export.verify.parity import compared, comparison_count, load_reference, load_reference_file
from elit_export.verify.reference import torch_engine

Outputs = dict[str, HostArray]
Change = Callable[[Mapping[str, HostArray], Outputs], Outputs]


def found_with(bundle: Bundle, model: ElitSiT, change: Change) -> Iterator[Comparison]:
    """The comparisons of a bundle over PyTorch with `change` applied to its outputs."""
    exact = torch_engine(model)

    def changed(inputs: Mapping[str, HostArray]) -> Outputs:
        return change(inputs, {name: to_host(array) for name, array in exact(inputs).items()})

    (plan_set,) = bundle.manifest.plan_sets
    slots = [Slot(facts.profile, FunctionEngine(changed)) for facts in plan_set.profiles]
    cache = {graph: torch_engine(model, graph) for graph in CACHE_GRAPHS}
    bank = EngineBank(slots, bundle.manifest.model.spec.budgets, Precision.FP32, cache)
    yield from compared(bundle, plan_set, bank, load_reference(bundle, plan_set.reference))


def check_with(bundle: Bundle, model: ElitSiT, change: Change) -> None:
    """Stops at the first miss."""
    found = [require(one) for one in found_with(bundle, model, change)]
    assert len(found) == comparison_count(bundle.manifest.plan_sets[0])


def test_pytorch_itself_passes(golden_g4_bundle: Bundle, golden_g4_model: ElitSiT) -> None:
    check_with(golden_g4_bundle, golden_g4_model, lambda _, outputs: outputs)


@pytest.mark.parametrize("name", ["velocity", "residual"])
def test_small_error_in_any_output_is_found(golden_g4_bundle: Bundle, golden_g4_model: ElitSiT, name: str) -> None:
    with pytest.raises(ParityError, match=rf"profile full, K=13 rows=1 {name}: SQNR .* would have passed"):
        check_with(golden_g4_bundle, golden_g4_model, lambda _, outputs: outputs | {name: outputs[name] * (1 + 3e-6)})


@pytest.mark.parametrize(("kept", "profile"), [(16, "full"), (5, "half"), (4, "quarter"), (1, "sixteenth")])
def test_error_at_one_budget_names_its_profile(
    golden_g4_bundle: Bundle, golden_g4_model: ElitSiT, kept: int, profile: str
) -> None:
    def wrong_there(inputs: Mapping[str, HostArray], outputs: Outputs) -> Outputs:
        if len(inputs["latents"]) == kept:
            return outputs | {"velocity": outputs["velocity"] + 1e-3}
        return outputs

    with pytest.raises(ParityError, match=f"profile {profile}, K={kept} .*velocity"):
        check_with(golden_g4_bundle, golden_g4_model, wrong_there)


def test_error_in_the_null_class_alone_is_found_on_the_trajectory(
    golden_g4_bundle: Bundle, golden_g4_model: ElitSiT
) -> None:
    def wrong_null(inputs: Mapping[str, HostArray], outputs: Outputs) -> Outputs:
        null = inputs["y"] == 1000
        if null.all() and len(null) > 1:  # the weak branch of guidance as a call of its own: from step 2 on
            return outputs | {"velocity": outputs["velocity"] * np.float32(1.001)}
        return outputs

    with pytest.raises(ParityError, match=r"trajectory mixed \(profiles sixteenth, full\), step 2"):
        check_with(golden_g4_bundle, golden_g4_model, wrong_null)


def test_error_with_few_latents_and_many_rows_alone_is_found(
    golden_g4_bundle: Bundle, golden_g4_model: ElitSiT
) -> None:
    """As of an engine whose row stride depends on K; no corner of the diagonal has both."""

    def wrong_there(inputs: Mapping[str, HostArray], outputs: Outputs) -> Outputs:
        if len(inputs["latents"]) == 5 and len(inputs["x"]) == 8:
            return outputs | {"velocity": outputs["velocity"][::-1]}
        return outputs

    with pytest.raises(ParityError, match="profile half, K=5 rows=8 velocity"):
        check_with(golden_g4_bundle, golden_g4_model, wrong_there)


def test_an_engine_that_is_not_finite_misses_and_the_rest_is_still_compared(
    golden_g4_bundle: Bundle, golden_g4_model: ElitSiT
) -> None:
    def not_finite(inputs: Mapping[str, HostArray], outputs: Outputs) -> Outputs:
        if len(inputs["latents"]) == 16:
            return outputs | {"velocity": np.full_like(outputs["velocity"], np.nan)}
        return outputs

    found = list(found_with(golden_g4_bundle, golden_g4_model, not_finite))
    assert len(found) == comparison_count(golden_g4_bundle.manifest.plan_sets[0])
    missed = {f"{comparison.part}, {comparison.point}": comparison for comparison in found if not comparison.passed}
    assert "no tolerance would have passed" in missed["profile full, K=16 rows=2 velocity"].verdict
    assert {name for name in missed if name.startswith("trajectory")} == {
        *(f"trajectory {name}, step {step}" for name in ("plain", "guided") for step in range(4)),
        *(f"trajectory {name}, step {step}" for name in ("mixed", "multistep") for step in (2, 3)),
    }
    said = missed["trajectory mixed, step 3"].verdict
    assert "trajectory mixed (profiles sixteenth, full), step 3: nothing to compare: step 2" in said
    assert "profile full (fp32) at budget 16of16 gave a velocity that is not finite" in said


def test_an_engine_that_fails_misses_with_its_reason(golden_g4_bundle: Bundle, golden_g4_model: ElitSiT) -> None:
    def failing(inputs: Mapping[str, HostArray], outputs: Outputs) -> Outputs:
        if len(inputs["x"]) == 8:
            raise EngineError("out of memory")
        return outputs

    missed = [one for one in found_with(golden_g4_bundle, golden_g4_model, failing) if not one.passed]
    assert missed
    assert all("rows=8" in one.point and one.verdict.endswith("nothing to compare: out of memory") for one in missed)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda arrays: arrays.pop("0/velocity"), "has no array 0/velocity"),
        (lambda arrays: arrays.pop("0/x"), "has no array 0/x"),
        (lambda arrays: arrays.update({"0/velocity": np.array(["a"])}), "the array 0/velocity holds <U1, not numbers"),
    ],
    ids=["an output", "an input", "text"],
)
def test_a_missing_reference_array_is_named(
    tiny_bundle: Bundle, tmp_path: Path, change: Callable[[dict[str, Any]], object], told: str
) -> None:
    """Of a reference that was written wrong, hash and all."""
    plan_set = tiny_bundle.manifest.plan_sets[0]
    reference = plan_set.reference
    arrays = dict(np.load(tiny_bundle.verified(reference.artifact) / "reference.npz"))
    change(arrays)
    np.savez(tmp_path / "reference.npz", **arrays)
    remedy = "copy the bundle again, or build it again: elit-export build"
    with open_bank(tiny_bundle, plan_set) as bank, pytest.raises(BundleError, match=f"{told}; {remedy}"):
        list(compared(tiny_bundle, plan_set, bank, load_reference_file(tmp_path)))


def test_reference_needs_no_checkpoint(golden_g4_bundle: Bundle) -> None:
    (plan_set,) = golden_g4_bundle.manifest.plan_sets
    assert set(plan_set.reference.artifact.files) == {"reference.npz"}
    assert not list(Path(golden_g4_bundle.folder).glob("*.safetensors"))

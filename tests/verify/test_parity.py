"""A plan that is wrong in any way that matters must not pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from elit_export.bundle import Bundle
from elit_export.errors import ParityError
from elit_export.models.sit import ElitSiT
from elit_export.runtime.bank import EngineBank, Slot
from elit_export.runtime.engine import FunctionEngine, HostArray, to_host
from elit_export.spec import Precision
from elit_export.verify.parity import compared, comparisons_of, load_reference, require
from elit_export.verify.reference import torch_engine

Outputs = dict[str, HostArray]


def check_with(bundle: Bundle, model: ElitSiT, change: Callable[[Mapping[str, HostArray], Outputs], Outputs]) -> None:
    """Run the checks of a bundle over PyTorch with `change` applied to its outputs."""
    exact = torch_engine(model)

    def changed(inputs: Mapping[str, HostArray]) -> Outputs:
        return change(inputs, {name: to_host(array) for name, array in exact(inputs).items()})

    (plan_set,) = bundle.manifest.plan_sets
    slots = [Slot(facts.profile, FunctionEngine(changed)) for facts in plan_set.profiles]
    bank = EngineBank(slots, bundle.manifest.model.spec.budgets, Precision.FP32)
    found = [require(one) for one in compared(bundle, plan_set, bank, load_reference(bundle, plan_set.reference))]
    assert len(found) == comparisons_of(plan_set)


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
        if null.all():  # the weak branch of guidance as a call of its own: from step 2 on
            return outputs | {"velocity": outputs["velocity"] * np.float32(1.001)}
        return outputs

    with pytest.raises(ParityError, match="trajectory mixed, step 2"):
        check_with(golden_g4_bundle, golden_g4_model, wrong_null)


def test_reference_needs_no_checkpoint(golden_g4_bundle: Bundle) -> None:
    (plan_set,) = golden_g4_bundle.manifest.plan_sets
    assert set(plan_set.reference.artifact.files) == {"reference.npz"}
    assert not list(Path(golden_g4_bundle.folder).glob("*.safetensors"))

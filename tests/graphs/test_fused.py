"""The graph `fused` as a host without the runtime sees it, held against the runtime."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto

from elit_export import Pipeline, compile_bundle
from elit_export.arrays import Arrays
from elit_export.backends.protocols import GraphFile
from elit_export.backends.tensorrt.options import TensorRTTarget
from elit_export.bundle.manifest import PlanSet, ReferenceCase
from elit_export.bundle.reading import Bundle
from elit_export.bundle.recipe import Recipe, recipe_from_values
from elit_export.compiler.build import NOTHING_CHANGED
from elit_export.errors import ExportError, ParityError, RecipeError
from elit_export.graphs import check, formats
from elit_export.graphs.check import check_graph
from elit_export.graphs.export import export_graph
from elit_export.models.sit import ElitSiT
from elit_export.runtime.noise import SeededNoise
from elit_export.runtime.step_cache.mask import Mask
from elit_export.runtime.step_cache.policy import CachePolicy
from elit_export.runtime.step_cache.teacache import TeaCache
from elit_export.spec import FUSED, LATENTS, ROWS, STEP, Budget, Fit, ModelSpec, Precision, Profile, Range, fused_state
from elit_export.verify.cases import case_inputs, fused_inputs
from elit_export.verify.check import verify_plan_set
from elit_export.verify.metrics import difference
from elit_export.verify.parity import comparison_count
from elit_export.verify.tolerances import TOLERANCES
from tests.conftest import fused_recipe, recipe_values
from tests.helpers import Array, max_relative, rounding_graph, tiny_model

STEPS = 24
LABELS = (0, 1, 2)
NEAREST = 1e-5  # of the largest value; measured 8e-8
ANY = (0.0, 1e9)
LINEAR = Fit((0.0, 1.0, 0.0, 0.0, 0.0), *ANY)  # what the distances of this model add up to in a few steps
CURVED = Fit((0.002, 0.9, -3.0, 60.0, -7.0), *ANY)
NOTHING_ADDS_UP = Fit((0.0,) * 5, -np.inf, np.inf)

Fits = Mapping[Budget, Fit]
Rule = dict[str, float]  # what a host chooses for all steps alike


# ---------------------------------------------------------------- a host


@dataclass(frozen=True)
class Host:
    """Samples by the graph alone, one call a step."""

    session: ort.InferenceSession
    spec: ModelSpec

    def step(self, inputs: Mapping[str, Any]) -> Arrays:
        names = [output.name for output in self.session.get_outputs()]
        return dict(zip(names, self.session.run(names, inputs), strict=True))

    def sampled(
        self, labels: Sequence[int], budgets: Sequence[Budget], fits: Fits, forced: Sequence[bool], rule: Rule
    ) -> Iterator[tuple[bool, Array]]:
        """Euler's method from the noise of seed 0: whether each step computed, and the state after it."""
        x = SeededNoise(0, len(labels), self.spec.sample_shape)()
        memory = self.empty(len(labels))
        times = [(len(budgets) - step) / len(budgets) for step in range(len(budgets) + 1)]
        for step, (budget, force) in enumerate(zip(budgets, forced, strict=True)):
            given = {"x": x, "t": np.full(len(labels), times[step]), "y": labels, LATENTS: np.arange(budget.kept)}
            found = self.step(self.typed({**given, **memory, **rule, **vars(fits[budget]), "force": force}))
            memory = {name: found[f"{name}_next"] for name in memory}
            x = x + (times[step + 1] - times[step]) * found["velocity"]
            yield bool(found["computed"]), x

    def empty(self, rows: int) -> Arrays:
        """What there is to remember before the first step."""
        shapes = {
            tensor.name: [rows if size == ROWS else int(size) for size in tensor.dims]
            for tensor in fused_state(self.spec)
        }
        return {name: np.zeros(shape) for name, shape in shapes.items()} | {"reused": np.array(-1)}

    def typed(self, inputs: Mapping[str, Any]) -> Arrays:
        types = {tensor.name: tensor.dtype for tensor in self.spec.graph(FUSED).inputs}
        return {name: np.asarray(value, types[name]) for name, value in inputs.items()}


@dataclass(frozen=True)
class Pair:
    """A host and the runtime, on plans of one bundle."""

    host: Host
    runtime: Pipeline

    def agreed(
        self, cache: str, fits: Fits | Fit = LINEAR, labels: Sequence[int] = LABELS, schedule: str = "full"
    ) -> tuple[str, Array]:
        """A digit for every step, 1 where it computed, and the last state, once both agree on each of them."""
        policy = CachePolicy.parse(cache)
        assert policy
        every = dict.fromkeys(self.host.spec.budgets, fits) if isinstance(fits, Fit) else fits
        runtime = Pipeline(self.runtime.bank, self.runtime.spec, self.runtime.data, fits=every)
        records = list(runtime.steps(labels, steps=STEPS, sampler="euler", seed=0, schedule=schedule, cache=policy))
        found = list(self.host.sampled(labels, [record.budget for record in records], *asked_of_host(policy, every)))
        mask = "".join("01"[computed] for computed, _ in found)
        assert mask == "".join("10"[record.calls[0].reused] for record in records)
        apart = [max_relative(x, record.x) for (_, x), record in zip(found, records, strict=True)]
        assert max(apart) <= NEAREST
        return mask, found[-1][1]


def asked_of_host(policy: CachePolicy, fits: Fits) -> tuple[Fits, list[bool], Rule]:
    """What makes a host follow a policy: a fit for each budget, the steps it forces, and the rest."""
    rule: Rule = {"most": policy.max_skip, "order": policy.order}
    ends = [step < policy.warmup or step == STEPS - 1 for step in range(STEPS)]
    if isinstance(policy.rule, TeaCache):
        return fits, ends, rule | {"threshold": policy.rule.threshold}
    assert isinstance(policy.rule, Mask)
    forced = [end or computes for end, computes in zip(ends, policy.rule.computes, strict=True)]
    return dict.fromkeys(fits, NOTHING_ADDS_UP), forced, rule | {"threshold": np.inf}


@pytest.fixture(scope="module")
def pair(fused_bundle: Bundle) -> Iterator[Pair]:
    (plan_set,) = fused_bundle.manifest.plan_sets
    assert plan_set.fused
    path = fused_bundle.verified(plan_set.fused.artifact) / plan_set.fused.file
    with Pipeline.load(fused_bundle.folder) as runtime:
        yield Pair(Host(ort.InferenceSession(path), runtime.spec), runtime)


# ---------------------------------------------------------------- whole trajectories


def test_the_threshold_decides_as_in_the_runtime(pair: Pair) -> None:
    masks = [pair.agreed(f"teacache:{threshold}")[0] for threshold in (0, 0.05, 0.09, 0.13, 1)]
    assert [mask.count("1") for mask in masks[:4]] == [STEPS, 13, 9, 7]
    assert masks[3:] == ["100100010001000010000101", "100001000010000100001001"]  # the last by `max_skip` alone


@pytest.mark.parametrize("max_skip", [1, 2, 9])
def test_no_more_reuses_in_a_row_than_max_skip(pair: Pair, max_skip: int) -> None:
    mask, _ = pair.agreed(f"teacache:1,max_skip={max_skip}")
    assert max(len(run) for run in mask.split("1")) == max_skip


def test_residuals_are_forecast_in_the_order_asked_for(pair: Pair) -> None:
    (plain_mask, plain), (mask, linear) = (pair.agreed(f"teacache:0.09,order={order}") for order in (0, 1))
    assert plain_mask.count("0") > STEPS / 3
    assert mask.count("0") > STEPS / 3
    assert max_relative(plain, linear) > 100 * NEAREST


def test_steps_at_the_start_that_the_host_forces(pair: Pair) -> None:
    mask, _ = pair.agreed("teacache:1,warmup=5")
    assert mask.startswith("1111100001")


def test_rows_decide_together(pair: Pair) -> None:
    alone = [pair.agreed("teacache:0.09", labels=[label])[0] for label in LABELS]
    together, _ = pair.agreed("teacache:0.09")
    assert len(set(alone)) > 1 or together not in alone
    assert together.count("1") >= max(mask.count("1") for mask in alone)


def test_a_polynomial_of_every_power(pair: Pair) -> None:
    masks = {pair.agreed("teacache:0.09", fit)[0] for fit in (LINEAR, CURVED)}
    assert len(masks) == 2


def test_a_schedule_changes_the_budget_and_its_fit(pair: Pair) -> None:
    """What was computed at one budget is reused at the next."""
    steeper = Fit((0.0, 3.0, 0.0, 0.0, 0.0), *ANY)
    fits = {budget: steeper if budget == pair.host.spec.full else LINEAR for budget in pair.host.spec.budgets}
    schedule = f"0-11:1,12-{STEPS - 1}:full"
    mixed, x = pair.agreed("teacache:0.13", fits, schedule=schedule)
    same, _ = pair.agreed("teacache:0.13", schedule=schedule)
    _, full = pair.agreed("teacache:0.13", fits)
    assert mixed[:12] == same[:12]
    assert mixed[12:].count("1") > same[12:].count("1")
    assert max_relative(x, full) > 100 * NEAREST


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("digits", ["1" + "0" * (STEPS - 1), "100" * 8, "110010001110101000010110"])
def test_a_mask_that_is_fixed_beforehand(pair: Pair, digits: str, order: int) -> None:
    mask, _ = pair.agreed(f"static:mask@{digits},order={order},max_skip=99")
    assert mask == f"{digits[:-1]}1"


def test_what_the_fit_does_not_cover_computes(pair: Pair) -> None:
    """Distances of this model lie around 0.03."""
    ends = f"1{'0' * (STEPS - 2)}1"
    assert pair.agreed("teacache:99,max_skip=99")[0] == ends
    within, *outside = (
        pair.agreed("teacache:99,max_skip=99", Fit(LINEAR.coefficients, low, high))[0]
        for low, high in ((0.001, 1.0), (0.03, 1.0), (0.0, 0.035), (1.0, 2.0))
    )
    assert within == ends
    assert all(mask.count("1") > 2 for mask in outside)
    assert len(set(outside)) == 3
    assert outside[-1] == "1" * STEPS


# ---------------------------------------------------------------- one decision


@pytest.fixture(scope="module")
def reusing(pair: Pair) -> Arrays:
    """Inputs of a step that reuses, of three rows whose distances are around 1."""
    host, spec = pair.host, pair.host.spec
    generator = np.random.default_rng(3)
    given = case_inputs(ReferenceCase(profile="", kept=4, rows=3), 0, spec)
    empty = {name: generator.standard_normal(array.shape) for name, array in host.empty(3).items()}
    memory = {**empty, "accumulated": np.zeros(3), "reused": 0}
    rule = {"force": False, "threshold": 9, "most": 2, "order": 1, "low": ANY[0], "high": ANY[1]}
    return host.typed({**given, LATENTS: np.arange(4), **memory, **rule, "coefficients": LINEAR.coefficients})


@pytest.mark.parametrize(
    ("changes", "computed"),
    [
        ({}, False),
        ({"force": True}, True),
        ({"reused": -1}, True),
        ({"reused": 1}, False),
        ({"reused": 2}, True),
        ({"accumulated": [0, 9, 0]}, True),  # one row is enough
        ({"accumulated": [1, 5, 1]}, False),
        ({"accumulated": [1, 5, 1], "threshold": 1}, True),
        ({"threshold": 0}, True),
        ({"threshold": np.nan}, True),
        ({"coefficients": 0, "accumulated": 9}, True),  # reaching it is enough
        ({"coefficients": 0, "accumulated": 8.5}, False),
        ({"low": 5}, True),
        ({"high": 0.5}, True),
        ({"signal": np.nan}, True),
        ({"signal": np.nan, "low": -np.inf, "high": np.inf, "threshold": np.inf}, True),
        ({"signal": 0}, True),  # an infinite distance
    ],
)
def test_when_a_step_computes(pair: Pair, reusing: Arrays, changes: dict[str, Any], computed: bool) -> None:
    outputs = pair.host.step(reusing | changed(reusing, changes))
    assert outputs["computed"] == computed
    assert np.isfinite(outputs["velocity"]).all()


def changed(inputs: Arrays, changes: Mapping[str, Any]) -> Arrays:
    """Values repeated to the shape they take the place in."""
    return {name: np.full_like(inputs[name], value) for name, value in changes.items()}


def test_the_ends_of_the_range_are_covered(pair: Pair, reusing: Arrays) -> None:
    distance = pair.host.step(reusing)["accumulated_next"]  # the fit is the distance itself
    low, high = distance.min(), distance.max()
    assert not pair.host.step(reusing | changed(reusing, {"low": low, "high": high}))["computed"]
    for name, narrower in (("low", np.nextafter(low, high)), ("high", np.nextafter(high, low))):
        assert pair.host.step(reusing | changed(reusing, {name: narrower}))["computed"]


def test_one_row_of_nan_is_enough(pair: Pair, reusing: Arrays) -> None:
    signal = reusing["signal"].copy()
    signal[1, 0, 0] = np.nan
    assert pair.host.step({**reusing, "signal": signal})["computed"]


def test_what_is_remembered_of_a_reused_step(pair: Pair, reusing: Arrays) -> None:
    outputs = pair.host.step(reusing)
    for name in ("residual", "residual_prev", "t_computed", "t_computed_prev"):
        assert np.array_equal(outputs[f"{name}_next"], reusing[name])
    assert outputs["reused_next"] == 1
    assert np.all(outputs["accumulated_next"] > 0.1)
    distance = np.abs(outputs["signal_next"] - reusing["signal"]).mean((1, 2)) / np.abs(reusing["signal"]).mean((1, 2))
    assert outputs["accumulated_next"] == pytest.approx(distance, rel=1e-5)


def test_what_was_added_up_is_not_taken_back(pair: Pair, reusing: Arrays) -> None:
    changes = changed(reusing, {"coefficients": -1, "accumulated": 2})
    assert np.array_equal(pair.host.step(reusing | changes)["accumulated_next"], [2, 2, 2])


def test_what_is_remembered_of_a_computed_step(pair: Pair, reusing: Arrays) -> None:
    outputs = pair.host.step(reusing | changed(reusing, {"force": True, "reused": 1, "accumulated": 2}))
    assert np.array_equal(outputs["residual_prev_next"], reusing["residual"])
    assert np.array_equal(outputs["t_computed_prev_next"], reusing["t_computed"])
    assert np.array_equal(outputs["t_computed_next"], reusing["t"])
    assert outputs["reused_next"] == 0
    assert not outputs["accumulated_next"].any()


def test_the_first_step_leaves_nothing_to_extrapolate_from(pair: Pair, reusing: Arrays) -> None:
    outputs = pair.host.step({**reusing, **pair.host.typed(pair.host.empty(3))})
    assert outputs["computed"]
    assert np.array_equal(outputs["residual_next"], outputs["residual_prev_next"])
    assert np.array_equal(outputs["t_computed_next"], outputs["t_computed_prev_next"])
    assert not outputs["accumulated_next"].any()  # its own distance, from no signal at all, is infinite
    assert all(np.isfinite(array).all() for array in outputs.values())


# ---------------------------------------------------------------- form


def graph_file(bundle: Bundle, name: str) -> Path:
    graph = bundle.manifest.graphs[f"{name}-fp32"]
    return bundle.verified(graph.artifact) / graph.file


def operators(graph: onnx.GraphProto) -> Counter[str]:
    return Counter(node.op_type for node in graph.node)


def test_the_blocks_are_in_the_branch_that_computes_alone(fused_bundle: Bundle) -> None:
    graph = onnx.load(graph_file(fused_bundle, FUSED), load_external_data=False).graph
    spec = fused_bundle.manifest.model.spec
    (choice,) = [node for node in graph.node if node.op_type == "If"]
    branches = {attribute.name: operators(attribute.g) for attribute in choice.attribute}
    assert branches["then_branch"]["Softmax"] == spec.depth + 2
    assert branches["else_branch"]["Softmax"] == operators(graph)["Softmax"] == 0
    assert branches["else_branch"]["LayerNormalization"] == 1  # the final one
    assert operators(graph)["LayerNormalization"] == 1  # that of the signal


def test_weights_are_stored_once(fused_bundle: Bundle) -> None:
    step, fused = (graph_file(fused_bundle, name).with_suffix(".onnx.data").stat().st_size for name in (STEP, FUSED))
    assert fused < 1.1 * step


def checked(bundle: Bundle, name: str, **changes: Any) -> None:
    """The graph held against its spec, or one with `changes`."""
    wanted = replace(bundle.manifest.model.spec.graph(name), **changes)
    check_graph(graph_file(bundle, name), wanted, opset=Precision.FP32.opset)


def test_as_many_choices_as_the_graph_should_have(fused_bundle: Bundle) -> None:
    checked(fused_bundle, FUSED)
    checked(fused_bundle, STEP)
    with pytest.raises(ExportError, match="1 nodes If, wanted 0"):
        checked(fused_bundle, FUSED, has_if=False)
    with pytest.raises(ExportError, match="0 nodes If, wanted 1"):
        checked(fused_bundle, STEP, has_if=True)


def test_what_is_forbidden_is_forbidden_in_a_branch(fused_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "FORBIDDEN", {"Softmax"})
    with pytest.raises(ExportError, match=r"forbidden node Softmax \(Softmax_\d+\)"):
        checked(fused_bundle, FUSED)


# ---------------------------------------------------------------- builds


@pytest.fixture
def copied(fused_bundle: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fused_bundle.folder, tmp_path / "copied"))


def built(recipe: Recipe, folder: Path) -> tuple[PlanSet, list[str]]:
    """The plan set, and what was said of making it."""
    stages: list[str] = []
    bundle = compile_bundle(recipe, "cpu", out=folder, progress=lambda stage, _: stages.append(stage))
    (plan_set,) = bundle.manifest.plan_sets
    return plan_set, list(dict.fromkeys(stage for stage in stages if not stage.startswith("verif")))


def keys_of(plan_set: PlanSet) -> list[str]:
    return [plan.key for plan in plan_set.plans]


def test_verify_compares_it(fused_bundle: Bundle) -> None:
    (plan_set,) = fused_bundle.manifest.plan_sets
    found = verify_plan_set(fused_bundle, plan_set, checkpoint=None, on_comparison=lambda _: None)
    points = [comparison.point for comparison in found if comparison.part == f"graph {FUSED}"]
    assert len(points) == len(set(points)) == 2 * len(plan_set.reference.cases) + 2 * len(plan_set.reference.cache_rows)
    assert len(found) == comparison_count(plan_set)
    assert all(comparison.passed for comparison in found)


def test_the_runtime_does_not_open_it(copied: Path) -> None:
    (plan_set,) = Bundle.open(copied).manifest.plan_sets
    assert plan_set.fused
    shutil.rmtree(copied / "plans" / plan_set.fused.artifact.name)
    with Pipeline.load(copied) as pipeline:
        pipeline.sample([0], steps=2, sampler="euler")


def test_left_out_it_goes_alone_and_comes_back_alone(copied: Path, tiny_checkpoint: Path) -> None:
    with_it, stages = built(fused_recipe(tiny_checkpoint), copied)
    assert stages == [NOTHING_CHANGED]
    without, stages = built(recipe_from_values(recipe_values(tiny_checkpoint), "test"), copied)
    assert stages == []
    assert without.fused is None
    assert keys_of(without) == keys_of(with_it)[:-1]
    assert not list(copied.glob(f"plans/{FUSED}-*"))
    again, stages = built(fused_recipe(tiny_checkpoint), copied)
    assert stages == [f"build {FUSED}"]
    assert again == with_it


def test_a_plan_that_misses_is_not_taken(
    tiny_bundle: Bundle, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(tiny_bundle.folder, tmp_path / "copied"))
    export = formats.export_graph

    def careless(model: ElitSiT, name: str, target: Path, precision: Precision) -> Path:
        path = export(model, name, target, precision)
        weights = path.with_suffix(".onnx.data")
        weights.write_bytes(bytes(weights.stat().st_size))
        return path

    monkeypatch.setattr(formats, "export_graph", careless)
    with pytest.raises(ParityError, match=f"graph {FUSED}"):
        compile_bundle(fused_recipe(tiny_checkpoint), "cpu", out=folder)
    assert Bundle.open(folder).manifest == tiny_bundle.manifest


def test_a_backend_that_cannot_choose_inside_says_so() -> None:
    values: Any = recipe_values(Path("model.safetensors"))
    values["targets"]["gpu"] = {"backend": "torch-tensorrt", "precision": "fp16", "fused": True}
    with pytest.raises(RecipeError, match=r"targets\.gpu: fused: backend torch-tensorrt cannot run a graph with an If"):
        recipe_from_values(values, "test")


# ---------------------------------------------------------------- half precision


@pytest.fixture(scope="module")
def half_model() -> ElitSiT:
    """With heads wide enough for half precision."""
    return tiny_model(head_depth=1, core_depth=0, tail_depth=0)


@pytest.fixture(scope="module")
def half_graph(half_model: ElitSiT, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_graph(half_model, FUSED, tmp_path_factory.mktemp("half"), Precision.BF16)


def test_bf16_is_near_pytorch(half_graph: Path, half_model: ElitSiT) -> None:
    """Measured 52.9 dB for the velocity, 47.8 dB for the residual."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    host = Host(ort.InferenceSession(rounding_graph(half_graph).SerializeToString(), options), half_model.spec)
    given = {
        **case_inputs(ReferenceCase(profile="", kept=4, rows=3), 0, half_model.spec),
        LATENTS: np.arange(3),
    }
    found = host.step(fused_inputs(given, force=True, rows=3, spec=half_model.spec))
    with torch.no_grad():
        velocity, residual = half_model.step(*(torch.from_numpy(array) for array in given.values()))
    for name, exact in (("velocity", velocity), ("residual_next", residual)):
        assert TOLERANCES[Precision.BF16].step_db <= difference(found[name], exact.numpy()).sqnr_db <= 70


def test_attention_is_spelled_out_where_a_choice_is(half_graph: Path, half_model: ElitSiT) -> None:
    """With its products in half precision, its softmax in float32."""
    graph = onnx.load(half_graph, load_external_data=False).graph
    (choice,) = [node for node in graph.node if node.op_type == "If"]
    (branch,) = [attribute.g for attribute in choice.attribute if attribute.name == "then_branch"]
    assert operators(branch)["Attention"] == 0
    assert operators(branch)["Softmax"] == half_model.spec.depth + 2
    types = {value.name: value.type.tensor_type.elem_type for value in branch.value_info}
    makers = {name: node for node in branch.node for name in node.output}
    for softmax in (node for node in branch.node if node.op_type == "Softmax"):
        (cast,) = [node for node in branch.node if softmax.output[0] in node.input]
        product = makers[makers[softmax.input[0]].input[0]]
        assert (product.op_type, cast.op_type) == ("MatMul", "Cast")
        assert types[softmax.output[0]] == TensorProto.FLOAT
        assert types[product.output[0]] == types[cast.output[0]] == TensorProto.BFLOAT16


# ---------------------------------------------------------------- TensorRT for RTX


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16], ids=str)
def test_tensorrt_for_rtx_builds_it(
    precision: Precision, fused_bundle: Bundle, half_graph: Path, half_model: ElitSiT, tmp_path: Path
) -> None:
    """Without a GPU; the plan is not run."""
    library = pytest.importorskip("tensorrt_rtx")
    from elit_export.backends.tensorrt.build import BUILDERS

    graph, spec = graph_file(fused_bundle, FUSED), fused_bundle.manifest.model.spec
    if precision is Precision.BF16:
        graph, spec = half_graph, half_model.spec
    file = GraphFile(graph, spec.graph(FUSED))
    values = {"backend": "tensorrt-rtx", "precision": precision, "compute_capabilities": ["8.9", "12.0"]}
    profiles = [Profile(FUSED, Range(1, 4, 4), Range(1, 2, 8))]
    target = TensorRTTarget.model_validate(values)
    plan = BUILDERS["tensorrt-rtx"].build_plan(file, tmp_path, profiles, target, None, lambda _: None)
    assert plan.label == f"{FUSED}-tensorrt-rtx{library.__version__}-sm89-sm120"
    assert (tmp_path / plan.file).stat().st_size > graph.with_suffix(".onnx.data").stat().st_size

"""OpenVINO plans of the tiny model in fp32, bf16 and int8. What holds for every engine is in test_engines."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elit_export import Pipeline
from elit_export.arrays import Arrays, HostArray
from elit_export.backends import BACKENDS
from elit_export.backends.protocols import GraphFile, PlanFile, to_host
from elit_export.bundle.calibration_inputs import load_inputs
from elit_export.bundle.manifest import PlanSet
from elit_export.bundle.reading import Bundle
from elit_export.bundle.recipe import target_of
from elit_export.compiler.build import compile_bundle
from elit_export.errors import BackendUnavailable, BuildError, BundleError, EngineError, InputError
from elit_export.models.sit import ElitSiT
from elit_export.runtime.noise import SeededNoise
from elit_export.runtime.opening import incompatibility, open_fused, plan_set_target, select_plan_set
from elit_export.spec import CACHE_GRAPHS, FUSED, LATENTS, PROBE, STEP, Precision, Profile, Range
from elit_export.verify.bisect import bisect
from elit_export.verify.cases import cache_inputs, fused_inputs, trajectory_rows
from elit_export.verify.metrics import difference
from elit_export.verify.reference import torch_engine, torch_pipeline
from elit_export.verify.tolerances import TOLERANCES
from tests.backends.test_process import needs_fork, said_by_workers
from tests.conftest import openvino_recipe
from tests.helpers import calibrate, fit_of, tiny_model

ov = pytest.importorskip("openvino", reason="needs openvino")
pytest.importorskip("nncf", reason="needs nncf")

from elit_export.backends.openvino import build as builder  # noqa: E402
from elit_export.backends.openvino import engine as openvino_engine  # noqa: E402

BUILDER, LOADER = builder.BUILDERS["openvino"], openvino_engine.LOADERS["openvino"]
PRECISIONS = ("fp32", "bf16", "int8")
WAYS: tuple[dict[str, Any], ...] = (
    {"schedule": "0-2:1,3-5:full", "guidance": "cfg:2", "sampler": "heun"},
    {"schedule": "full", "guidance": "ccfg:2@1", "sampler": "euler"},
    {"schedule": "half", "guidance": "autoguidance:2@1", "sampler": "ab3"},
    {"schedule": "full", "guidance": "cfg:2", "cache": "static:every@2"},
    {"schedule": "0-2:half,3-5:full", "cache": "teacache:0.3"},
)


@pytest.fixture(scope="module")
def model() -> ElitSiT:
    return tiny_model()


@pytest.fixture(scope="module")
def pool(model: ElitSiT) -> Arrays:
    """Rows that engines are given in earnest: int8 is good at these only."""
    return trajectory_rows(torch_pipeline(model), None)


@pytest.fixture(scope="module")
def opened(openvino_bundle: Bundle) -> Iterator[Callable[[str], Pipeline]]:
    """The pipeline of a target, once; skips what this CPU cannot build."""
    made: dict[str, Pipeline] = {}
    with ExitStack() as stack:

        def pipeline(target: str) -> Pipeline:
            if target not in {plan_set.target for plan_set in openvino_bundle.manifest.plan_sets}:
                pytest.skip(f"this CPU has no arithmetic for {target}")
            if target not in made:
                made[target] = stack.enter_context(Pipeline.load(openvino_bundle.folder, target=target))
            return made[target]

        yield pipeline


@pytest.fixture(params=PRECISIONS)
def precision(request: pytest.FixtureRequest) -> Precision:
    return Precision(request.param)


@pytest.fixture
def pipeline(opened: Callable[[str], Pipeline], precision: Precision) -> Pipeline:
    return opened(f"ov-{precision.value}")


def set_of(bundle: Bundle, precision: str = "fp32") -> PlanSet:
    return select_plan_set(bundle.manifest.plan_sets, f"ov-{precision}", None)


def compiled_of(pipeline: Pipeline) -> Any:
    engine: Any = pipeline.bank.slots[0].engine
    return engine._request.get_compiled_model()


def plan_of(bundle: Bundle) -> PlanFile:
    plan, graph = set_of(bundle).profiles[0].plan, bundle.manifest.model.spec.graph(STEP)
    return PlanFile(bundle.verified(plan.artifact) / plan.file, graph, plan.versions, plan.built_on)


def rows_of(pool: Arrays, rows: int, kept: int) -> Arrays:
    return {
        **{name: np.ascontiguousarray(array[7 : 7 + rows]) for name, array in pool.items()},
        LATENTS: np.arange(kept),
    }


# ---------------------------------------------------------------- what the engines say


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_one_engine_serves_every_budget_and_number_of_rows(
    pipeline: Pipeline, precision: Precision, model: ElitSiT, pool: Arrays, rows: int
) -> None:
    assert len({id(slot.engine) for slot in pipeline.bank.slots}) == 1
    for kept in (1, 4, 2, 3):
        inputs = rows_of(pool, rows, kept)
        found, expected = pipeline.bank.slots[0].engine(inputs), torch_engine(model)(inputs)
        for name in ("velocity", "residual"):
            measured = difference(to_host(found[name]), to_host(expected[name]))
            assert measured.sqnr_db >= TOLERANCES[precision].step_db


@pytest.mark.parametrize("graph", CACHE_GRAPHS)
def test_graphs_of_the_cache_are_exact_in_every_precision(pipeline: Pipeline, model: ElitSiT, graph: str) -> None:
    for rows in (1, 5):
        inputs = cache_inputs(graph, rows, model.spec)
        found, expected = pipeline.bank.cache[graph](inputs), torch_engine(model, graph)(inputs)
        assert found.keys() == expected.keys()
        for name, answer in expected.items():
            assert difference(to_host(found[name]), to_host(answer)).sqnr_db >= TOLERANCES[Precision.FP32].step_db


def test_fused_takes_scalars_and_decides(openvino_bundle: Bundle, model: ElitSiT, pool: Arrays) -> None:
    given = rows_of(pool, 2, 3)
    with open_fused(openvino_bundle, set_of(openvino_bundle)) as engine:
        for force in (True, False):
            outputs = engine(fused_inputs(given, force=force, rows=2, spec=model.spec))
            assert bool(np.all(outputs["computed"])) is force
        assert outputs["velocity"].shape == given["x"].shape


def test_outputs_are_never_written_again(pipeline: Pipeline, pool: Arrays) -> None:
    engine = pipeline.bank.slots[0].engine
    first = engine(rows_of(pool, 2, 3))
    kept = {name: to_host(array).copy() for name, array in first.items()}
    engine(rows_of(pool, 2, 1))
    engine(rows_of({name: array[::-1] for name, array in pool.items()}, 2, 3))
    for name, array in first.items():
        np.testing.assert_array_equal(to_host(array), kept[name])


def test_alternating_budgets_equals_engines_called_by_hand(pipeline: Pipeline) -> None:
    budgets, labels = [4, 1, 3, 4, 2, 1], [0, 2]
    schedule = ",".join(f"{step}:{kept}" for step, kept in enumerate(budgets))
    found = pipeline.sample(labels, steps=6, schedule=schedule, sampler="euler", seed=3)
    x = SeededNoise(3, 2, pipeline.spec.sample_shape)()
    times = np.linspace(1, 0, 7)
    for step, kept in enumerate(budgets):
        slot = pipeline.bank.slot_for(pipeline.spec.budget(kept), 2)
        given = {"x": x.astype(np.float32), "t": np.full(2, times[step], np.float32), "y": np.array(labels)}
        velocity = to_host(slot.engine({**given, LATENTS: np.arange(kept)})["velocity"])
        x = x + (times[step + 1] - times[step]) * velocity.astype(np.float64)
    np.testing.assert_allclose(found.latents, x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_trajectories_guidance_and_step_caches(
    openvino_bundle: Bundle, tmp_path: Path, way: dict[str, Any], precision: Precision
) -> None:
    """The engines of ONNX Runtime in fp32 are the measure, down to which calls are reused."""
    if f"ov-{precision.value}" not in {plan_set.target for plan_set in openvino_bundle.manifest.plan_sets}:
        pytest.skip("this CPU has no such arithmetic")
    folder = Path(shutil.copytree(openvino_bundle.folder, tmp_path / "bundle"))
    calibrate(folder, fit_of(None))
    samples = []
    for target in ("cpu", f"ov-{precision.value}"):
        with Pipeline.load(folder, target=target) as pipeline:
            samples.append(pipeline.sample([0, 1, 2], steps=6, seed=5, **way))
    exact, found = samples
    assert difference(found.latents, exact.latents).sqnr_db >= TOLERANCES[precision].trajectory_db - 3  # of the cache
    if precision is Precision.FP32:
        decided = [[call.reused for record in sample.records for call in record.calls] for sample in samples]
        assert decided[0] == decided[1]
    if "cache" in way:
        assert any(call.reused for record in found.records for call in record.calls)


def test_threads_that_share_a_bank_get_what_each_gets_alone(pipeline: Pipeline) -> None:
    works = [{"labels": [0, 1], "schedule": "full", "seed": 1}, {"labels": [2], "schedule": "1", "seed": 2}]

    def run(work: dict[str, Any]) -> list[HostArray]:
        return [pipeline.sample(steps=4, guidance="cfg:2", **work).latents for _ in range(3)]

    alone = [run(work)[0] for work in works]
    with ThreadPoolExecutor(2) as threads:
        for repeats, expected in zip(threads.map(run, works), alone, strict=True):
            assert all(np.array_equal(latents, expected) for latents in repeats)


def test_a_moved_bundle_gives_the_same(
    openvino_bundle: Bundle, pipeline: Pipeline, precision: Precision, tmp_path: Path
) -> None:
    moved = shutil.copytree(openvino_bundle.folder, tmp_path / "elsewhere")
    expected = pipeline.sample([1], steps=3, schedule="half").latents
    with Pipeline.load(moved, target=f"ov-{precision.value}") as again:
        np.testing.assert_array_equal(again.sample([1], steps=3, schedule="half").latents, expected)


# ---------------------------------------------------------------- in which arithmetic


def arithmetic(pipeline: Pipeline) -> dict[str, set[str]]:
    """By kind of node of the compiled model, in which types its products run."""
    found: dict[str, set[str]] = {}
    for node in compiled_of(pipeline).get_runtime_model().get_ops():
        info = node.get_rt_info()
        if {"layerType", "runtimePrecision"} <= set(info.keys()):
            found.setdefault(info["layerType"].astype(str), set()).add(info["runtimePrecision"].astype(str))
    return found


PRODUCTS = ("FullyConnected", "MatMul")


def test_the_arithmetic_is_what_was_asked_for(pipeline: Pipeline, precision: Precision) -> None:
    """A plan opened without saying so runs in bf16 wherever the CPU has it."""
    found = {kind: types for kind, types in arithmetic(pipeline).items() if kind in PRODUCTS}
    assert found
    types = set().union(*found.values())
    if precision is Precision.FP32:
        assert types == {"f32"}
    elif precision is Precision.BF16:
        assert "bf16" in types
        assert types <= {"bf16", "f32"}
    else:
        assert types & {"i8", "u8"}
    hint = compiled_of(pipeline).get_property("INFERENCE_PRECISION_HINT")
    assert hint.to_string() == rest_of(precision)


def rest_of(precision: Precision) -> str:
    """The floating point of a plan, in OpenVINO's words.

    What int8 leaves over is bf16 where the CPU has it and no AMX; see `_arithmetic` of the builder.
    """
    has = "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if precision is Precision.FP32 or (precision.quantized and "amx_int8" in openvino_engine.cpu_features().split()):
        return "f32"
    return "bf16" if has else "f32"


def test_int8_leaves_adaln_embedders_and_the_final_layer_in_float(opened: Callable[[str], Pipeline]) -> None:
    kept, eight = set(), set()
    for node in compiled_of(opened("ov-int8")).get_runtime_model().get_ops():
        info = node.get_rt_info()
        if "layerType" in set(info.keys()) and info["layerType"].astype(str) in PRODUCTS:
            names = info["originalLayersNames"].astype(str)
            (eight if info["runtimePrecision"].astype(str) in ("i8", "u8") else kept).add(names)
    assert any("attn" in names for names in eight)
    assert any("mlp" in names for names in eight)
    for part in ("modulation", "embed", "final"):
        assert any(part in names for names in kept)
        assert not any(part in name for names in eight for name in names.split(",") if "MatMul" in name)


def test_a_plan_that_opens_in_another_arithmetic_is_an_error(
    openvino_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Careless:
        """Opens in the arithmetic that the library likes best."""

        def import_model(self, content: bytes, device: str, _properties: object) -> Any:
            return core().import_model(content, device, {"INFERENCE_PRECISION_HINT": liked})

    core, asked = ov.Core, "f32"
    liked = rest_of(Precision.BF16)
    if liked == "f32":
        asked = "bf16"
    monkeypatch.setattr(openvino_engine.ov, "Core", Careless)
    plan = plan_of(openvino_bundle)
    with pytest.raises(EngineError, match=f"opened {plan.path.name} in .*{liked}.*, not in .*{asked}"):
        openvino_engine.OpenVinoEngine(plan.path, {"INFERENCE_PRECISION_HINT": asked}, plan.graph)


def test_threads_and_hint_are_those_of_the_recipe(openvino_bundle: Bundle, opened: Callable[[str], Pipeline]) -> None:
    compiled = compiled_of(opened("ov-fp32"))
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 1
    assert "LATENCY" in str(compiled.get_property("PERFORMANCE_HINT")).upper()
    plan_set = set_of(openvino_bundle).model_copy(update={"options": {"threads": 0, "hint": "throughput"}})
    engines = LOADER.open_engines({"step": plan_of(openvino_bundle)}, plan_set_target(plan_set))
    with engines["step"] as engine:
        assert isinstance(engine, openvino_engine.OpenVinoEngine)
        compiled = engine._request.get_compiled_model()
        assert "THROUGHPUT" in str(compiled.get_property("PERFORMANCE_HINT")).upper()


@needs_fork
def test_workers_forked_after_loading_end(openvino_bundle: Bundle) -> None:
    assert said_by_workers(openvino_bundle.folder, "ov-fp32") == ["closes 0", "ends 0", "calls 0"]


# ---------------------------------------------------------------- what is refused when running


def test_wrong_inputs_are_told_in_words(
    openvino_bundle: Bundle, opened: Callable[[str], Pipeline], pool: Arrays
) -> None:
    engine, inputs = opened("ov-fp32").bank.slots[0].engine, rows_of(pool, 1, 2)
    with pytest.raises(EngineError, match=r"openvino failed: Can't set the input tensor .*1\.3\.8\.8"):
        engine({**inputs, "x": np.zeros((1, 3, 8, 8), np.float32)})
    without = {name: array for name, array in inputs.items() if name != "t"}
    with pytest.raises(EngineError, match="openvino takes latents, t, x, y, not latents, x, y"):
        engine(without)
    assert np.isfinite(to_host(engine(inputs)["velocity"])).all()


def test_a_file_that_is_no_plan_is_an_engine_error(model: ElitSiT, tmp_path: Path) -> None:
    (tmp_path / "step.blob").write_bytes(b"no plan")
    with pytest.raises(EngineError, match=r"openvino cannot open .*step\.blob: "):
        openvino_engine.OpenVinoEngine(
            tmp_path / "step.blob", {"INFERENCE_PRECISION_HINT": "f32"}, model.spec.graph(STEP)
        )


def test_a_plan_of_another_graph_is_refused_as_it_is_opened(openvino_bundle: Bundle) -> None:
    plan = replace(plan_of(openvino_bundle), graph=openvino_bundle.manifest.model.spec.graph(PROBE))
    with pytest.raises(
        BundleError, match=r"is not a plan of the graph `probe`: it takes x float32\[\?, 1, 8, 8\], .*; copy"
    ):
        LOADER.open_engines({"step": plan}, target("fp32"))


@pytest.mark.parametrize("start", range(0, 256, 32))
def test_a_damaged_plan_is_an_engine_error_or_opens(openvino_bundle: Bundle, tmp_path: Path, start: int) -> None:
    """What damage near the beginning makes of it, the library cannot always tell in words: UnicodeDecodeError."""
    plan = plan_of(openvino_bundle)
    content = bytearray(plan.path.read_bytes())
    content[start : start + 8] = b"\xff\xc3\x28\x80" * 2
    path = tmp_path / "step.blob"
    path.write_bytes(content)
    with suppress(EngineError, BundleError):
        LOADER.open_engines({"step": replace(plan, path=path)}, target("fp32"))["step"].close()
    path.write_bytes(content[: len(content) * start // 256])
    with pytest.raises(EngineError, match=r"openvino cannot open .*; build it again"):
        LOADER.open_engines({"step": replace(plan, path=path)}, target("fp32"))


def test_a_plan_of_another_cpu_is_refused_with_the_command(
    openvino_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = openvino_engine.cpu_features()
    monkeypatch.setattr(openvino_engine, "cpu_features", lambda: f"{here} avx1024")
    told = (
        r"^target ov-fp32: these plans cannot run here: built on a CPU with other features "
        r"\(they differ in avx1024\): "
        r"build it again here: elit-export build RECIPE --target TARGET --out BUNDLE"
    )
    with pytest.raises(BundleError, match=told):
        Pipeline.load(openvino_bundle.folder, target="ov-fp32")
    assert incompatibility(set_of(openvino_bundle))


def test_a_plan_of_another_version_is_refused_with_both_ways_out(openvino_bundle: Bundle) -> None:
    plan_set = set_of(openvino_bundle)

    def older(plan: Any) -> Any:
        return plan.model_copy(update={"versions": {**plan.versions, "openvino": "2025.1.0-1-abc"}})

    profiles = tuple(facts.model_copy(update={"plan": older(facts.plan)}) for facts in plan_set.profiles)
    told = incompatibility(plan_set.model_copy(update={"profiles": profiles}))
    assert told.startswith(f"built with openvino 2025.1.0-1-abc, installed is {ov.__version__}: ")
    assert "pip install 'openvino==2025.1.0' or build it again here: elit-export build RECIPE" in told


@pytest.mark.parametrize(
    "options",
    [
        {"threads": 10**6, "hint": "latency"},
        {"threads": "2", "hint": "latency"},
        {"threads": 0, "hint": 3},
    ],
    ids=str,
)
def test_options_that_no_build_writes_are_refused(openvino_bundle: Bundle, options: dict[str, Any]) -> None:
    plan_set = set_of(openvino_bundle).model_copy(update={"options": options})
    with pytest.raises(
        BundleError, match=r"^target ov-fp32: its options cannot be: .*(threads|hint): .*build it again: elit"
    ):
        open_fused(openvino_bundle, plan_set)


def test_a_plan_of_an_arithmetic_that_no_build_writes_is_refused(openvino_bundle: Bundle) -> None:
    plan = replace(plan_of(openvino_bundle), built_on={**plan_of(openvino_bundle).built_on, "arithmetic": "f8"})
    with pytest.raises(BundleError, match=r"its arithmetic 'f8' is unknown; build it again here: elit-export build"):
        LOADER.open_engines({"step": plan}, target("fp32"))


def test_a_cpu_plugin_that_is_missing_is_told(openvino_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    class Bare:
        available_devices = ("GPU",)

    monkeypatch.setattr(openvino_engine.ov, "Core", Bare)
    problem, remedy = LOADER.device_problem("cpu")
    assert problem == "this openvino has no CPU plugin"
    assert remedy.startswith("pip install ")
    assert incompatibility(set_of(openvino_bundle)) == problem


# ---------------------------------------------------------------- what is refused when building


def target(precision: str) -> Any:
    return target_of("openvino", "cpu", precision, {})


def test_missing_libraries_are_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(builder, "find_spec", lambda _name: None)
        patch.setattr(builder, "_capabilities", lambda: ["INT8"])
        with pytest.raises(BackendUnavailable, match=r"int8: openvino needs nncf .*pip install -e '.*\[openvino"):
            BUILDER.check(target("int8"))
        BUILDER.check(target("fp32"))
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(BackendUnavailable, match=r"backend openvino needs openvino; pip install -e '.*\[openv"):
        BACKENDS["openvino"].builder()


def test_nncf_that_is_broken_or_fails_is_told_in_words(
    monkeypatch: pytest.MonkeyPatch, openvino_bundle: Bundle, tiny_samples: Path, tmp_path: Path
) -> None:
    import nncf

    def failing(*_: object, **__: object) -> None:
        raise nncf.ValidationError("no such layer")

    model = openvino_bundle.manifest.model
    samples = load_inputs(tiny_samples, model.spec, model.checkpoint_sha256)
    path = openvino_bundle.verified(openvino_bundle.manifest.graphs["step-fp32"].artifact) / "step.onnx"
    graph = GraphFile(path, model.spec.graph(STEP))
    profiles = [Profile("all", Range(1, 1, 4), Range(1, 1, 4))]

    def build() -> None:
        BUILDER.build_plan(graph, tmp_path, profiles, target("int8"), samples, lambda _share: None)

    monkeypatch.setattr(nncf, "quantize", failing)
    with pytest.raises(BuildError, match=r"nncf cannot quantize the graph: no such layer; pip install -U -e '"):
        build()
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(BackendUnavailable, match=r"nncf is installed but broken, .*pip install --force-reinstall -e '"):
        build()
    assert not list(tmp_path.iterdir())


def test_nncf_reports_nothing_to_anyone() -> None:
    """In a process of its own, as it knows pytest and is silent there."""
    script = (
        "import os; from elit_export.backends.openvino.build import _nncf; _nncf()\n"
        "from nncf.telemetry.wrapper import NNCFTelemetry, telemetry\n"
        "print(isinstance(telemetry, NNCFTelemetry), 'NNCF_CI' in os.environ)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize(("precision", "missing"), [("bf16", "BF16"), ("int8", "INT8")])
def test_a_cpu_without_the_arithmetic_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    missing: str,
    tiny_checkpoint: Path,
    tiny_samples: Path,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(builder, "_capabilities", lambda: ["FP32"])
    recipe = openvino_recipe(tiny_checkpoint)
    samples = tiny_samples if precision == "int8" else None
    with pytest.raises(BackendUnavailable, match=f"this CPU has no {missing} .*build a target with precision fp32"):
        compile_bundle(recipe, f"ov-{precision}", out=tmp_path / "bundle", samples=samples)
    assert not list(tmp_path.iterdir())


def test_a_graph_that_is_none_is_a_build_error(model: ElitSiT, tmp_path: Path) -> None:
    (tmp_path / "step.onnx").write_bytes(b"no graph")
    graph = GraphFile(tmp_path / "step.onnx", model.spec.graph(STEP))
    profiles = [Profile("all", Range(1, 1, 1), Range(1, 1, 1))]
    with pytest.raises(BuildError, match=r"openvino cannot build step\.onnx: \S") as caught:
        BUILDER.build_plan(graph, tmp_path, profiles, target("fp32"), None, lambda _share: None)
    assert "Exception from" not in str(caught.value)


def test_plans_say_on_what_they_were_built(openvino_bundle: Bundle) -> None:
    for plan_set in openvino_bundle.manifest.plan_sets[1:]:
        for name, plan in {**plan_set.cache, "step": plan_set.profiles[0].plan}.items():
            exact = name != "step" or plan_set.precision is Precision.FP32
            assert plan.built_on["arithmetic"] == ("f32" if exact else rest_of(plan_set.precision))
            assert plan.built_on["cpu_features"] == openvino_engine.cpu_features()
            assert ("nncf" in plan.versions) is (name == "step" and plan_set.precision is Precision.INT8)
    assert set_of(openvino_bundle).fused
    assert FUSED in set_of(openvino_bundle).fused.artifact.name  # type: ignore[union-attr]


# ---------------------------------------------------------------- bisecting


def test_bisecting_refuses_plans_that_do_not_show_their_nodes(openvino_bundle: Bundle) -> None:
    with pytest.raises(InputError, match=r"plans of openvino do not show .*build a target of onnxruntime into"):
        bisect(openvino_bundle, set_of(openvino_bundle), case=0)
    quantized = set_of(openvino_bundle).model_copy(update={"precision": Precision.INT8})
    with pytest.raises(InputError, match=r"int8 departs at every product.*elit-export calibrate sensitivity"):
        bisect(openvino_bundle, quantized, case=0)

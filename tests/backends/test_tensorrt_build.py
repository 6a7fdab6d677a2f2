"""Plans of TensorRT for RTX, which are built here without a GPU; no plan is run."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from click.testing import CliRunner, Result
from onnx import TensorProto, helper

from elit_export import Pipeline, compile_bundle
from elit_export.arrays import Arrays
from elit_export.backends import BACKENDS
from elit_export.backends.protocols import BuiltPlan, GraphFile
from elit_export.backends.tensorrt import cuda as cuda_layer
from elit_export.backends.tensorrt.options import FLAVOURS, TensorRTTarget
from elit_export.bundle.manifest import Plan, PlanSet
from elit_export.bundle.reading import Bundle
from elit_export.bundle.recipe import Recipe, recipe_from_values, shipped_recipe
from elit_export.bundle.store import STAGING
from elit_export.cli import main
from elit_export.compiler import job, stages
from elit_export.compiler.build import NOTHING_CHANGED
from elit_export.errors import BackendUnavailable, BuildError, BundleError, RecipeError
from elit_export.graphs import formats
from elit_export.graphs.export import export_graph
from elit_export.models.registry import named_spec
from elit_export.models.sit import ElitSiT
from elit_export.spec import CACHE_GRAPHS, SD_VAE, STEP, Precision, Profile, Range, default_profiles
from elit_export.verify.reference import reference_arrays
from tests.conftest import recipe_values

trt = pytest.importorskip("tensorrt_rtx")
from elit_export.backends.tensorrt import build as tensorrt  # noqa: E402 - of no use without the library

RTX: dict[str, Any] = {"backend": "tensorrt-rtx", "precision": "fp32", "compute_capabilities": ["8.9"]}
BUILDER = BACKENDS["tensorrt-rtx"].builder()
NO_DRIVER = BACKENDS["tensorrt-rtx"].loader().device_problem("cuda")[0]
# What a build says of how far it is before the library reports anything.
STARTS = {
    *(job.CHECKPOINT, stages.REFERENCE, stages.GRAPH),
    *(stages.QUANTIZE, stages.PLANS, stages.VERIFY),
}
needs_no_gpu = pytest.mark.skipif(not NO_DRIVER, reason="this machine has a GPU")
# Beside `cpu` and `rtx` of the shipped recipe.
MORE_TARGETS: dict[str, dict[str, Any]] = {
    "shared": RTX | {"precision": "fp16", "compute_capabilities": ["12.0"], "layout": "multi-profile"},
    "exact": RTX | {"layout": "multi-profile"},
}
# The target `exact` has profiles of its own.
FEW_PROFILES: dict[str, Any] = {
    "rows": {"min": 1, "opt": 2, "max": 2},
    "profiles": [
        {"name": "many", "latents": {"min": 8, "opt": 16, "max": 16}},
        {"name": "few", "latents": {"min": 1, "opt": 4, "max": 7}},
    ],
}
DEFAULT_PROFILES = ["full", "half", "quarter", "sixteenth"]
PROFILES = {"cpu": DEFAULT_PROFILES, "rtx": DEFAULT_PROFILES, "shared": DEFAULT_PROFILES, "exact": ["many", "few"]}
BUILD_CACHE = [f"build {graph}" for graph in CACHE_GRAPHS]
BUILD_SHARED = f"build step, {', '.join(DEFAULT_PROFILES)}"


def target(**changes: Any) -> TensorRTTarget:
    return TensorRTTarget.model_validate(RTX | {"precision": Precision.FP32} | changes)


def fashion_recipe(name: str) -> Recipe:
    """The shipped recipe with more targets, and other profiles for one of them."""
    values = tomllib.loads(shipped_recipe().read_text(encoding="utf-8"))
    profiles = FEW_PROFILES if name == "exact" else {}
    return recipe_from_values(values | {"targets": values["targets"] | MORE_TARGETS} | profiles, "test")


def contents(folder: Path) -> dict[str, int]:
    """Every file of a bundle with its time of change, but for the lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".build.lock")
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in files}


def plan_sets(folder: Path) -> dict[str, PlanSet]:
    return {plan_set.target: plan_set for plan_set in Bundle.open(folder).manifest.plan_sets}


def linked(folder: Path, to: Path) -> Path:
    """A copy that takes no room: a build never writes into a file that is there."""
    return Path(shutil.copytree(folder, to))


def stages_of(recipe: Recipe, name: str, folder: Path) -> list[str]:
    """The stages of a build, each once, without what a GPU would add."""
    stages: list[str] = []
    compile_bundle(recipe, name, out=folder, progress=lambda stage, _: stages.append(stage))
    return list(dict.fromkeys(stage for stage in stages if not stage.startswith("verif")))


def step_plans(plan_set: PlanSet) -> list[Plan]:
    """Each plan of the profiles once."""
    return list({facts.plan.artifact.name: facts.plan for facts in plan_set.profiles}.values())


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


# ---------------------------------------------------------------- the shipped model for three targets


@dataclass
class Built:
    """A bundle of several targets, and what building it did."""

    folder: Path
    exported: list[str] = field(default_factory=list)
    asked_pytorch: int = 0
    progress: dict[str, list[tuple[str, float]]] = field(default_factory=dict)

    @property
    def plan_sets(self) -> dict[str, PlanSet]:
        return plan_sets(self.folder)

    def build(self, name: str) -> None:
        said = self.progress.setdefault(name, [])
        compile_bundle(fashion_recipe(name), name, out=self.folder, progress=lambda *pair: said.append(pair))


@pytest.fixture(scope="module")
def built(fashion_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The shipped model for ONNX Runtime and three TensorRT targets. Do not change it: copy it first."""
    made = Built(linked(fashion_bundle.folder, tmp_path_factory.mktemp("rtx") / "bundle"))

    export = formats.export_graph

    def export_graph(model: ElitSiT, name: str, folder: Path, precision: Precision) -> Path:
        made.exported.append(f"{name}-{precision}")
        return export(model, name, folder, precision)

    def ask(*question: Any) -> Arrays:
        made.asked_pytorch += 1
        return reference_arrays(*question)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "export_graph", export_graph)
        patch.setattr(stages, "reference_arrays", ask)
        for name in ("rtx", *MORE_TARGETS):
            made.build(name)
    return made


def test_targets_lie_in_one_bundle(built: Built) -> None:
    found = {name: (plan_set.backend, plan_set.precision.value) for name, plan_set in built.plan_sets.items()}
    assert found == {
        "cpu": ("onnxruntime", "fp32"),
        "rtx": ("tensorrt-rtx", "bf16"),
        "shared": ("tensorrt-rtx", "fp16"),
        "exact": ("tensorrt-rtx", "fp32"),
    }
    opened = Bundle.open(built.folder)
    for artifact in opened.manifest.artifacts():
        opened.verified(artifact)


def test_the_graph_of_each_precision_is_exported_once(built: Built) -> None:
    """Those of fp32 were there, and those of the cache have no other."""
    assert built.exported == ["step-bf16", "step-fp16"]
    graphs = {"step-fp32", *(f"{graph}-fp32" for graph in CACHE_GRAPHS), *built.exported}
    assert set(Bundle.open(built.folder).manifest.graphs) == graphs
    assert {name: plan_set.graph for name, plan_set in built.plan_sets.items()} == {
        "cpu": "step-fp32",
        "rtx": "step-bf16",
        "shared": "step-fp16",
        "exact": "step-fp32",
    }


def test_pytorch_answers_once_for_all_targets_with_the_same_profiles(built: Built) -> None:
    """It did for those of the target that was there."""
    assert built.asked_pytorch == 1
    names = {name: plan_set.reference.artifact.name for name, plan_set in built.plan_sets.items()}
    assert names["cpu"] == names["rtx"] == names["shared"] != names["exact"]


def test_layouts_are_a_plan_for_each_profile_or_one_for_all(built: Built) -> None:
    counts = {name: len(step_plans(plan_set)) for name, plan_set in built.plan_sets.items()}
    assert counts == {"cpu": 1, "rtx": 4, "shared": 1, "exact": 1}
    for name, plan_set in built.plan_sets.items():
        assert [facts.name for facts in plan_set.profiles] == PROFILES[name]
        assert set(plan_set.cache) == set(CACHE_GRAPHS)


def test_one_plan_for_all_profiles_is_smaller_than_one_each(built: Built) -> None:
    """Their weights are of one size. Measured 48 MB against 75 MB: 0.64."""
    shared, each = (
        sum(plan.artifact.size_bytes for plan in step_plans(built.plan_sets[name])) for name in ("shared", "rtx")
    )
    assert 0.3 < shared / each < 0.8


def test_plan_names_tell_graph_profile_precision_library_and_gpu(built: Built) -> None:
    library = rf"tensorrt-rtx{re.escape(trt.__version__)}"
    wanted = {
        "rtx": [f"step-rtx-bf16-{profile}-{library}-sm89-sm120" for profile in PROFILES["rtx"]]
        + [f"{graph}-rtx-fp32-{graph}-{library}-sm89-sm120" for graph in CACHE_GRAPHS],
        "shared": [f"step-shared-fp16-full-half-quarter-sixteenth-{library}-sm120"]
        + [f"{graph}-shared-fp32-{graph}-{library}-sm120" for graph in CACHE_GRAPHS],
        "exact": [f"step-exact-fp32-many-few-{library}-sm89"]
        + [f"{graph}-exact-fp32-{graph}-{library}-sm89" for graph in CACHE_GRAPHS],
    }
    for name, patterns in wanted.items():
        for pattern, plan in zip(patterns, built.plan_sets[name].plans, strict=True):
            assert re.fullmatch(rf"{pattern}-[0-9a-f]{{12}}", plan.artifact.name)


def test_plans_say_what_built_them(built: Built) -> None:
    for name in ("rtx", "shared", "exact"):
        for plan in built.plan_sets[name].plans:
            assert plan.versions == {"tensorrt-rtx": trt.__version__}
            assert set(plan.artifact.files) == {plan.file}


@needs_no_gpu
def test_parity_says_why_it_was_not_run(built: Built) -> None:
    for name, plan_set in built.plan_sets.items():
        for facts in plan_set.profiles:
            if name == "cpu":
                assert facts.parity.status == "passed"
            else:
                assert (facts.parity.status, NO_DRIVER in facts.parity.reason) == ("not run", True)


def test_progress_names_plans_and_never_goes_back(built: Built) -> None:
    for name, said in built.progress.items():
        shares = [share for _, share in said]
        assert shares == sorted(shares)
        builds = [(stage, share) for stage, share in said if stage.startswith("build ")]
        assert builds[0][1] == stages.PLANS
        assert builds[-1][1] == pytest.approx(stages.VERIFY)
        groups = PROFILES[name] if name == "rtx" else [", ".join(PROFILES[name])]
        steps = [f"build step, {group}" for group in groups]
        assert list(dict.fromkeys(stage for stage, _ in builds)) == [*steps, *BUILD_CACHE]
        assert min(Counter(stage for stage, _ in builds).values()) > 3


def test_building_again_does_nothing(built: Built) -> None:
    before = contents(built.folder)
    for name in ("cpu", "rtx", *MORE_TARGETS):
        assert stages_of(fashion_recipe(name), name, built.folder) == [NOTHING_CHANGED]
    assert contents(built.folder) == before


# ---------------------------------------------------------------- running what was built


@needs_no_gpu
def test_without_a_target_what_can_run_here_is_chosen(built: Built) -> None:
    with Pipeline.load(built.folder) as pipeline:
        made = pipeline.sample([0, 7], steps=2, sampler="euler", schedule="0-0:quarter,1-1:full")
    assert made.images.shape == (2, 32, 32, 1)
    assert pipeline.bank.precision is Precision.FP32


@needs_no_gpu
@pytest.mark.parametrize("name", ["rtx", "shared", "exact"])
def test_a_target_that_never_ran_needs_consent_and_its_device(built: Built, name: str) -> None:
    told = rf"target {name} was never compared with PyTorch \(.*{re.escape(NO_DRIVER)}.*allow_unverified=True"
    with pytest.raises(BundleError, match=told):
        Pipeline.load(built.folder, target=name)
    with pytest.raises(
        BackendUnavailable, match=rf"^target {name}: these plans cannot run here: {re.escape(NO_DRIVER)}.*driver"
    ):
        Pipeline.load(built.folder, target=name, allow_unverified=True)


def test_inspect_shows_every_target(built: Built) -> None:
    result = run("inspect", built.folder, "--json", "-")
    assert result.exit_code == 0, result.output
    facts = {plan_set["target"]: plan_set for plan_set in json.loads(result.stdout)["plan_sets"]}
    assert {name: len(facts[name]["plans"]) for name in facts} == {"cpu": 4, "rtx": 7, "shared": 4, "exact": 4}
    assert facts["rtx"]["options"]["compute_capabilities"] == ["8.9", "12.0"]
    assert facts["shared"]["options"]["layout"] == "multi-profile"
    said = " ".join(run("inspect", built.folder).output.split())
    assert f"built with tensorrt-rtx {trt.__version__}" in said


@needs_no_gpu
@pytest.mark.parametrize("options", [(), ("--bisect",)])
def test_verify_says_what_is_missing(built: Built, options: tuple[str, ...]) -> None:
    before = contents(built.folder)
    result = run("verify", built.folder, "--target", "rtx", *options)
    assert result.exit_code == 2, result.output
    assert f"error: target rtx: these plans cannot run here: {NO_DRIVER}" in " ".join(result.output.split())
    assert "Traceback" not in result.output
    assert contents(built.folder) == before


# ---------------------------------------------------------------- what a later build does again


@pytest.fixture(scope="module")
def small(tiny_bundle: Bundle, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model for ONNX Runtime and TensorRT, a plan for each of three profiles. Do not change it."""
    folder = Path(shutil.copytree(tiny_bundle.folder, tmp_path_factory.mktemp("small") / "bundle"))
    compile_bundle(tiny_recipe(tiny_checkpoint), "rtx", out=folder)
    return folder


@pytest.fixture
def copied(small: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small, tmp_path / "copied"))


def tiny_recipe(checkpoint: Path, cpu: Mapping[str, Any] = {}, profiles: Sequence[Any] = (), **rtx: Any) -> Recipe:
    values: Any = recipe_values(checkpoint)
    targets = {"cpu": values["targets"]["cpu"] | cpu, "rtx": RTX | rtx}
    return recipe_from_values(values | {"targets": targets, "profiles": profiles}, "test")


def test_a_changed_profile_builds_its_plan_alone(copied: Path, tiny_checkpoint: Path) -> None:
    before = plan_sets(copied)
    profiles = [
        {"name": name, "latents": {"min": low, "opt": best, "max": high}}
        for name, low, best, high in (("full", 4, 4, 4), ("half", 2, 3, 3), ("quarter", 1, 1, 1))
    ]
    stages = stages_of(tiny_recipe(tiny_checkpoint, profiles=profiles), "rtx", copied)
    assert stages == ["read checkpoint", "PyTorch reference", "build step, half"]
    after = plan_sets(copied)
    same = [old == new for old, new in zip(before["rtx"].plans, after["rtx"].plans, strict=True)]
    assert same == [True, False, True, True, True, True]
    assert after["cpu"] == before["cpu"]
    assert not (copied / "plans" / before["rtx"].plans[1].artifact.name).exists()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Building takes no time; gives what each plan found in the timing cache, to which it added an x."""
    found: list[str] = []

    def build_plan(
        _self: object, _graph: GraphFile, folder: Path, profiles: Sequence[Profile], *_: object
    ) -> BuiltPlan:
        cache = folder.parent / tensorrt.TIMING_CACHE
        found.append(cache.read_text() if cache.exists() else "")
        cache.write_text(f"{found[-1]}x")
        (folder / "step.plan").write_text(str((folder.name, profiles)))
        return BuiltPlan("step.plan", "quick", {"tensorrt-rtx": "0"}, {})

    monkeypatch.setattr(tensorrt.TensorRTBuilder, "build_plan", build_plan)
    return found


@pytest.mark.usefixtures("quick")
def test_another_layout_replaces_the_plans_of_its_target(copied: Path, tiny_checkpoint: Path) -> None:
    before = plan_sets(copied)
    stages = stages_of(tiny_recipe(tiny_checkpoint, layout="multi-profile"), "rtx", copied)
    assert stages == ["build step, full, half, quarter", *BUILD_CACHE]
    after = plan_sets(copied)
    assert [len(step_plans(before["rtx"])), len(step_plans(after["rtx"]))] == [3, 1]
    assert after["cpu"] == before["cpu"]
    assert {path.name for path in (copied / "plans").iterdir()} == {
        plan.artifact.name for plan_set in after.values() for plan in plan_set.plans
    }


def test_plans_of_a_target_share_a_timing_cache(copied: Path, tiny_checkpoint: Path, quick: list[str]) -> None:
    """It does not become part of the bundle."""
    compile_bundle(tiny_recipe(tiny_checkpoint, detailed_inspection=True), "rtx", out=copied)
    assert quick == ["", "x", "xx", "xxx", "xxxx", "xxxxx"]
    assert not list(copied.rglob(tensorrt.TIMING_CACHE))


def test_a_change_of_another_target_leaves_this_one(copied: Path, tiny_checkpoint: Path) -> None:
    before = plan_sets(copied)
    recipe = tiny_recipe(tiny_checkpoint, cpu={"threads": 1})
    assert stages_of(recipe, "rtx", copied) == [NOTHING_CHANGED]
    assert stages_of(recipe, "cpu", copied) == ["build step, full, half, quarter", *BUILD_CACHE]
    after = plan_sets(copied)
    assert after["rtx"] == before["rtx"]
    assert after["cpu"].options != before["cpu"].options


# ---------------------------------------------------------------- refused before anything is built


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"compute_capabilities": ["9.9"]},
            r"compute capability 9\.9: tensorrt-rtx .* builds for 7\.5, .*12\.0, 12\.1;",
        ),
        ({"compute_capabilities": ["8.9", "9.0"]}, r"capability 9\.0: .*use backend = 'tensorrt' on the GPU itself"),
        ({"timing_cache": True}, r"tensorrt-rtx tunes on the device that runs the plan; leave timing_cache out"),
        ({"compatibility": "hardware"}, r"no compatibility = 'hardware'; leave it out, and name every GPU"),
        ({"compatibility": "version"}, r"no compatibility = 'version'; leave it out"),
        (
            {"precision": Precision.BF16, "compute_capabilities": ["8.6", "7.5"]},
            r"capability 7\.5 has no bf16 arithmetic; give it a target with fp16",
        ),
        (
            {"precision": Precision.FP8, "compute_capabilities": ["8.9", "8.6"]},
            r"capability 8\.6 has no fp8 arithmetic; give it a target with fp16",
        ),
    ],
)
def test_what_tensorrt_for_rtx_cannot_build_for_is_refused_at_once(
    tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(BuildError, match=told):
        BUILDER.check(target(**changes))
    recipe = tiny_recipe(tmp_path / "is_not_even_read.safetensors", **changes)
    with pytest.raises(BuildError, match=told):
        compile_bundle(recipe, "rtx", out=tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_every_gpu_that_the_library_knows_is_taken() -> None:
    known = [name for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
    assert "SM120" in known
    capabilities = [f"{name[2:-1]}.{name[-1]}" for name in known]
    BUILDER.check(target(compute_capabilities=capabilities, precision=Precision.FP16))


def test_an_old_library_says_how_to_get_a_newer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FLAVOURS, "tensorrt-rtx", replace(FLAVOURS["tensorrt-rtx"], oldest=(99, 1)))
    with pytest.raises(BackendUnavailable, match=r"is too old; pip install -U 'tensorrt-rtx>=99\.1'"):
        BUILDER.check(target())


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed")
def test_a_missing_library_names_the_extra(tiny_checkpoint: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tiny_checkpoint, backend="tensorrt")
    with pytest.raises(BackendUnavailable, match=r"needs tensorrt; pip install -e '.*\[tensorrt\]'"):
        compile_bundle(recipe, "rtx", out=tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_tensorrt_builds_only_for_the_gpu_that_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    here = SimpleNamespace(compute_capability=lambda: "9.0")
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10.14.1"))  # type: ignore[arg-type]
    monkeypatch.setattr(cuda_layer, "Cuda", lambda: here)
    monkeypatch.setattr(cuda_layer, "device_problem", lambda: ("", ""))
    BUILDER.check(target(backend="tensorrt", compute_capabilities=["9.0"], timing_cache=True, compatibility="both"))
    for others in (["8.9"], ["9.0", "8.9"]):
        with pytest.raises(BuildError, match=r"this machine, compute capability 9\.0, and the target names .*8\.9"):
            BUILDER.check(target(backend="tensorrt", compute_capabilities=others))
    monkeypatch.setattr(cuda_layer, "device_problem", lambda: ("no NVIDIA GPU is visible", "see nvidia-smi"))
    with pytest.raises(BackendUnavailable, match="builds for; no NVIDIA GPU is visible; see nvidia-smi"):
        BUILDER.check(target(backend="tensorrt", compute_capabilities=["9.0"]))


@pytest.mark.parametrize(
    ("low", "best", "high", "told"),
    [(3, 2, 4, r"profiles\.0\.latents: range 3\.\.2\.\.4"), (1, 2, 5, r"latents\.max is 5, but the model has 4")],
)
def test_profiles_that_cannot_be_are_refused(
    copied: Path, tiny_checkpoint: Path, low: int, best: int, high: int, told: str
) -> None:
    before = contents(copied)
    profiles = [{"name": "odd", "latents": {"min": low, "opt": best, "max": high}}]
    with pytest.raises(RecipeError, match=told):
        compile_bundle(tiny_recipe(tiny_checkpoint, profiles=profiles), "rtx", out=copied)
    assert contents(copied) == before


# ---------------------------------------------------------------- one plan


Share = Callable[[float], None]


@dataclass(frozen=True)
class Bench:
    """Builds single plans of a small graph."""

    graph: GraphFile
    folder: Path

    def build(
        self, graph: Path | None = None, progress: Share = lambda _: None, count: int = 1, **changes: Any
    ) -> BuiltPlan:
        profiles = default_profiles(4, Range(1, 2, 8))[:count]
        file = replace(self.graph, path=graph or self.graph.path)
        return BUILDER.build_plan(file, self.folder, profiles, target(**changes), None, progress)

    def refused(self, graph: Path | None = None, error: type[BaseException] = BuildError, **options: Any) -> str:
        """What is said of a build that fails and leaves nothing."""
        with pytest.raises(error) as caught:
            self.build(graph, **options)
        assert list(self.folder.iterdir()) == []
        return str(caught.value)


@pytest.fixture
def bench(small: Path, tmp_path: Path) -> Bench:
    manifest = Bundle.open(small).manifest
    graph = manifest.graphs["step-fp32"]
    (tmp_path / "built").mkdir()
    file = GraphFile(small / "graphs" / graph.artifact.name / graph.file, manifest.model.spec.graph(STEP))
    return Bench(file, tmp_path / "built")


def test_a_plan_is_one_file_and_its_progress_ends_at_one(bench: Bench) -> None:
    shares: list[float] = []
    plan = bench.build(progress=shares.append, count=2)
    assert plan.label == f"full-half-tensorrt-rtx{trt.__version__}-sm89"
    assert [path.name for path in bench.folder.iterdir()] == [plan.file]
    assert shares == sorted(set(shares))
    assert 0 < shares[0] < shares[-1] == 1.0


def test_the_library_speaks_through_logging_alone(
    bench: Bench, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """What it warns of is about the network made here, so a person does not see it unless they ask."""
    with caplog.at_level(logging.INFO, logger="elit_export"):
        bench.build()
    assert "Make sure input y has Int64 binding" in caplog.text
    assert {record.name for record in caplog.records} == {"elit_export.backends.tensorrt.build"}
    assert {record.levelno for record in caplog.records} == {logging.INFO}
    assert tuple(capfd.readouterr()) == ("", "")


def test_too_little_workspace_is_named(bench: Bench) -> None:
    said = bench.refused(workspace_mb=1)
    assert re.search(r"cannot build full: .*workspace.* \(workspace_mb = 1 may be too little\)$", said)


def test_native_attention_has_no_fp32_kernel(bench: Bench, fashion_graphs: dict[Precision, Path]) -> None:
    """Here it would take a while until the library says so, and not in these words."""
    said = bench.refused(fashion_graphs[Precision.BF16])
    assert said == "step.onnx: native attention has no fp32 kernel; export with precision = 'fp32'"


def one_node(folder: Path, node: onnx.NodeProto) -> Path:
    x, velocity = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", 2]) for name in ("x", "velocity"))
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("my.own", 1)]
    graph = helper.make_graph([node], "step", [x], [velocity])
    onnx.save(helper.make_model(graph, opset_imports=opsets), folder / "odd.onnx")
    return folder / "odd.onnx"


@pytest.mark.parametrize("domain", ["my.own", ""])
def test_an_operator_that_the_library_does_not_know_is_named(bench: Bench, tmp_path: Path, domain: str) -> None:
    node = helper.make_node("Strange", ["x"], ["velocity"], name="core.3.attn/Strange_7", domain=domain)
    said = bench.refused(one_node(tmp_path, node))
    assert said.startswith("tensorrt_rtx cannot read odd.onnx: Strange core.3.attn/Strange_7: ")


def test_each_failure_says_its_own_reason_alone(bench: Bench, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Though the library wants one logger for all that lives, and an error keeps its builder alive."""
    (tmp_path / "empty.onnx").write_bytes(b"")
    with caplog.at_level(logging.INFO, logger="elit_export"):
        with pytest.raises(BuildError, match="at least one output") as first:
            bench.build(tmp_path / "empty.onnx")
        with pytest.raises(BuildError, match="within workspace limit") as second:
            bench.build(workspace_mb=1)
    assert "one output" not in str(second.value)
    assert "differs from one already registered" not in caplog.text
    assert first.traceback


def damaged(graph: Path, folder: Path, how: str) -> Path:
    shutil.copytree(graph.parent, folder)
    path, weights = folder / graph.name, folder / f"{graph.name}.data"
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    elif how == "no graph":
        path.write_bytes(b"no graph at all")
    elif how == "missing":
        path.unlink()
    elif how == "short weights":
        weights.write_bytes(weights.read_bytes()[:100])
    else:
        weights.unlink()
    return path


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("truncated", "Failed to parse the ONNX model"),
        ("no graph", "Failed to parse the ONNX model"),
        ("missing", "cannot be found"),
        ("short weights", "Failed to import initializer"),
        ("no weights", "Failed to import initializer"),
    ],
)
def test_a_damaged_graph_is_refused(bench: Bench, tmp_path: Path, how: str, told: str) -> None:
    said = bench.refused(damaged(bench.graph.path, tmp_path / "damaged", how))
    assert re.match(rf"tensorrt_rtx cannot read step\.onnx: \S.*{told}", said)


def test_a_timing_cache_goes_on_from_what_is_there(tmp_path: Path) -> None:
    class Config:
        given: bytes

        def create_timing_cache(self, content: bytes) -> bytes:
            self.given = content
            return content

        def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> None:
            assert not ignore_mismatch

    config = Config()
    assert (tensorrt._timing_cache(config, tmp_path / "t"), config.given) == (b"", b"")
    (tmp_path / "t").write_bytes(b"timings")
    assert (tensorrt._timing_cache(config, tmp_path / "t"), config.given) == (b"timings", b"timings")


# ---------------------------------------------------------------- interrupted


class Stop:
    """A listener that raises once the library itself reports."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    def __call__(self, *said: Any) -> None:
        if said[-1] not in STARTS:
            raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_what_a_listener_raises_ends_the_build(bench: Bench, error: type[BaseException]) -> None:
    bench.refused(error=error, progress=Stop(error), count=3)
    bench.build()  # nothing of it is left in the library


def test_an_interrupted_build_leaves_the_old_bundle(copied: Path, tiny_checkpoint: Path) -> None:
    before = contents(copied)
    with pytest.raises(KeyboardInterrupt):
        compile_bundle(
            tiny_recipe(tiny_checkpoint, optimization_level=1), "rtx", out=copied, progress=Stop(KeyboardInterrupt)
        )
    assert contents(copied) == before
    assert not (copied / STAGING).exists()
    Pipeline.load(copied, target="cpu").close()


def test_a_failed_build_leaves_the_old_bundle(copied: Path, tiny_checkpoint: Path) -> None:
    before = contents(copied)
    with pytest.raises(BuildError, match="workspace_mb = 1"):
        compile_bundle(tiny_recipe(tiny_checkpoint, workspace_mb=1), "rtx", out=copied)
    assert contents(copied) == before


# The `build` command, telling each stage in a line of its own.
TELLING_BUILD = """
import sys
from elit_export.cli import build, main
tell = lambda stage, share: print(f"{stage}: {share}", flush=True)
build.build_progress = lambda _: tell
main(["build", *sys.argv[1:]])
"""


def test_ctrl_c_ends_the_command_within_one_profile(built: Built, tmp_path: Path) -> None:
    """The library spends nearly all of its time in one of its six steps."""
    folder = linked(built.folder, tmp_path / "bundle")
    before = contents(folder)
    recipe = tmp_path / "r.toml"
    shared = 'backend = "tensorrt-rtx"\nprecision = "fp16"\ncompute_capabilities = ["12.0"]\nlayout = "multi-profile"'
    recipe.write_text(f"{shipped_recipe().read_text()}\n[targets.shared]\n{shared}\noptimization_level = 1\n")
    command = [sys.executable, "-c", TELLING_BUILD, recipe, "--target", "shared", "--out", folder]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout
        assert child.stderr
        stages = []
        for line in child.stdout:
            stages.append(line.rpartition(": ")[0])
            if len(stages) == 5:  # the first is said before the library begins
                child.send_signal(signal.SIGINT)
                break
        rest, said = child.stdout.read(), child.stderr.read()
    assert child.returncode == 130, said
    assert set(stages) == {BUILD_SHARED}
    assert "verify" not in rest
    assert " ".join(said.split()) == "interrupted; nothing half-written was left behind"
    assert contents(folder) == before
    assert not (folder / STAGING).exists()
    Pipeline.load(folder, target="cpu").close()


# ---------------------------------------------------------------- a model of real size


def test_a_plan_of_s2_serves_every_profile(tmp_path: Path) -> None:
    """33 M parameters, 256 tokens, 12 blocks; one plan in bf16 for two GPUs with all four profiles in it."""
    spec = named_spec("ELIT-SiT-S/2")
    model = ElitSiT(spec, SD_VAE)
    for number, parameter in enumerate(model.parameters()):
        parameter.data.normal_(std=0.02, generator=torch.Generator().manual_seed(number))
    graph = export_graph(model, "step", tmp_path / "graph", Precision.BF16)
    profiles = default_profiles(spec.latents, Range(1, 2, 8))
    (tmp_path / "plan").mkdir()
    wanted = target(precision=Precision.BF16, compute_capabilities=["8.9", "12.0"], layout="multi-profile")
    shares: list[float] = []
    file = GraphFile(graph, spec.graph(STEP))
    built = BUILDER.build_plan(file, tmp_path / "plan", profiles, wanted, None, shares.append)
    weights = 2 * sum(parameter.numel() for parameter in model.parameters())
    assert (tmp_path / "plan" / built.file).stat().st_size > weights
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_fp32_is_not_tf32() -> None:
    """The library's default would round the products of fp32 graphs to ten bits."""
    builder = trt.Builder(tensorrt._log(trt))
    assert builder.create_builder_config().get_flag(trt.BuilderFlag.TF32)
    assert not tensorrt._config(trt, builder, target()).get_flag(trt.BuilderFlag.TF32)

"""Builds in 8 bits: which samples they take, what they do again, and what stops the graph that is not good enough."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import numpy_helper

from elit_export import Pipeline, compile_bundle
from elit_export.backends import BACKENDS
from elit_export.backends.openvino.cpu import cpu_features
from elit_export.backends.protocols import BuiltPlan, GraphFile
from elit_export.bundle.calibration_inputs import CalibrationInputs, load_inputs, save_inputs
from elit_export.bundle.reading import MANIFEST, Bundle
from elit_export.bundle.recipe import Recipe, recipe_from_values
from elit_export.bundle.store import LOCK, STAGING
from elit_export.cli import main
from elit_export.compiler.build import NOTHING_CHANGED
from elit_export.errors import BackendUnavailable, BundleError, CalibrationError, ParityError
from elit_export.spec import CACHE_GRAPHS, ModelSpec, Precision
from tests.conftest import openvino_recipe, recipe_values

Change = Callable[[CalibrationInputs], CalibrationInputs]


@pytest.fixture
def samples(tiny_bundle: Bundle, tiny_samples: Path) -> CalibrationInputs:
    model = tiny_bundle.manifest.model
    return load_inputs(tiny_samples, model.spec, model.checkpoint_sha256)


@pytest.fixture
def copied(openvino_bundle: Bundle, tmp_path: Path) -> Path:
    if "ov-int8" not in {plan_set.target for plan_set in openvino_bundle.manifest.plan_sets}:
        pytest.skip("this CPU has no int8 arithmetic")
    return Path(shutil.copytree(openvino_bundle.folder, tmp_path / "copied"))


def stages_of(recipe: Recipe, target: str, out: Path, **places: Path) -> list[str]:
    stages: list[str] = []
    compile_bundle(recipe, target, out=out, progress=lambda stage, _: stages.append(stage), **places)
    return [stage for stage in dict.fromkeys(stages) if not stage.startswith("verified")]


def assert_untouched(folder: Path, before: bytes, target: str = "ov-int8") -> None:
    assert (folder / MANIFEST).read_bytes() == before
    assert not (folder / STAGING).exists()
    Pipeline.load(folder, target=target).close()


# ---------------------------------------------------------------- samples that are asked for, or not


def test_a_target_in_8_bits_without_samples_is_told_what_to_type(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    told = rf"ov-int8 is int8, .*; elit-export calibrate samples {out} --out samples\.npz .*--samples samples\.npz"
    with pytest.raises(CalibrationError, match=told):
        compile_bundle(openvino_recipe(tiny_checkpoint), "ov-int8", out=out)
    assert not out.exists()


def test_a_target_that_rounds_nothing_takes_no_samples(
    tiny_checkpoint: Path, tiny_samples: Path, tmp_path: Path
) -> None:
    with pytest.raises(CalibrationError, match="target ov-fp32 is fp32 and takes no samples; leave them out"):
        compile_bundle(openvino_recipe(tiny_checkpoint), "ov-fp32", out=tmp_path / "bundle", samples=tiny_samples)
    assert not list(tmp_path.iterdir())


def of_another_checkpoint(samples: CalibrationInputs) -> CalibrationInputs:
    return replace(samples, facts=samples.facts.model_copy(update={"checkpoint_sha256": "b" * 64}))


def with_nan(samples: CalibrationInputs) -> CalibrationInputs:
    x = samples.x.copy()
    x[5, 0, 0, 0] = np.nan
    return replace(samples, x=x)


def too_few(samples: CalibrationInputs) -> CalibrationInputs:
    facts = samples.facts.model_copy(update={"samples": 9})
    rows = {name: values[:9] for name, values in samples.conditioning.items()}
    return CalibrationInputs(facts, samples.x[:9], samples.t[:9], samples.kept[:9], rows)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (of_another_checkpoint, "samples of another checkpoint"),
        (with_nan, "x of sample 5 holds values that are not finite"),
        (too_few, "9 samples are too few, the minimum is 64"),
        (None, "no calibration samples at .*bad.npz"),
    ],
)
def test_unfit_samples_leave_what_was_there(
    copied: Path, tiny_checkpoint: Path, samples: CalibrationInputs, tmp_path: Path, change: Change | None, problem: str
) -> None:
    path, before = tmp_path / "bad.npz", (copied / MANIFEST).read_bytes()
    if change:
        save_inputs(change(samples), path)
    recipe = openvino_recipe(tiny_checkpoint)
    for out in (copied, tmp_path / "fresh"):
        remedy = f"elit-export calibrate samples (BUNDLE|{out}) --out {path}"
        with pytest.raises(CalibrationError, match=f"{problem}.*{remedy}"):
            compile_bundle(recipe, "ov-int8", out=out, samples=path)
    assert_untouched(copied, before)
    assert {path.name for path in (tmp_path / "fresh").glob("*")} <= {LOCK}


# ---------------------------------------------------------------- what is done again


def test_the_same_samples_do_nothing_and_other_ones_build_again(
    copied: Path, tiny_checkpoint: Path, tiny_samples: Path, samples: CalibrationInputs, tmp_path: Path
) -> None:
    recipe, other = openvino_recipe(tiny_checkpoint), tmp_path / "other.npz"
    assert stages_of(recipe, "ov-int8", copied, samples=tiny_samples) == [NOTHING_CHANGED]
    save_inputs(replace(samples, x=samples.x * np.float32(0.9)), other)
    before = {plan_set.target: plan_set for plan_set in Bundle.open(copied).manifest.plan_sets}
    stages = stages_of(recipe, "ov-int8", copied, samples=other)
    assert stages[0] == "build step, full, half, quarter"
    assert stages[-1] == "verify"
    after = {plan_set.target: plan_set for plan_set in Bundle.open(copied).manifest.plan_sets}
    assert {target for target in after if after[target] != before[target]} == {"ov-int8"}
    assert after["ov-int8"].profiles[0].plan.artifact != before["ov-int8"].profiles[0].plan.artifact


def test_another_cpu_builds_again(
    copied: Path, tiny_checkpoint: Path, tiny_samples: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the refusal of its plans says. The other CPU can do more; all that this one can do stays as it is."""
    features = f"{cpu_features()} avx1024"
    for file in ("build", "engine"):
        monkeypatch.setattr(f"elit_export.backends.openvino.{file}.cpu_features", lambda: features)
    told = r"target ov-int8: these plans .* \(they differ in avx1024\): .* --target TARGET --out BUNDLE --samples FILE"
    with pytest.raises(BundleError, match=told):
        Pipeline.load(copied, target="ov-int8")
    assert "verify" in stages_of(openvino_recipe(tiny_checkpoint), "ov-int8", copied, samples=tiny_samples)
    Pipeline.load(copied, target="ov-int8").close()


def test_samples_of_every_profile_are_needed(
    copied: Path, tiny_checkpoint: Path, samples: CalibrationInputs, tmp_path: Path
) -> None:
    full = samples.kept.max()
    save_inputs(replace(samples, kept=np.full_like(samples.kept, full)), tmp_path / "full.npz")
    before = (copied / MANIFEST).read_bytes()
    with pytest.raises(CalibrationError, match=r"no sample has a budget of profile half .*calibrate samples"):
        stages_of(openvino_recipe(tiny_checkpoint), "ov-int8", copied, samples=tmp_path / "full.npz")
    assert_untouched(copied, before)


def test_the_manifest_keeps_where_the_samples_are_from(copied: Path, samples: CalibrationInputs) -> None:
    kept = {plan_set.target: plan_set.samples for plan_set in Bundle.open(copied).manifest.plan_sets}
    assert kept.pop("ov-int8") == samples.facts
    assert not any(kept.values())


def test_an_interrupted_quantization_leaves_the_old_bundle(
    copied: Path, tiny_checkpoint: Path, samples: CalibrationInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nncf

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    before, other = (copied / MANIFEST).read_bytes(), tmp_path / "other.npz"
    save_inputs(replace(samples, x=samples.x * np.float32(0.9)), other)
    monkeypatch.setattr(nncf, "quantize", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compile_bundle(openvino_recipe(tiny_checkpoint), "ov-int8", out=copied, samples=other)
    assert_untouched(copied, before)


def test_build_takes_samples(copied: Path, tiny_checkpoint: Path, tiny_samples: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "test.toml"
    recipe.write_text(
        f'name = "test"\ncheckpoint = "{tiny_checkpoint}"\nrows = {{ min = 1, opt = 2, max = 8 }}\n'
        '[targets.ov-int8]\nbackend = "openvino"\nprecision = "int8"\nthreads = 1\n'
    )
    without = CliRunner().invoke(main, ["build", str(recipe), "--out", str(copied)])
    assert without.exit_code == 2, without.output
    assert f"elit-export calibrate samples {copied} --out samples.npz" in " ".join(without.output.split())
    done = CliRunner().invoke(main, ["build", str(recipe), "--out", str(copied), "--samples", str(tiny_samples)])
    assert done.exit_code == 0, done.output
    assert "nothing changed" in done.output


# ---------------------------------------------------------------- the quantized graph of TensorRT, and its own gate


@pytest.fixture
def rtx(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Plans that are no more than a name; gives the graphs they were asked for."""
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx")
    pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-python")
    asked: list[Path] = []

    def named(_builder: object, graph: GraphFile, folder: Path, *_: object) -> BuiltPlan:
        asked.append(graph.path)
        (folder / "plan").write_text(str(len(asked)))
        return BuiltPlan("plan", "named", {"tensorrt-rtx": "1"}, {"compute_capabilities": "8.9"})

    monkeypatch.setattr(type(BACKENDS["tensorrt-rtx"].builder()), "build_plan", named)
    return asked


def rtx_recipe(checkpoint: Path, **changes: Any) -> Recipe:
    values: Any = recipe_values(checkpoint)
    target = {"backend": "tensorrt-rtx", "precision": "int8", "compute_capabilities": ["8.9"]}
    values["targets"]["rtx"] = target | changes
    return recipe_from_values(values, "test")


def quantizer(error: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the library: one weight is off by `error`."""

    def changed(
        graph: Path, folder: Path, _precision: Precision, _samples: CalibrationInputs, _spec: ModelSpec
    ) -> Path:
        model = onnx.load(graph)
        weight = next(one for one in model.graph.initializer if one.name == "model.core.1.modulation.linear.weight")
        values = numpy_helper.to_array(weight) + np.float32(error)
        weight.CopyFrom(numpy_helper.from_array(values, weight.name))
        onnx.save(model, folder / graph.name, save_as_external_data=True, location=f"{graph.name}.data")
        return folder / graph.name

    monkeypatch.setattr("elit_export.compiler.stages.quantized_graph", changed)


@pytest.fixture
def tiny_copy(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle.folder, tmp_path / "tiny"))


def test_plans_are_built_of_the_graph_that_modelopt_makes(
    tiny_copy: Path, tiny_checkpoint: Path, tiny_samples: Path, rtx: list[Path]
) -> None:
    pytest.importorskip("modelopt", reason="needs nvidia-modelopt")
    recipe = rtx_recipe(tiny_checkpoint)
    stages = stages_of(recipe, "rtx", tiny_copy, samples=tiny_samples)
    assert stages[0] == "quantize graph step"
    steps = [path for path in rtx if path.name == "step.onnx"]
    assert {path.parent.name[: len("step-int8-")] for path in steps} == {"step-int8-"}
    assert {path.stem for path in rtx} == {"step", *CACHE_GRAPHS}
    manifest = Bundle.open(tiny_copy).manifest
    quantized = manifest.graphs[manifest.plan_sets[1].graph]
    assert quantized.sqnr_db is not None
    assert 25 <= quantized.sqnr_db < 60
    assert "nvidia-modelopt" in quantized.versions
    assert manifest.graphs["step-fp32"].sqnr_db is None
    operators = [node.op_type for node in onnx.load(steps[0], load_external_data=False).graph.node]
    assert "QuantizeLinear" in operators
    assert {facts.parity.status for facts in manifest.plan_sets[1].profiles} == {"not run"}
    assert stages_of(recipe, "rtx", tiny_copy, samples=tiny_samples) == [NOTHING_CHANGED]


def test_other_samples_quantize_again(
    tiny_copy: Path,
    tiny_checkpoint: Path,
    tiny_samples: Path,
    samples: CalibrationInputs,
    rtx: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quantizer(0.0, monkeypatch)
    recipe = rtx_recipe(tiny_checkpoint)
    stages_of(recipe, "rtx", tiny_copy, samples=tiny_samples)
    assert stages_of(recipe, "rtx", tiny_copy, samples=tiny_samples) == [NOTHING_CHANGED]
    save_inputs(replace(samples, x=samples.x * np.float32(0.9)), tmp_path / "other.npz")
    stages = stages_of(recipe, "rtx", tiny_copy, samples=tmp_path / "other.npz")
    assert "quantize graph step" in stages
    assert not [stage for stage in stages if stage.startswith("build") and "step" not in stage]  # the cache's stay
    names = [name for name in Bundle.open(tiny_copy).manifest.graphs if name.startswith("step-int8")]
    assert len(names) == 1  # that of the samples before is of no use to anyone


def test_targets_with_samples_of_their_own_do_not_disturb_each_other(
    tiny_copy: Path,
    tiny_checkpoint: Path,
    tiny_samples: Path,
    samples: CalibrationInputs,
    rtx: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quantizer(0.0, monkeypatch)
    save_inputs(replace(samples, x=samples.x * np.float32(0.9)), tmp_path / "other.npz")
    values: Any = rtx_recipe(tiny_checkpoint).model_dump(mode="json", exclude_none=True)
    values["targets"]["second"] = values["targets"]["rtx"]
    recipe = recipe_from_values(values, "test")
    places = {"rtx": tiny_samples, "second": tmp_path / "other.npz"}
    for target, place in places.items():
        stages_of(recipe, target, tiny_copy, samples=place)
    for target, place in places.items():
        assert stages_of(recipe, target, tiny_copy, samples=place) == [NOTHING_CHANGED]
    plan_sets = {plan_set.target: plan_set for plan_set in Bundle.open(tiny_copy).manifest.plan_sets}
    assert plan_sets["rtx"].graph != plan_sets["second"].graph


def test_another_reason_makes_nothing_again(
    tiny_copy: Path, tiny_checkpoint: Path, tiny_samples: Path, rtx: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    quantizer(0.5, monkeypatch)
    first, second = (rtx_recipe(tiny_checkpoint, accept_below_tolerance=reason) for reason in ("try it", "why not"))
    stages_of(first, "rtx", tiny_copy, samples=tiny_samples)
    assert stages_of(second, "rtx", tiny_copy, samples=tiny_samples) == []
    assert Bundle.open(tiny_copy).manifest.plan_sets[1].accepted == "why not"
    with pytest.raises(ParityError, match=r"calibrate sensitivity .* --precision int8 .*accept_below_tolerance = "):
        stages_of(rtx_recipe(tiny_checkpoint), "rtx", tiny_copy, samples=tiny_samples)


def test_a_missing_quantizer_is_told_before_anything_is_made(
    tiny_checkpoint: Path, tiny_samples: Path, rtx: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "modelopt.onnx.quantization", None)
    with pytest.raises(BackendUnavailable, match=r"need modelopt .*pip install -e '.*\[quantize\]'"):
        compile_bundle(rtx_recipe(tiny_checkpoint), "rtx", out=tmp_path / "bundle", samples=tiny_samples)
    assert not (tmp_path / "bundle").exists()
    assert rtx == []


def test_a_quantized_graph_that_misses_is_refused_before_any_plan(
    tiny_copy: Path, tiny_checkpoint: Path, tiny_samples: Path, rtx: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (tiny_copy / MANIFEST).read_bytes()
    quantizer(0.5, monkeypatch)
    with pytest.raises(ParityError, match=r"profile full, .* misses 25 dB; a tolerance of -?\d+ dB would have passed"):
        compile_bundle(rtx_recipe(tiny_checkpoint), "rtx", out=tiny_copy, samples=tiny_samples)
    assert not rtx
    assert_untouched(tiny_copy, before, "cpu")


def test_a_reason_lets_a_quantized_graph_that_misses_pass(
    tiny_copy: Path, tiny_checkpoint: Path, tiny_samples: Path, rtx: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    quantizer(0.5, monkeypatch)
    recipe = rtx_recipe(tiny_checkpoint, accept_below_tolerance="a test of it")
    manifest = compile_bundle(recipe, "rtx", out=tiny_copy, samples=tiny_samples).manifest
    assert rtx
    assert manifest.plan_sets[1].accepted == "a test of it"
    found = manifest.graphs[manifest.plan_sets[1].graph].sqnr_db
    assert found is not None
    assert found < 25
    with pytest.raises(ParityError, match="misses 25 dB"):  # what let it pass is gone
        compile_bundle(rtx_recipe(tiny_checkpoint), "rtx", out=tiny_copy, samples=tiny_samples)


def test_no_reason_lets_a_graph_pass_that_is_not_finite(
    tiny_copy: Path, tiny_checkpoint: Path, tiny_samples: Path, rtx: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    quantizer(np.nan, monkeypatch)
    recipe = rtx_recipe(tiny_checkpoint, accept_below_tolerance="a test of it")
    with pytest.raises(ParityError, match="no tolerance would have passed"):
        compile_bundle(recipe, "rtx", out=tiny_copy, samples=tiny_samples)
    assert not rtx


def test_an_interrupted_quantizer_leaves_the_old_bundle(
    tiny_copy: Path, tiny_checkpoint: Path, tiny_samples: Path, rtx: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_graph: Path, folder: Path, *_: object) -> Path:
        (folder / "half").write_text("written")
        raise KeyboardInterrupt

    before = (tiny_copy / MANIFEST).read_bytes()
    monkeypatch.setattr("elit_export.compiler.stages.quantized_graph", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compile_bundle(rtx_recipe(tiny_checkpoint), "rtx", out=tiny_copy, samples=tiny_samples)
    assert not rtx
    assert_untouched(tiny_copy, before, "cpu")

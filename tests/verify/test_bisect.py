from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import numpy_helper

from elit_export.backends.onnxruntime.build import OnnxRuntimeBuilder
from elit_export.backends.protocols import BuiltPlan, GraphFile
from elit_export.bundle.artifacts import Artifact
from elit_export.bundle.atomic import sha256_of
from elit_export.bundle.reading import MANIFEST, OWN_HASH, Bundle, manifest_text
from elit_export.cli import main
from elit_export.errors import pip_install
from elit_export.verify import bisect as module
from elit_export.verify.bisect import Cause, Verdict, bisect, departures, visible

Change = Callable[[onnx.GraphProto], None]
CASE = 1
WEIGHT = "model.core.1.modulation.linear.weight"


# ---------------------------------------------------------------- faults


def wrong_weight(graph: onnx.GraphProto) -> None:
    """One weight is off by a hundredth."""
    weight = next(tensor for tensor in graph.initializer if tensor.name == WEIGHT)
    values = numpy_helper.to_array(weight).copy()
    values.flat[0] += np.float32(1e-2)
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))


def wrong_fusion(graph: onnx.GraphProto) -> None:
    """What ONNX Runtime makes of x · sigmoid(x), two nodes, gets another scale."""
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "QuickGelu" and attribute.name == "alpha":
                attribute.f *= 1.01


def changed(path: Path, change: Change) -> None:
    model = onnx.load(path)
    change(model.graph)
    for old in path.parent.glob(f"{path.name}*"):
        old.unlink()
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data")


def backend_with(change: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every plan that is built from now on has the fault."""
    sound = OnnxRuntimeBuilder.build_plan

    def faulty(builder: OnnxRuntimeBuilder, graph: GraphFile, folder: Path, *rest: Any) -> BuiltPlan:
        built = sound(builder, graph, folder, *rest)
        changed(folder / built.file, change)
        return built

    monkeypatch.setattr(OnnxRuntimeBuilder, "build_plan", faulty)


@pytest.fixture
def copied(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle.folder, tmp_path / "copied"))


def alter(folder: Path, kind: str, change: Change) -> None:
    """Change a bundle's one plan or graph, and its manifest with it, as if it had been built so."""
    (path,) = folder.glob(f"{kind}/*/step.onnx")
    changed(path, change)
    rewrite_manifest(folder)


def rewrite_manifest(folder: Path) -> None:
    """Hash every file again."""
    values = json.loads((folder / MANIFEST).read_text())
    del values[OWN_HASH]
    _rehash(folder, values)
    (folder / MANIFEST).write_text(manifest_text(values))


def _rehash(folder: Path, values: object) -> None:
    if isinstance(values, dict) and values.keys() == Artifact.model_fields.keys():
        for name, facts in values["files"].items():
            path = folder / values["kind"] / values["name"] / name
            facts.update(sha256=sha256_of(path), size_bytes=path.stat().st_size)
    elif isinstance(values, dict | list):
        for inner in values.values() if isinstance(values, dict) else values:
            _rehash(folder, inner)


def verdict_on(folder: Path) -> Verdict:
    bundle = Bundle.open(folder)
    return bisect(bundle, bundle.manifest.plan_sets[0], case=CASE)


def verify(folder: Path, *options: str) -> Result:
    return CliRunner().invoke(main, ["verify", str(folder), "--bisect", *options])


# ---------------------------------------------------------------- verdicts


def test_a_sound_plan_is_said_to_be_sound(tiny_bundle: Bundle) -> None:
    verdict = verdict_on(tiny_bundle.folder)
    assert verdict.cause is Cause.NOTHING
    assert str(verdict).startswith(
        "profile full, K=4 rows=2, where 115 dB are needed: the stored plan is sound: it matches PyTorch"
    )


@pytest.mark.parametrize("fault", [wrong_weight, wrong_fusion])
def test_a_plan_that_building_again_mends_is_stale(copied: Path, fault: Change) -> None:
    alter(copied, "plans", fault)
    verdict = verdict_on(copied)
    assert verdict.cause is Cause.PLAN
    (plan,) = copied.glob("plans/step-*")
    remedy = f"rm -r {plan} && elit-export build RECIPE --target cpu --out {copied}"
    assert str(verdict).endswith(remedy)


def test_a_wrong_fusion_is_the_optimisers(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the fusion no node departs, and building again would give the same plan."""
    alter(copied, "plans", wrong_fusion)
    backend_with(wrong_fusion, monkeypatch)
    verdict = verdict_on(copied)
    assert verdict.cause is Cause.OPTIMISER
    assert "keeps nodes from being fused" in str(verdict)
    assert "pip install 'onnxruntime" in str(verdict)


def test_the_node_with_a_wrong_weight_is_named(
    tiny_bundle: Bundle, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = onnx.load(tiny_bundle.verified(tiny_bundle.manifest.graphs["step-fp32"].artifact) / "step.onnx").graph
    index, victim = next((i, node) for i, node in enumerate(graph.node) if WEIGHT in node.input)
    alter(copied, "plans", wrong_weight)
    backend_with(wrong_weight, monkeypatch)
    verdict = verdict_on(copied)
    assert verdict.cause is Cause.NODE
    told = f"the first is node {index + 1} of {len(graph.node)}, Gemm ({victim.name}), output {victim.output[0]} with"
    assert told in str(verdict)


def test_a_wrong_graph_is_not_blamed_on_the_backend(copied: Path) -> None:
    alter(copied, "graphs", wrong_weight)
    alter(copied, "plans", wrong_weight)
    verdict = verdict_on(copied)
    assert verdict.cause is Cause.GRAPH
    assert "Export it again" in str(verdict)


def test_a_miss_that_no_node_explains_is_rounding(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alter(copied, "plans", wrong_weight)
    backend_with(wrong_weight, monkeypatch)
    monkeypatch.setattr(module, "departures", lambda *_: iter(()))
    assert verdict_on(copied).cause is Cause.ROUNDING


# ---------------------------------------------------------------- nodes


def test_departures_come_in_the_order_of_the_graph() -> None:
    nodes = [onnx.helper.make_node("Neg", [a], [b], name=b) for a, b in (("x", "a"), ("a", "b"), ("b", "c"))]
    exact = {name: np.ones(3, np.float32) for name in "abc"}
    found = {"a": exact["a"], "b": exact["b"] * 1.1, "c": exact["c"] * 2}
    graph = onnx.helper.make_graph(nodes, "g", [], [])
    assert [departure.node for departure in departures(graph, found, exact, 60.0)] == ["b", "c"]


def test_all_outputs_become_visible_once(tiny_bundle: Bundle) -> None:
    path = tiny_bundle.verified(tiny_bundle.manifest.graphs["step-fp32"].artifact) / "step.onnx"
    model = onnx.load(path, load_external_data=False)
    names = [value.name for value in visible(model).graph.output]
    assert len(names) == len(set(names)) == sum(len(node.output) for node in model.graph.node)


# ---------------------------------------------------------------- verify --bisect


def test_verify_bisects_at_the_case_that_missed(copied: Path) -> None:
    alter(copied, "plans", wrong_weight)
    done = verify(copied)
    assert done.exit_code == 1, done.output
    _, *misses, verdict = done.stderr.strip().splitlines()  # the bar is first
    assert verdict.startswith("profile full, K=4 rows=1, where 115 dB are needed: the stored plan is stale or altered")
    assert misses[0].startswith("profile full, K=4 rows=1 velocity: SQNR")


def test_what_the_verdict_says_to_type_mends_it(copied: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Building alone would find nothing changed."""
    alter(copied, "plans", wrong_weight)
    (tmp_path / "r.toml").write_text(
        f'name = "test"\ncheckpoint = "{tiny_checkpoint}"\nrows = {{ min = 1, opt = 2, max = 8 }}\n'
        '[targets.cpu]\nbackend = "onnxruntime"\ndevice = "cpu"\nprecision = "fp32"\nthreads = 2\n'
    )
    command = str(verdict_on(copied)).split("Build it again: ")[1].replace("RECIPE", str(tmp_path / "r.toml"))
    removal, build = (part.split() for part in command.split(" && "))
    shutil.rmtree(removal[-1])
    built = CliRunner().invoke(main, build[1:])
    assert built.exit_code == 0, built.output
    assert verify(copied).exit_code == 0


def test_a_sound_bundle_is_not_bisected(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "bisect", None)
    assert verify(tiny_bundle.folder).exit_code == 0


def test_a_trajectory_that_misses_is_bisected_at_the_first_case(copied: Path) -> None:
    """Its reference is altered; every single step is sound."""
    (path,) = copied.glob("reference/*/reference.npz")
    with np.load(path) as file:
        arrays = {name: array * 1.01 if name.startswith("plain/") else array for name, array in file.items()}
    np.savez(path, **arrays)
    rewrite_manifest(copied)
    done = verify(copied)
    assert done.exit_code == 1, done.output
    assert "trajectory plain (profiles full), step 0: SQNR 40.1 dB" in done.stderr
    assert "profile full, K=4 rows=1, where 115 dB are needed: the stored plan is sound" in done.stderr


# ---------------------------------------------------------------- where bisecting cannot run


@pytest.fixture
def stale(copied: Path) -> Path:
    alter(copied, "plans", wrong_weight)
    return copied


def test_a_copy_without_graphs_stays_a_miss(stale: Path) -> None:
    shutil.rmtree(stale / "graphs")
    done = verify(stale)
    assert done.exit_code == 1
    assert "cannot bisect: bisecting needs the graph, which this copy lacks" in done.stderr


def test_an_altered_graph_is_said_to_be_altered(stale: Path) -> None:
    (path,) = stale.glob("graphs/*/step.onnx.data")
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    done = verify(stale)
    assert done.exit_code == 1
    assert f"cannot bisect: {path}: altered since the build" in done.stderr
    assert "lacks" not in done.stderr


def test_without_onnx_a_miss_stays_a_miss(stale: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "elit_export.verify.bisect")
    monkeypatch.setitem(sys.modules, "onnx", None)
    done = verify(stale)
    assert done.exit_code == 1
    assert f"cannot bisect: this needs onnx; {pip_install('export')}" in done.stderr

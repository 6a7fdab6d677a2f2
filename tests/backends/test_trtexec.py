"""The trtexec line has the shapes that our TensorRT builder gives its optimization profiles."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from elit_export.backends.tensorrt.trtexec import trtexec_line
from elit_export.bundle.reading import Bundle
from elit_export.cli import main
from elit_export.spec import FUSED, STEP, Precision, Profile, Range
from tests.helpers import tiny_spec
from tests.text_models import text_spec

Shapes = dict[str, list[tuple[int, ...]]]


def shapes_in(line: str) -> Shapes:
    """Input → shapes at min, opt and max, of a line with one profile."""
    options = dict(word.removeprefix("--").split("=", 1) for word in shlex.split(line) if "=" in word)
    shapes: Shapes = {}
    for option in ("minShapes", "optShapes", "maxShapes"):
        for each in options[option].split(","):
            name, _, shape = each.partition(":")
            shapes.setdefault(name, []).append(tuple(map(int, shape.split("x"))))
    return shapes


def test_shapes_are_those_of_our_optimization_profiles(tiny_bundle: Bundle) -> None:
    """Of the real library, asked what it was given, and by the names of dimensions in the graph itself."""
    trt = pytest.importorskip("tensorrt_rtx")
    from elit_export.backends.tensorrt import build

    manifest, log = tiny_bundle.manifest, build._log(trt)
    graph, spec = manifest.graphs[manifest.plan_sets[0].graph], manifest.model.spec.graph(STEP)
    path = tiny_bundle.verified(graph.artifact) / graph.file
    builder = trt.Builder(log)
    network = build._parsed(trt, builder, path, log, Precision.FP32)
    for facts in manifest.plan_sets[0].profiles:
        made = build._optimization_profile(builder, network, spec, facts.profile)
        told = shapes_in(trtexec_line(path, spec, [facts.profile]))
        inputs = [network.get_input(index) for index in range(network.num_inputs)]
        assert sorted(told) == sorted(tensor.name for tensor in inputs)
        ranges = {"rows": facts.profile.rows.corners(), "latents": facts.profile.latents.corners()}
        for tensor in inputs:
            assert [tuple(shape) for shape in made.get_shape(tensor.name)] == told[tensor.name]
            for axis, size in enumerate(tensor.shape):
                wanted = ranges[tensor.get_dimension_name(axis)] if size < 0 else (size,) * 3
                assert tuple(shape[axis] for shape in told[tensor.name]) == wanted


def test_text_has_a_range_and_scalars_are_left_to_the_graph(tmp_path: Path) -> None:
    profile = Profile("full", Range(9, 16, 16), Range(1, 2, 4), Range(1, 128, 1024))
    shapes = shapes_in(trtexec_line(tmp_path / "fused.onnx", text_spec().graph(FUSED), [profile]))
    assert shapes["text"] == [(1, 1, 24), (2, 128, 24), (4, 1024, 24)]
    assert shapes["latents"] == [(9,), (16,), (16,)]
    assert {"threshold", "coefficients", "force"}.isdisjoint(shapes)


def test_one_plan_may_have_several_profiles() -> None:
    profiles = [Profile(name, Range(1, 2, 4), Range(1, 2, 8)) for name in ("a", "b")]
    line = trtexec_line(Path("my graphs/step.onnx"), tiny_spec().graph(STEP), profiles)
    words = shlex.split(line)
    assert words[:3] == ["trtexec", "--onnx=my graphs/step.onnx", "--saveEngine=my graphs/step-a-b.plan"]
    assert [word for word in words if word.startswith("--profile")] == ["--profile=0", "--profile=1"]
    assert words.index("--profile=0") < words.index("--profile=1") == len(words) - 4


def test_inspect_prints_a_line_for_each_profile(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """Once, though several plan sets have the profile; none for a copy without graphs."""
    (plan_set,) = tiny_bundle.manifest.plan_sets
    done = CliRunner().invoke(main, ["inspect", str(tiny_bundle.folder), "--json", str(tmp_path / "facts.json")])
    lines = [line for line in done.output.splitlines() if line.startswith("trtexec ")]
    assert len(lines) == len(plan_set.profiles)
    assert lines == json.loads((tmp_path / "facts.json").read_text())["trtexec"]
    assert all(Path(shlex.split(line)[1].removeprefix("--onnx=")).is_file() for line in lines)
    copy = Path(shutil.copytree(tiny_bundle.folder, tmp_path / "copy", ignore=shutil.ignore_patterns("graphs")))
    assert "trtexec" not in CliRunner().invoke(main, ["inspect", str(copy)]).output


def test_export_prints_a_line_for_each_usual_profile(tiny_checkpoint: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["export", str(tiny_checkpoint), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0
    lines = [line for line in done.output.splitlines() if line.startswith("trtexec ")]
    assert [shapes_in(line)["latents"] for line in lines] == [[(4,)] * 3, [(2,), (2,), (3,)], [(1,)] * 3]
    assert [shapes_in(line)["x"][2] for line in lines] == [(64, 1, 8, 8)] * 3

"""NVIDIA Polygraphy reads the cases that `verify --polygraphy` writes, and runs its lines."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from elit_export.bundle.manifest import PlanSet
from elit_export.bundle.reading import Bundle
from elit_export.cli import main
from elit_export.cli.verify import refuse_beside_polygraphy
from elit_export.errors import InputError
from elit_export.spec import Precision
from elit_export.verify.parity import Case

pytest.importorskip("polygraphy")
from polygraphy.comparator import RunResults
from polygraphy.json import load_json
from polygraphy.tools import main as polygraphy_main

from elit_export.verify import polygraphy


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


def in_shell(command: str) -> subprocess.CompletedProcess[str]:
    """With the scripts of this environment first in PATH, as one types it."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        command, shell=True, capture_output=True, text=True, env=os.environ | {"PATH": path}, check=False
    )


@pytest.fixture(scope="module")
def written(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder, in whose name is a space, and the lines as the command prints them."""
    folder = tmp_path_factory.mktemp("polygraphy") / "my cases"
    done = run("verify", tiny_bundle.folder, "--polygraphy", folder)
    assert done.exit_code == 0
    return folder, done.output.splitlines()


def lines_in(said: list[str]) -> list[str]:
    return [line for line in said if "polygraphy run" in line]


def test_inputs_and_outputs_are_those_of_the_reference(written: tuple[Path, list[str]], tiny_bundle: Bundle) -> None:
    folder, _ = written
    (plan_set,) = tiny_bundle.manifest.plan_sets
    reference = plan_set.reference
    with np.load(tiny_bundle.verified(reference.artifact) / "reference.npz") as file:
        arrays = dict(file)
    for facts in plan_set.profiles:
        own = [index for index, case in enumerate(reference.cases) if case.profile == facts.name]
        inputs = load_json(str(folder / f"step-{facts.name}" / "inputs.json"))
        outputs = RunResults.load(str(folder / f"step-{facts.name}" / "outputs.json"))["PyTorch"]
        assert len(inputs) == len(outputs) == len(own) >= 3
        for index, given, expected in zip(own, inputs, outputs, strict=True):
            assert given["latents"].tolist() == list(range(reference.cases[index].kept))
            for name in ("x", "t", "y"):
                np.testing.assert_array_equal(given[name], arrays[f"{index}/{name}"])
            for name in ("velocity", "residual"):
                np.testing.assert_array_equal(expected[name], arrays[f"{index}/{name}"])


@pytest.mark.parametrize(("share", "status"), [(0.5, 0), (0.25, 1)])
def test_an_accepted_miss_that_leaves_no_signal_is_held_to_its_mean_error(
    written: tuple[Path, list[str]], tiny_bundle: Bundle, tmp_path: Path, share: float, status: int
) -> None:
    """An engine that gives twice what PyTorch did is at 0 dB; one that gives four times as much is below."""
    folder, said = written
    (plan_set,) = tiny_bundle.manifest.plan_sets
    part = next(one for one in polygraphy.reference_parts(tiny_bundle, plan_set) if one.name == "time")
    cases = tuple(Case(one.point, one.inputs, {"embedding": one.expected["embedding"] * share}) for one in part.cases)
    moved = replace(part, cases=cases, least_db=-0.5)
    polygraphy.write_cases(moved, tmp_path)
    line = with_outputs(
        next(line for line in lines_in(said) if "/time/" in line), folder / "time", tmp_path / "outputs.json"
    )
    options = shlex.join(polygraphy.tolerance_options(moved))
    assert polygraphy_run(f"{line.partition(' --compare ')[0]} {options}") == status


def polygraphy_run(line: str, *more: str) -> int:
    """What the command of Polygraphy makes of a line, in this process, which spares two seconds a line."""
    words = [word for word in shlex.split(line) if not word.startswith("POLYGRAPHY_")]
    assert words[:2] == ["polygraphy", "run"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it reads entry points in an old way
        warnings.simplefilter("ignore", ResourceWarning)  # and leaves the script open that it writes
        status: int = polygraphy_main(run_opts=[*words[1:], *more])
    return status


def with_outputs(line: str, folder: Path, outputs: Path) -> str:
    """The line, compared with other outputs."""
    old = shlex.quote(str(folder / "outputs.json"))
    assert old in line
    return line.replace(old, shlex.quote(str(outputs)))


def test_every_line_runs_and_passes(written: tuple[Path, list[str]], tiny_bundle: Bundle) -> None:
    folder, said = written
    commands = lines_in(said)
    (plan_set,) = tiny_bundle.manifest.plan_sets
    assert len(commands) == 2 * (len(plan_set.profiles) + len(plan_set.cache))  # plans and graphs
    assert all(" --onnxrt " in command for command in commands)
    assert [polygraphy_run(command) for command in commands] == [0] * len(commands)
    script = (folder / "commands.sh").read_text()
    assert all(f"{command} || status=1\n" in script for command in commands)
    assert said[-1] == f"wrote {folder}; next: sh {shlex.quote(str(folder / 'commands.sh'))}"


def test_an_output_beyond_its_tolerance_fails(written: tuple[Path, list[str]], tmp_path: Path) -> None:
    """By 3 dB; the script runs on and fails at its end. In a shell, as one types it, with a data loader."""
    folder, said = written
    line = next(line for line in lines_in(said) if "/time/" in line)
    outputs = tmp_path / "altered outputs.json"
    results = RunResults.load(str(folder / "time" / "outputs.json"))
    for answer in results["PyTorch"]:
        values = answer["embedding"]
        rms = float(np.sqrt(np.square(values, dtype=np.float64).mean()))
        noise = np.random.default_rng(0).choice([-1.0, 1.0], values.shape) * rms * 10 ** (-112 / 20)
        answer["embedding"] = (values + noise).astype(np.float32)
    results.save(str(outputs))
    inputs, loader = (shlex.quote(str(folder / "time" / name)) for name in ("inputs.json", "data_loader.py"))
    loading = line.replace(f"--load-inputs {inputs}", f"--data-loader-script {loader}")
    assert loading != line
    lines = [with_outputs(line, folder / "time", outputs), loading]
    script = tmp_path / "commands.sh"
    script.write_text(polygraphy.script([polygraphy.Command("", each) for each in lines]))
    done = in_shell(f"sh {shlex.quote(str(script))}")
    assert done.returncode == 1
    assert [word for word in ("FAILED | Runtime", "PASSED | Runtime") if word in done.stdout + done.stderr] == [
        "FAILED | Runtime",
        "PASSED | Runtime",
    ]


@pytest.mark.parametrize(("recorded_db", "least_db"), [(20.0, 19.0), (0.5, -0.5), (None, 0.0), (130.0, None)])
def test_steps_of_an_accepted_plan_set_are_held_to_what_was_recorded(
    tiny_bundle: Bundle, recorded_db: float | None, least_db: float | None
) -> None:
    """As `verify` holds them; a profile within its tolerance keeps that, and so do graphs that are fp32 always."""
    (plan_set,) = tiny_bundle.manifest.plan_sets
    profiles = [
        facts.model_copy(update={"parity": facts.parity.model_copy(update={"sqnr_db": recorded_db})})
        for facts in plan_set.profiles
    ]
    accepted = plan_set.model_copy(update={"accepted": "why", "profiles": profiles})
    usual = {part.name: part.least_db for part in polygraphy.reference_parts(tiny_bundle, plan_set)}
    parts = {part.name: part for part in polygraphy.reference_parts(tiny_bundle, accepted)}
    for name, part in parts.items():
        expected = least_db if name.startswith("step-") and least_db is not None else usual[name]
        assert part.least_db == expected
        assert ("--snr-threshold" in polygraphy.tolerance_options(part)) == (expected > 0)


@pytest.mark.parametrize("least_db", [0.3, 18.0, 36.0, 55.0])
def test_what_verify_passes_polygraphy_passes(
    written: tuple[Path, list[str]], tiny_bundle: Bundle, tmp_path: Path, least_db: float
) -> None:
    """At the edge, with errors that make the signal smaller, which is what Polygraphy measures noise against."""
    folder, said = written
    (plan_set,) = tiny_bundle.manifest.plan_sets
    part = next(one for one in polygraphy.reference_parts(tiny_bundle, plan_set) if one.name == "time")
    grown = 1 / (1 - 10 ** (-(least_db + 0.005) / 20))  # what PyTorch would have said for this engine to be so far off
    cases = tuple(Case(one.point, one.inputs, {"embedding": one.expected["embedding"] * grown}) for one in part.cases)
    moved = replace(part, cases=cases, least_db=least_db)
    polygraphy.write_cases(moved, tmp_path)
    line = with_outputs(
        next(line for line in lines_in(said) if "/time/" in line), folder / "time", tmp_path / "outputs.json"
    )
    options = polygraphy.tolerance_options(moved)
    kept = line.partition(" --compare ")[0]
    assert polygraphy_run(f"{kept} {shlex.join(options)}") == 0
    stricter = polygraphy.tolerance_options(replace(moved, least_db=least_db + 1))
    assert polygraphy_run(f"{kept} {shlex.join(stricter)}") == 1


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
@pytest.mark.parametrize("layout", ["multi-profile", "per-profile"])
def test_lines_of_tensorrt_are_understood_by_polygraphy(
    tiny_bundle: Bundle, tmp_path: Path, backend: str, layout: str
) -> None:
    """Its own parser takes them, and makes a script of them that it would run where there is a GPU."""
    plan_set = as_tensorrt(tiny_bundle, backend, layout)
    commands = polygraphy.write_polygraphy(tiny_bundle, plan_set, tmp_path / "out")
    lines = [command.line for command in commands if " --trt " in command.line]
    assert len(lines) == len(plan_set.profiles) + len(plan_set.cache)
    assert all(line.startswith("POLYGRAPHY_USE_TENSORRT_RTX=1 ") == (backend == "tensorrt-rtx") for line in lines)
    indices = range(len(plan_set.profiles)) if layout == "multi-profile" else [0] * len(plan_set.profiles)
    for line, index in zip(lines, [*indices, *[0] * len(plan_set.cache)], strict=True):
        script = tmp_path / "script.py"
        assert polygraphy_run(line, "--gen-script", str(script)) == 0
        made = script.read_text()
        assert "EngineFromBytes" in made
        assert f"optimization_profile={index}" in made
        assert "SnrCompareFunc" in made


def as_tensorrt(bundle: Bundle, backend: str, layout: str) -> PlanSet:
    """The plan set of the bundle as if TensorRT had built it; its lines name plans, which nothing opens."""
    (plan_set,) = bundle.manifest.plan_sets
    shared = plan_set.profiles[0].plan
    plans = [
        shared if layout == "multi-profile" else shared.model_copy(update={"key": facts.name})
        for facts in plan_set.profiles
    ]
    profiles = [facts.model_copy(update={"plan": plan}) for facts, plan in zip(plan_set.profiles, plans, strict=True)]
    options = {"compute_capabilities": ["8.9"], "layout": layout}
    changes = {"backend": backend, "device": "cuda", "options": options, "precision": Precision.BF16}
    return plan_set.model_copy(update=changes | {"profiles": tuple(profiles)})


def test_openvino_has_lines_for_its_graphs_alone(openvino_bundle: Bundle, tmp_path: Path) -> None:
    """Polygraphy opens no plan of OpenVINO; `fused` is among its graphs, computing and reusing."""
    plan_set = next(one for one in openvino_bundle.manifest.plan_sets if one.target == "ov-fp32")
    commands = polygraphy.write_polygraphy(openvino_bundle, plan_set, tmp_path / "out")
    assert all("/graphs/" in command.line and " --onnxrt " in command.line for command in commands)
    fused = [command for command in commands if "/fused-" in command.line]
    assert len(fused) == 2
    for command in fused:
        assert polygraphy_run(command.line) == 0


def test_options_of_a_comparison_are_refused_beside_it() -> None:
    with pytest.raises(InputError, match=r"--bisect.*leave one of them out"):
        refuse_beside_polygraphy({"--checkpoint": None, "--bisect": True})

"""A person's path through the commands."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from elit_export.backends.onnxruntime.engine import OnnxRuntimeEngine
from elit_export.backends.protocols import Array
from elit_export.bench import engines as bench
from elit_export.bundle.reading import MANIFEST, OWN_HASH, Bundle, manifest_text
from elit_export.checkpoints.native import save_checkpoint
from elit_export.cli import COMMANDS, main
from elit_export.cli.demo import solver_configs
from elit_export.errors import pip_install
from elit_export.runtime.coverage import Coverage
from elit_export.runtime.opening import unopened
from elit_export.spec import Precision, SolverFacts
from elit_export.verify import parity
from elit_export.verify.tolerances import Tolerance
from tests.helpers import a_solver, tiny_model

DATA = Path(__file__).parent.parent / "data" / "fashion"
TINY_TRAINING = [
    *("--size", "32", "--patch", "8", "--group", "2", "--width", "16", "--heads", "2"),
    *("--split", "1-2-1", "--batch-size", "8", "--warmup-steps", "2"),
]


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def ok(*arguments: str | Path) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def refused(*arguments: str | Path) -> str:
    """The message of a command that ends with status 2 and no traceback."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


# ---------------------------------------------------------------- sample


def test_sample_writes_a_grid_and_the_numbers(tiny_bundle: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "made" / "s.png"
    said = ok("sample", tiny_bundle.folder, "--out", out, "--labels", "0-2,1", "--steps", "3", "--guidance", "cfg:2")
    assert "4 images in 3 steps" in " ".join(said.split())
    with np.load(out.with_suffix(".npz")) as arrays:
        assert (arrays["images"].shape, arrays["images"].dtype) == ((4, 1, 8, 8), np.float32)
        assert arrays["labels"].tolist() == [0, 1, 2, 1]
    with Image.open(out) as picture:
        assert picture.width > picture.height > 8


def test_sample_repeats_itself_and_follows_its_seed(tiny_bundle: Bundle, tmp_path: Path) -> None:
    def latents(name: str, seed: str) -> np.ndarray:
        ok("sample", tiny_bundle.folder, "--out", tmp_path / name, "--steps", "2", "--seed", seed)
        with np.load((tmp_path / name).with_suffix(".npz")) as arrays:
            return arrays["images"]

    np.testing.assert_array_equal(latents("a.png", "1"), latents("b.png", "1"))
    assert (latents("c.png", "2") != latents("a.png", "1")).any()


def test_sample_splits_any_number_of_images_and_goes_on_with_a_numbering(tiny_bundle: Bundle, tmp_path: Path) -> None:
    def sampled(name: str, *options: str) -> tuple[np.ndarray, list[int], str]:
        said = ok(
            "sample", tiny_bundle.folder, "--out", tmp_path / name, "--steps", "2", "--guidance", "cfg:2", *options
        )
        with np.load((tmp_path / name).with_suffix(".npz")) as arrays:
            return arrays["images"], arrays["labels"].tolist(), said

    whole, labels, said = sampled("whole.png", "--images", "4", "--labels", "0-2")
    assert "12 images in 2 steps, in 3 parts of at most 4" in said
    assert labels == [0] * 4 + [1] * 4 + [2] * 4
    rest, rest_labels, _ = sampled("rest.png", "--images", "4", "--labels", "1-2", "--first-image", "4")
    assert rest_labels == labels[4:]
    np.testing.assert_allclose(rest, whole[4:], atol=1e-5)
    _, onward, _ = sampled("onward.png", "--images", "2", "--first-image", "4")  # classes go on as the numbers do
    assert onward == [2, 2, 0, 0, 1, 1]
    together, in_order, _ = sampled("together.png", "--images", "3")
    later, within, _ = sampled("later.png", "--images", "3", "--first-image", "4")  # within the images of class 1
    assert in_order[4:] == within[:5] == [1, 1, 2, 2, 2]
    assert within[5:] == [0, 0, 0, 1]
    np.testing.assert_allclose(later[:5], together[4:], atol=1e-5)


def test_the_arrays_are_named_by_what_they_are_in_the_precision_that_is_asked_for(
    tiny_bundle: Bundle, golden_g4_bundle: Bundle, tmp_path: Path
) -> None:
    for bundle, name in ((tiny_bundle, "images"), (golden_g4_bundle, "latents")):
        for dtype in ("float32", "float64"):
            out = tmp_path / f"{name}-{dtype}.npz"
            ok(
                "sample",
                bundle.folder,
                "--out",
                out,
                "--steps",
                "1",
                "--sampler",
                "euler",
                "--labels",
                "1",
                "--dtype",
                dtype,
            )
            with np.load(out) as arrays:
                assert set(arrays.files) == {name, "labels"}
                assert arrays[name].dtype == dtype
                assert arrays[name].shape[0] == 1


def test_sample_of_a_vae_model_says_that_a_decoder_is_needed(golden_g4_bundle: Bundle, tmp_path: Path) -> None:
    said = ok("sample", golden_g4_bundle.folder, "--out", tmp_path / "s.png", "--steps", "2", "--labels", "1")
    assert "for a PNG, name its folder in the recipe ([decoder] folder = …) and build again" in " ".join(said.split())
    assert (tmp_path / "s.npz").exists()
    assert not (tmp_path / "s.png").exists()


def test_class_names_serve_as_labels(fashion_bundle: Bundle, tmp_path: Path) -> None:
    ok("sample", fashion_bundle.folder, "--out", tmp_path / "s.png", "--labels", "bag,Ankle boot", "--steps", "2")
    with np.load(tmp_path / "s.npz") as arrays:
        assert arrays["labels"].tolist() == [8, 9]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--labels", "4"], "label 4 is out of range: classes are 0 to 2, 3 means no class"),
        (["--labels", "cat"], "label 'cat' is neither"),
        (["--schedule", "0"], "budget 0of4"),
        (["--schedule", "17of16"], "budget 17of16"),
        (["--schedule", "0.3"], "use 1of4 (0.25) or 2of4 (0.5)"),
        (["--steps", "4", "--schedule", "0-1:full"], "schedule gap"),
        (["--steps", "4", "--schedule", "0-2:full,2-3:half"], "schedule overlap"),
        (["--steps", "4", "--schedule", "0-4:full"], "past the last step"),
        (["--guidance", "cfg:nan"], "guidance scale nan"),
        (["--guidance", "magic:2"], "guidance 'magic:2' is none of"),
        (["--sampler", "rk4"], "unknown sampler 'rk4'"),
        (["--first-image", "-1"], "--first-image -1 is out of range"),
        (["--target", "gpu"], "no plan set for --target gpu"),
    ],
)
def test_sample_refuses_what_is_wrong(tiny_bundle: Bundle, tmp_path: Path, options: list[str], said: str) -> None:
    assert said in refused("sample", tiny_bundle.folder, "--out", tmp_path / "s.png", *options)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- demo


def test_demo_draws_from_a_bundle_without_torch(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """With the files alone that running needs."""
    running = tmp_path / "running"
    shutil.copytree(tiny_bundle.folder, running, ignore=shutil.ignore_patterns("graphs", "reference"))
    code = (
        "import sys\nfrom elit_export.cli import main\nmain(sys.argv[1:], standalone_mode=False)\n"
        "assert not {'torch', 'onnx'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, "demo", "--bundle", str(running), "--out", str(tmp_path / "drawn")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "quarter, then full" in done.stdout
    assert [path.name for path in (tmp_path / "drawn").iterdir()] == ["demo.png"]
    with Image.open(tmp_path / "drawn" / "demo.png") as picture:
        assert picture.size == (3 * (3 * 10 + 2), 3 * (4 * 10 + 2))  # three classes; three budgets and the mixed row


def test_demo_counts_flops_and_writes_them(tiny_bundle: Bundle, tmp_path: Path) -> None:
    rows = only_json("demo", "--bundle", tiny_bundle.folder, "--out", tmp_path)
    assert [row["row"] for row in rows] == ["full", "half", "quarter", "quarter, then full"]
    assert rows[0]["gflop_per_image"] > rows[1]["gflop_per_image"] > rows[2]["gflop_per_image"]


def test_demo_draws_by_tables_that_were_made_for_its_rows(tiny_bundle: Bundle) -> None:
    """Of the guidance at all t and the full budget, once for a name; one of budgets that no engine has is left out."""
    table = a_solver().table
    on = unopened(tiny_bundle, tiny_bundle.manifest.plan_sets[0])
    kept = [budget.kept for budget in on.coverage.covered]
    solvers = (
        a_solver(guidance_interval=(0.2, 0.9)),
        a_solver(),
        a_solver(precision=Precision.BF16),
        a_solver(guidance="cfg:3"),
        a_solver(table=replace(table, budgets=(kept[-1], kept[0]))),
    )

    def configs(*solvers: SolverFacts, covered: Coverage = on.coverage) -> list[tuple[str, str]]:
        return [(each.name, each.sampler) for each in solver_configs(on.spec, replace(covered, solvers=solvers))]

    assert configs(*solvers) == [("full", "solver:2"), ("mixed", "solver:2,mixed")]
    assert configs(a_solver(schedule="half")) == []
    few = [profile for profile in on.coverage.profiles if profile.latents.min == on.spec.full.kept]
    assert configs(*solvers, covered=replace(on.coverage, profiles=tuple(few))) == [("full", "solver:2")]
    assert configs(*solvers, covered=replace(on.coverage, profiles=())) == []


def test_demo_draws_from_engines_of_few_rows(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """Three images with guidance are six rows, and a call takes two."""
    few = Path(shutil.copytree(tiny_bundle.folder, tmp_path / "few"))
    values = json.loads((few / MANIFEST).read_text())
    del values[OWN_HASH]
    for profile in (profile for plan_set in values["plan_sets"] for profile in plan_set["profiles"]):
        profile["rows"] = [1, 2, 2]
    (few / MANIFEST).write_text(manifest_text(values))
    said = ok("demo", "--bundle", few, "--out", tmp_path / "drawn")
    assert "3 images, at most 1 at once" in said
    ok("demo", "--bundle", tiny_bundle.folder, "--out", tmp_path / "whole")
    with Image.open(tmp_path / "drawn/demo.png") as one, Image.open(tmp_path / "whole/demo.png") as other:
        assert np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)).max() <= 1


def covering(low: int, high: int, bundle: Bundle, folder: Path) -> Path:
    """A copy with one profile for these budgets."""
    copied = Path(shutil.copytree(bundle.folder, folder))
    values = json.loads((copied / MANIFEST).read_text())
    del values[OWN_HASH]
    plan_set = values["plan_sets"][0]
    plan_set["profiles"] = [plan_set["profiles"][0] | {"latents": [low, low, high]}]
    (copied / MANIFEST).write_text(manifest_text(values))
    return copied


@pytest.mark.parametrize(
    ("low", "high", "drawn"),
    [
        (1, 3, ["half", "quarter", "quarter, then half"]),
        (2, 4, ["full", "half", "half, then full"]),
        (1, 1, ["quarter"]),
    ],
)
def test_demo_draws_what_a_bundle_covers(
    low: int, high: int, drawn: list[str], tiny_bundle: Bundle, tmp_path: Path
) -> None:
    folder = covering(low, high, tiny_bundle, tmp_path / "copied")
    rows = only_json("demo", "--bundle", folder, "--out", tmp_path / "drawn")
    assert [row["row"] for row in rows] == drawn


def test_demo_refuses_a_bundle_without_named_budgets(tiny_bundle: Bundle, tmp_path: Path) -> None:
    folder = covering(3, 3, tiny_bundle, tmp_path / "copied")
    said = refused("demo", "--bundle", folder, "--out", tmp_path / "drawn")
    assert "no profile covers any of full, half, quarter" in said
    assert "the engines cover 3of4; elit-export sample BUNDLE --schedule BUDGET" in said


def test_demo_refuses_latents(golden_g4_bundle: Bundle, tmp_path: Path) -> None:
    folder = golden_g4_bundle.folder
    said = refused("demo", "--bundle", folder, "--out", tmp_path / "drawn")
    assert "has no decoder to draw them with; name its folder in the recipe ([decoder] folder = …)" in said
    assert f"elit-export sample {folder}" in said
    assert not (tmp_path / "drawn").exists()


def test_demo_refuses_a_target_without_a_bundle(tmp_path: Path) -> None:
    assert "give --bundle BUNDLE too" in refused("demo", "--target", "cpu", "--out", tmp_path / "drawn")
    assert list(tmp_path.iterdir()) == []


def test_demo_without_torch_says_that_a_bundle_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rooms = ("elit_export.compiler.", "elit_export.checkpoints.")
    for name in [name for name in sys.modules if name.startswith(rooms)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    said = refused("demo", "--out", tmp_path / "drawn")
    assert pip_install("export") in said
    assert "elit-export demo --bundle BUNDLE" in said
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- export, build, inspect


def test_build_then_inspect(tiny_checkpoint: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(
        f"""
        name = "tiny"
        checkpoint = "{tiny_checkpoint}"
        rows = {{ min = 1, opt = 2, max = 4 }}
        [[profiles]]
        name = "high"
        latents = {{ min = 3, opt = 4, max = 4 }}
        [targets.first]
        backend = "onnxruntime"
        device = "cpu"
        precision = "fp32"
        [targets.here]
        backend = "onnxruntime"
        device = "cpu"
        precision = "fp32"
        """
    )
    for target, other in (("first", "here"), ("here", "first")):
        said = ok("build", recipe, "--target", target, "--out", tmp_path / "bundle")
        assert "wrote" in said
        assert f"target {target}: onnxruntime on cpu" in said
        assert f"target {other}:" not in said  # what was built before
        assert "one forward pass" not in said
    built = only_json("build", recipe, "--target", "here", "--out", tmp_path / "bundle")
    assert (built["changed"], built["plan_set"]["target"]) == (False, "here")
    facts = only_json("inspect", tmp_path / "bundle")
    assert facts["kind"] == "bundle"
    assert facts["plan_sets"][0]["covered"] == "3of4, 4of4"
    assert facts["budgets"][0] == {"name": "full", "budget": "4of4", "flops": facts["budgets"][0]["flops"]} | {
        "share_of_full": 1.0
    }
    assert [plan_set["target"] for plan_set in facts["plan_sets"]] == ["first", "here"]
    said = refused("sample", tmp_path / "bundle", "--schedule", "1", "--target", "here")
    assert "no profile covers budget 1of4" in said


def test_inspect_shows_a_checkpoint(tiny_checkpoint: Path) -> None:
    said = ok("inspect", tiny_checkpoint)
    assert "1-2-1" in said
    assert "4of4" in said
    assert only_json("inspect", tiny_checkpoint)["shapes"]["latents_per_group"] == 4


def test_export_writes_a_graph(tiny_checkpoint: Path, tmp_path: Path) -> None:
    ok("export", tiny_checkpoint, "--out", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"step.onnx", "step.onnx.data"}


@pytest.mark.parametrize(
    ("options", "precision"),
    [
        ((), "fp32"),
        (("--precision", "fp32"), "fp32"),
        (("--precision", "fp16"), "fp16"),
        (("--precision", "bf16"), "bf16"),
    ],
)
def test_export_takes_a_precision(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], precision: str
) -> None:
    asked: list[str] = []

    def export_graph(_model: object, name: str, folder: Path, precision: Precision) -> Path:
        asked.append(f"{name}-{precision.value}")
        folder.mkdir(exist_ok=True)
        onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], name, [], [])), folder / f"{name}.onnx")
        return folder / f"{name}.onnx"

    monkeypatch.setattr("elit_export.graphs.export.export_graph", export_graph)
    said = ok("export", tiny_checkpoint, "--out", tmp_path / "out", *options)
    assert said.startswith(f"wrote {tmp_path / 'out' / 'step.onnx'} and step.onnx.data\n")
    assert asked == [f"step-{precision}"]


def test_export_refuses_a_precision(tiny_checkpoint: Path, tmp_path: Path) -> None:
    narrow = tmp_path / "narrow.safetensors"
    save_checkpoint(narrow, tiny_model(hidden_size=16))
    for checkpoint, precision, said in (
        (
            narrow,
            "bf16",
            "heads of 8 channels (width 16, 2 heads): native attention in bf16 wants a multiple of 8 from",
        ),
        (tiny_checkpoint, "fp8", "'fp8' is not one of 'fp32', 'fp16', 'bf16'"),
    ):
        assert said in refused("export", checkpoint, "--out", tmp_path / "out", "--precision", precision)
        assert not (tmp_path / "out").exists()


def test_build_refuses_a_device_that_is_not_there(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The library itself would quietly use the CPU."""
    recipe = tmp_path / "gpu.toml"
    recipe.write_text(
        f'name = "gpu"\ncheckpoint = "{tiny_checkpoint}"\nrows = {{ min = 1, opt = 1, max = 1 }}\n'
        '[targets.gpu]\nbackend = "onnxruntime"\ndevice = "cuda"\nprecision = "fp32"\n'
    )
    assert "CUDAExecutionProvider" in refused("build", recipe, "--out", tmp_path / "bundle")
    assert not (tmp_path / "bundle" / "manifest.json").exists()


def test_recipe_errors_name_the_key(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text('name = "r"\nrowz = 1\n[targets.cpu]\nbackend = "onnxruntime"\n')
    assert "rowz: unknown key (did you mean 'rows'?)" in refused("build", tmp_path / "r.toml")


def test_recipe_without_a_checkpoint_says_how_to_give_one(tmp_path: Path) -> None:
    recipe = Path(__file__).parent.parent.parent / "engines" / "elit-sit-xl-2-256.toml"
    assert "--checkpoint FILE" in refused("build", recipe, "--target", "cpu", "--out", tmp_path / "bundle")


def test_damaged_plan_is_a_clear_error(tiny_bundle: Bundle, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(tiny_bundle.folder, tmp_path / "copied"))
    next(copied.glob("plans/*/step.onnx")).unlink()
    assert "missing" in refused("sample", copied)


def test_bench_compares_the_samplers(tiny_bundle: Bundle, tmp_path: Path) -> None:
    said = ok("bench", "samplers", tiny_bundle.folder, "--images", "2", "--json", tmp_path / "b.json")
    assert "ab3" in said
    heun = json.loads((tmp_path / "b.json").read_text())["samplers"][2]
    assert (heun["sampler"], heun["steps"], heun["calls"]) == ("heun", 8, 15)


def test_bench_holds_bars_and_draws(tiny_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "limits.json").write_text('[{"metric": "switching", "max": 1000}, {"metric": "rows", "min": 9}]')
    options = ("--rows", "4", "--rounds", "2", "--plot", tmp_path / "p.png", "--check", tmp_path / "limits.json")
    result = run("bench", "engines", tiny_bundle.folder, *options)
    assert result.exit_code == 1, result.output
    assert "rows is 4, the limit is at least 9" in result.output
    assert "switching is" not in result.output
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.width > 500


def test_bench_compares_with_pytorch(tiny_bundle: Bundle, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Without torch.compile, which takes a minute even here."""
    committed = json.loads((Path(__file__).parent.parent.parent / "benchmarks" / "limits.json").read_text())
    (tmp_path / "limits.json").write_text(json.dumps([{"metric": bar["metric"], "max": 1000} for bar in committed]))
    options = ("--checkpoint", tiny_checkpoint, "--no-compile", "--rows", "2", "--rounds", "2")
    facts = only_json("bench", "engines", tiny_bundle.folder, *options, "--check", tmp_path / "limits.json")
    assert set(facts["budgets"][0]["speedups"]) == {"eager"}


def test_bench_refuses_the_checkpoint_of_another_model(tiny_bundle: Bundle, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "other.safetensors", tiny_model(core_depth=1))
    said = refused("bench", "engines", tiny_bundle.folder, "--checkpoint", tmp_path / "other.safetensors")
    assert "was not built from" in said
    assert "sha256 differs" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["engines", "--rounds", "0"], "0 is not in the range 1<=x<="),
        (["engines", "--rows", "0"], "0 is not in the range 1<=x<="),
        (["engines", "--rows", "9"], "choose other --rows"),
        (["engines", "--guidance", "cfg:4"], "No such option"),  # it would measure cfg:2
        (["samplers", "--plot", "p.png"], "No such option"),
        (["soak", "--plot", "p.png"], "No such option"),
        (["soak", "--checkpoint", "c.pt"], "No such option"),
        (["memory", "--rows", "2"], "No such option"),
        (["engines", "--no-compile"], "give --checkpoint FILE too"),
    ],
)
def test_bench_refuses_before_it_measures(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, options: list[str], said: str
) -> None:
    monkeypatch.delattr(bench, "matmul_peak_gflops")
    command, *rest = options
    assert said in refused("bench", command, tiny_bundle.folder, *rest)


def test_bench_tells_what_engines_hold(tiny_bundle: Bundle) -> None:
    facts = only_json("bench", "memory", tiny_bundle.folder)["memory"]
    assert min(facts["whole_bytes"], facts["one_bytes"]) > 0
    assert facts["ratio"] == facts["whole_bytes"] / facts["one_bytes"]
    assert facts["plan_bytes"] == tiny_bundle.manifest.plan_sets[0].model_bytes


@pytest.mark.parametrize(
    ("old", "command"),
    [
        (("--soak", "10"), "soak"),
        (("--samplers", "--rows", "1"), "samplers"),
        (("--rows", "2", "--rounds", "1", "--no-sampling"), "engines"),
    ],
)
def test_bench_as_it_was_typed_before_works_with_a_warning(
    tiny_bundle: Bundle, old: tuple[str, ...], command: str
) -> None:
    result = run("bench", tiny_bundle.folder, *old)
    assert result.exit_code == 0, result.output
    assert f"is now `bench {command} BUNDLE" in result.stderr


def test_a_mistyped_bench_is_not_taken_for_a_bundle(tiny_bundle: Bundle) -> None:
    assert "No such command 'sampler'" in refused("bench", "sampler", tiny_bundle.folder)


def test_quality_has_a_command_of_its_own(tiny_bundle: Bundle) -> None:
    assert "elit-export evaluate BUNDLE" in refused("bench", tiny_bundle.folder, "--quality")


def test_bench_misses_matplotlib_before_it_measures(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoMatplotlib:
        @staticmethod
        def find_spec(name: str, *_: object) -> None:
            if name == "matplotlib":
                raise ModuleNotFoundError(name=name)

    monkeypatch.delattr(bench, "matmul_peak_gflops")
    monkeypatch.setattr(sys, "meta_path", [NoMatplotlib, *sys.meta_path])
    for name in ("matplotlib", "matplotlib.figure", "elit_export.report.plots"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr("elit_export.report.plots", raising=False)
    said = refused("bench", "engines", tiny_bundle.folder, "--plot", tmp_path / "p.png")
    assert f"this command needs matplotlib; {pip_install('report')}" in said


# ---------------------------------------------------------------- verify, doctor


def only_json(*arguments: str | Path) -> Any:
    """What a command prints on standard output with `--json -`: JSON and nothing else."""
    result = run(*arguments, "--json", "-")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_verify_shows_every_comparison(tiny_bundle: Bundle, tiny_checkpoint: Path) -> None:
    assert "trajectory multistep" in ok("verify", tiny_bundle.folder)
    facts = only_json("verify", tiny_bundle.folder, "--checkpoint", tiny_checkpoint)
    assert all(comparison["passed"] for comparison in facts)


def test_verify_ends_with_a_verdict(tiny_bundle: Bundle) -> None:
    last = ok("verify", tiny_bundle.folder).splitlines()[-1]
    assert re.fullmatch(r"cpu fp32: (\d+) of \1 pass, worst margin \+\d+\.\d dB", last), last


def test_verify_ends_with_1_and_says_what_would_have_passed(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict = {precision: Tolerance(step_db=1000.0, trajectory_db=0.0) for precision in parity.TOLERANCES}
    monkeypatch.setattr(parity, "TOLERANCES", strict)
    result = run("verify", tiny_bundle.folder)
    assert result.exit_code == 1
    assert "profile full, K=4 rows=1 velocity" in result.output
    assert "would have passed" in result.output
    assert re.search(r"cpu fp32: \d+ of \d+ pass, worst margin -\d+\.\d dB", result.output)


@pytest.fixture(scope="module")
def two_targets(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle, its plans a second time under another target's name."""
    folder = tmp_path_factory.mktemp("two") / "bundle"
    copied = Path(shutil.copytree(tiny_bundle.folder, folder))
    values = json.loads((copied / MANIFEST).read_text())
    del values[OWN_HASH]
    values["plan_sets"].append(values["plan_sets"][0] | {"target": "other"})
    (copied / MANIFEST).write_text(manifest_text(values))
    return copied


NAMES = ["cpu fp32", "other fp32"]


def test_verify_takes_all_targets(two_targets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = ok("verify", two_targets, "--all").splitlines()
    assert [line.split(":")[0] for line in said if " pass, " in line] == NAMES
    assert list(only_json("verify", two_targets, "--all")["plan_sets"]) == NAMES
    assert list(only_json("verify", two_targets, "--all", "--target", "other")["plan_sets"]) == NAMES[1:]
    monkeypatch.setitem(parity.TOLERANCES, Precision.FP32, Tolerance(step_db=1000.0, trajectory_db=0.0))
    missed = run("verify", two_targets, "--all")
    assert missed.exit_code == 1
    assert all(f"{name}: " in missed.output for name in NAMES)  # also after the first one's miss


def test_bench_takes_all_targets_and_holds_each_to_the_limits(two_targets: Path, tmp_path: Path) -> None:
    (tmp_path / "limits.json").write_text('[{"metric": "memory.ratio", "max": 0}]')
    result = run("bench", "memory", two_targets, "--all", "--check", tmp_path / "limits.json", "--json", "-")
    assert result.exit_code == 1, result.output
    assert list(json.loads(result.stdout)["plan_sets"]) == NAMES
    assert all(f"{name}: memory.ratio is" in result.stderr for name in NAMES)
    said = refused("bench", "engines", two_targets, "--all", "--plot", tmp_path / "p.png")
    assert "is of one plan set; choose it with --target in place of --all" in said


def test_verify_of_an_engine_that_is_not_finite_ends_with_1_and_shows_the_table(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = OnnxRuntimeEngine.__call__

    def not_finite(engine: OnnxRuntimeEngine, inputs: Mapping[str, Array]) -> dict[str, Array]:
        outputs = dict(real(engine, inputs))
        return {name: np.full_like(array, np.nan) if name == "velocity" else array for name, array in outputs.items()}

    monkeypatch.setattr(OnnxRuntimeEngine, "__call__", not_finite)
    result = run("verify", tiny_bundle.folder)
    assert result.exit_code == 1, result.output
    assert "one step against PyTorch" in result.output
    assert "profile full, K=4 rows=1 velocity: SQNR -inf dB: no tolerance would have passed" in result.output
    assert "trajectory plain (profiles full), step 0: nothing to compare: step 0" in result.output


def test_doctor_tells_what_works_and_what_to_type() -> None:
    found = {(finding["what"], finding["detail"].split(",")[0]): finding for finding in only_json("doctor")}
    assert found["backend onnxruntime", "cpu"]["works"]
    cuda = found["backend onnxruntime", "cuda"]
    assert cuda["works"] or cuda["remedy"]


# ---------------------------------------------------------------- help


def test_help_lists_all_commands_with_the_first_sentence_of_their_own_help() -> None:
    said = " ".join(ok("--help").split())
    for name, short_help in COMMANDS.items():
        assert f"{name} {short_help}" in said
        own = " ".join(ok(name, "--help").split())
        assert f"Usage: main {name} [OPTIONS]" in own
        assert short_help in own


def test_an_unknown_command_is_refused_with_the_one_that_is_meant() -> None:
    assert "No such command 'smaple'" in refused("smaple")


# ---------------------------------------------------------------- odd paths and files


def test_a_path_that_cannot_be_written_is_a_clear_error(tiny_bundle: Bundle) -> None:
    assert "error: /proc" in refused("sample", tiny_bundle.folder, "--steps", "1", "--out", "/proc/nowhere/s.png")


def test_brackets_in_a_path_are_printed_as_they_are(tiny_bundle: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "[red]" / "s.png"
    assert str(out) in ok("sample", tiny_bundle.folder, "--steps", "1", "--out", out)


@pytest.mark.parametrize("labels", ["²", "1--2", "-1"])
def test_odd_labels_are_refused(tiny_bundle: Bundle, labels: str) -> None:
    assert "is neither a number" in refused("sample", tiny_bundle.folder, f"--labels={labels}")


def test_other_picture_formats_are_refused(tiny_bundle: Bundle, tmp_path: Path) -> None:
    assert "written as .png" in refused("sample", tiny_bundle.folder, "--out", tmp_path / "s.jpg")


# ---------------------------------------------------------------- train


def test_train_ships_weights_that_sample(tmp_path: Path) -> None:
    said = ok("train", DATA, "--out", tmp_path / "run", "--steps", "4", *TINY_TRAINING)
    assert "held out: 32 images" in said
    held_out = json.loads((tmp_path / "run" / "held_out.json").read_text())
    assert [row["budget"] for row in held_out] == ["4of4", "3of4", "2of4", "1of4"]
    assert "1-2-1" in ok("inspect", tmp_path / "run" / "model.safetensors")


def test_training_on_with_more_steps_says_what_becomes_of_the_learning_rate(tmp_path: Path) -> None:
    command = ("train", DATA, "--out", tmp_path / "run", *TINY_TRAINING)
    first = json.loads(run(*command, "--steps", "2", "--json", "-").stdout)
    assert (first["step"], len(first["held_out"])) == (2, 4)
    said = " ".join(ok(*command, "--steps", "4").split())
    assert (
        "resumed at step 2 the run is of 4 steps now, it was of 2; the learning rate goes on along the cosine" in said
    )
    assert "past the last of --steps 3; give --steps 4 or more" in refused(*command, "--steps", "3")


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "elit_export", *(str(argument) for argument in arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def wait_for(path: Path, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.05)


def test_interrupted_training_goes_on_where_it_stopped(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = ("train", DATA, "--out", out, "--steps", "100000", "--save-every", "5", *TINY_TRAINING)
    process = start(*command)
    wait_for(out / "train.jsonl")
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "run the same command to go on" in " ".join(said.split())
    assert {path.name for path in out.iterdir()} == {"state.pt", "train.jsonl"}
    stopped = json.loads((out / "train.jsonl").read_text().splitlines()[-1])["step"]
    process = start(*command)
    while "resumed at step" not in (line := process.stdout.readline() if process.stdout else ""):
        assert line, process.communicate()[1]
    process.kill()
    process.communicate()
    assert f"resumed at step {stopped}" in line


def test_interrupted_sampling_leaves_no_file(golden_g4_bundle: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "s.png"
    process = start("sample", golden_g4_bundle.folder, "--out", out, "--steps", "10000", "--labels", "1")
    assert process.stderr is not None
    time.sleep(4)  # well inside the million steps, well after the start
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "interrupted" in said
    assert list(tmp_path.iterdir()) == []


def test_help_lists_every_command() -> None:
    said = ok("--help")
    assert all(name in said for name in ("bench", "build", "demo", "export", "inspect", "sample", "train"))

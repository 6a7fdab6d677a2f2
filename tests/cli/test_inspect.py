"""`inspect` says what a file is, whatever it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from elit_export.bundle.reading import Bundle
from elit_export.cli import main


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


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
    assert facts["checkpoint_sha256"] == tiny_bundle.manifest.model.checkpoint_sha256
    assert {"array": "x", "type": "float32", "dims": "96 × 1 × 8 × 8"} in facts["arrays"]
    assert "cfg:2" in said


@pytest.mark.parametrize(
    ("arrays", "kind"),
    [
        ({"text": np.zeros((2, 3, 4), np.float32), "mask": np.ones((2, 3), np.int64)}, "embedded prompts"),
        ({"latents": np.zeros((2, 1, 8, 8)), "labels": np.zeros(2, np.int64)}, "samples"),
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
    (tmp_path / "train.jsonl").write_text("{")
    assert "a damaged log" in refused(tmp_path)


# ---------------------------------------------------------------- bundles and names


def test_a_bundle_says_how_many_parameters_and_nothing_of_what_it_has_not(tiny_bundle: Bundle) -> None:
    facts, said = inspected(tiny_bundle.folder, "--target", "cpu", "--precision", "fp32")
    assert facts["parameters"] == 91_780
    assert [plan_set["target"] for plan_set in facts["plan_sets"]] == ["cpu"]
    cells = [[cell.strip() for cell in line.split("│")[1:3]] for line in said.splitlines() if line.startswith("│")]
    assert ["parameters", "91780"] in cells
    assert not [name for name, value in cells if value in ("0", "0.0", "False", "None")]


def test_options_of_a_bundle_are_refused_for_anything_else(tiny_checkpoint: Path) -> None:
    for path in (tiny_checkpoint, "ELIT-SiT-XL/2"):
        assert "for which there is no --target; leave it out" in refused(path, "--target", "cpu")


def test_a_named_model_is_told_times_with_two_digits_and_small_gpus() -> None:
    facts, said = inspected("ELIT-SiT-XL/2")
    times = [line.split("│")[2].strip() for line in said.split("expected time")[1].splitlines() if line.startswith("│")]
    assert times == ["1.2", "0.89", "0.72", "0.64", "0.59"]
    assert 24 in facts["deployment"]["gpus"].values()
    assert "24 GB" in said

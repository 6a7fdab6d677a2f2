"""A folder of diffusers and a file of Read and Write, from the command line and from recipes; sizes by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from elit_export.checkpoints.diffusers import save_interface
from elit_export.checkpoints.native import save_checkpoint
from elit_export.models.mmdit import ElitMMDiT
from tests.checkpoints.test_diffusers import written_base
from tests.cli.test_cli import ok, only_json, refused
from tests.test_architecture import HEAVY, modules_after
from tests.text_models import shallow_text_model, text_model, text_spec

REMEDY = 'give the file that does, as checkpoints.diffusers.save_interface writes it: `interface = "FILE"` in'
RECIPE = """
name = "text"
checkpoint = "base"
{interface}
rows = {{ min = 1, opt = 1, max = 2 }}
text = {{ min = 1, opt = 4, max = 32 }}
[targets.cpu]
backend = "onnxruntime"
device = "cpu"
precision = "fp32"
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, with its weights in bf16, and `interface.safetensors` of a small model. Do not change them."""
    folder = tmp_path_factory.mktemp("folders")
    model = shallow_text_model()
    written_base(model, folder / "base", torch.bfloat16)
    save_interface(folder / "interface.safetensors", model)
    return folder


def test_a_folder_is_exported(here: Path, tmp_path: Path) -> None:
    ok("export", here / "base", "--interface", here / "interface.safetensors", "--out", tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"step.onnx", "step.onnx.data"}


def test_a_folder_is_inspected(here: Path) -> None:
    facts = only_json("inspect", here / "base", "--interface", here / "interface.safetensors", "--text", "7")
    files = [*(here / "base").iterdir(), here / "interface.safetensors"]
    assert (facts["kind"], facts["file"], facts["text_tokens"]) == ("checkpoint", "base", 7)
    assert facts["size_bytes"] == sum(file.stat().st_size for file in files)
    assert facts["shapes"]["split"] == "1-1-0"
    more = only_json("inspect", here / "base", "--interface", here / "interface.safetensors", "--text", "8")
    assert more["budgets"][0]["flops"] > facts["budgets"][0]["flops"]


def test_a_folder_alone_is_refused_with_both_remedies(here: Path, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(RECIPE.format(interface="").replace('"base"', f'"{here / "base"}"'))
    for arguments in (
        ("export", here / "base", "--out", tmp_path / "out"),
        ("inspect", here / "base"),
        ("build", tmp_path / "r.toml", "--out", tmp_path / "out"),
    ):
        said = refused(*arguments)
        assert REMEDY in said
        assert "or --interface FILE" in said
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_file_with_an_interface_is_refused(here: Path, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "whole.safetensors", text_model())
    said = refused("inspect", tmp_path / "whole.safetensors", "--interface", here / "interface.safetensors")
    assert "a file holds its Read and Write; leave `interface`" in said


@pytest.mark.parametrize("by_option", [True, False])
def test_build_takes_the_interface_of_the_recipe_or_of_the_command_line(
    here: Path, tmp_path: Path, by_option: bool
) -> None:
    """One of another width, which is refused by name: reading it is what shows which was taken."""
    other = tmp_path / "other.safetensors"
    save_interface(other, ElitMMDiT(text_spec(hidden_size=128)))
    named = here / "interface.safetensors" if by_option else other
    recipe = tmp_path / "r.toml"
    recipe.write_text(RECIPE.format(interface=f'interface = "{named}"').replace('"base"', f'"{here / "base"}"'))
    options = ["--interface", other] if by_option else []
    said = refused("build", recipe, "--out", tmp_path / "out", *options)
    assert f"does not fit the Read and Write in {other}, of width 128" in said


# ---------------------------------------------------------------- a bundle of a folder


@pytest.fixture(scope="module")
def bundle(here: Path) -> Path:
    """Built of what is `here`. Do not change it."""
    (here / "r.toml").write_text(RECIPE.format(interface='interface = "interface.safetensors"'))
    ok("build", here / "r.toml", "--out", here / "bundle")
    return here / "bundle"


def test_a_bundle_of_a_folder_is_verified_live_and_stored(here: Path, bundle: Path) -> None:
    """Stored answers are of weights widened one by one, live ones too; engines hold the same weights in fp32."""
    live = ("--checkpoint", here / "base", "--interface", here / "interface.safetensors")
    stored, again = (only_json("verify", bundle, *options) for options in ((), live))
    assert len(stored) == len(again) > 10
    assert all(comparison["passed"] for comparison in (*stored, *again))
    assert [comparison["found"] for comparison in stored] == [comparison["found"] for comparison in again]


def test_a_bundle_of_a_folder_is_measured_beside_pytorch(here: Path, bundle: Path) -> None:
    quick = ("--no-compile", "--no-sampling", "--rounds", "1", "--rows", "1")
    live = ("--checkpoint", here / "base", "--interface", here / "interface.safetensors")
    facts = only_json("bench", "engines", bundle, *live, *quick)
    assert all(budget["speedups"]["eager"] > 0 for budget in facts["budgets"])
    side_by_side = only_json("bench", "backends", bundle, *live, "--rounds", "1", "--rows", "1")
    assert side_by_side["backends"]


def test_read_and_write_of_another_training_are_not_those_of_the_bundle(
    here: Path, bundle: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.safetensors"
    save_interface(other, ElitMMDiT(text_spec(input_size=8, group_size=2, core_depth=1, tail_depth=0)))
    for command in (("verify",), ("bench", "engines", "--rows", "1")):
        said = refused(*command, bundle, "--checkpoint", here / "base", "--interface", other)
        assert f"was not built from {here / 'base'} with {other} (sha256 differs)" in said
        assert REMEDY in refused(*command, bundle, "--checkpoint", here / "base")
        assert "--checkpoint FOLDER" in refused(*command, bundle, "--interface", other)


def test_a_folder_that_is_neither_bundle_nor_checkpoint_is_no_bundle(tmp_path: Path) -> None:
    assert "bundle" in refused("inspect", tmp_path)


# ---------------------------------------------------------------- sizes by name


def test_a_named_size_shows_what_it_asks_of_a_gpu() -> None:
    said = ok("inspect", "ELIT-Qwen-Image", "--resolution", "1024")
    assert "20624708160" in said
    assert "nothing measured" in said
    facts = only_json("inspect", "ELIT-Qwen-Image", "--resolution", "1024")
    found = facts["deployment"]
    bf16 = found["precisions"]["bf16"]
    assert bf16["weight_bytes"] == 2 * found["rounded_parameters"] + 4 * found["exact_parameters"]
    assert bf16["per_profile_bytes"] == 4 * bf16["weight_bytes"]
    assert len(bf16["fits_one_plan"]) == 4
    assert bf16["fits_per_profile"] == []
    assert found["weak"] == "eighth"
    assert found["guided_share"]["full"] == pytest.approx(0.688, rel=0.02)
    assert bf16["activation_bytes"] < found["precisions"]["fp32"]["activation_bytes"]
    for budget in facts["budgets"]:
        seconds = found["step_ms"][budget["name"]] / 1000
        assert seconds * found["assumed_flops"] == pytest.approx(found["rows"] * budget["flops"])


def test_a_name_takes_a_head_and_nothing_else_of_a_checkpoint(tmp_path: Path) -> None:
    assert only_json("inspect", "ELIT-SiT-S/2", "--head-depth", "2")["shapes"]["split"].startswith("2-")
    for option, value in (("--num-heads", 3), ("--tail-depth", 1), ("--interface", tmp_path / "i.safetensors")):
        said = refused("inspect", "ELIT-SiT-S/2", option, str(value))
        assert f"ELIT-SiT-S/2 is the name of a size, for which there is no {option}; leave it out" in said
    assert "at most 1,024 tokens" in refused("inspect", "ELIT-Qwen-Image", "--resolution", "1024", "--text", "5000")


def test_a_name_needs_no_torch_and_a_wrong_one_is_no_checkpoint() -> None:
    named = "from elit_export.report.inspection import inspect_path; inspect_path('ELIT-SiT-XL/2')"
    assert modules_after(named).isdisjoint(HEAVY)
    assert "no checkpoint at ELIT-Qwen-Imag" in refused("inspect", "ELIT-Qwen-Imag")

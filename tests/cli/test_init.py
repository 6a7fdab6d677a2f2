"""init, and build without a recipe."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from elit_export.bundle.recipe import load_recipe
from elit_export.checkpoints.diffusers import save_interface
from elit_export.cli import main
from elit_export.models.elit import Elit
from tests.checkpoints.test_diffusers import written_base
from tests.helpers import Golden
from tests.text_models import text_model


def run(*arguments: str | Path) -> tuple[int, str]:
    done = CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)
    return done.exit_code, " ".join(done.output.split())


def test_a_recipe_names_its_checkpoint_from_where_it_lies(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "recipes" / "mine.toml"
    assert run("init", tiny_checkpoint, "--target", "cpu,rtx", "--out", out) == (
        0,
        f"wrote {out}; next: elit-export build {out} --target cpu",
    )
    recipe = load_recipe(out)
    assert recipe.checkpoint
    assert Path(recipe.checkpoint).samefile(tiny_checkpoint)
    assert not Path(recipe.checkpoint.removeprefix(f"{out.parent}/")).is_absolute()
    assert list(recipe.targets) == ["cpu", "rtx"]


def test_an_existing_recipe_is_kept(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("mine")
    status, said = run("init", "shipped:fashion", "--out", tmp_path / "recipe.toml")
    assert (status, (tmp_path / "recipe.toml").read_text()) == (2, "mine")
    assert "there is such a file; choose another name, or remove it" in said


def test_a_folder_of_diffusers_is_named_with_its_interface(tmp_path: Path) -> None:
    model: Elit = text_model()
    written_base(model, tmp_path / "base", torch.float32)
    save_interface(tmp_path / "interface.safetensors", model)
    out = tmp_path / "recipe.toml"
    status, said = run("init", tmp_path / "base", "--interface", tmp_path / "interface.safetensors", "--out", out)
    assert status == 0, said
    recipe = load_recipe(out)
    assert (recipe.checkpoint, recipe.interface) == (str(tmp_path / "base"), str(tmp_path / "interface.safetensors"))
    assert recipe.text


def test_a_released_file_that_names_no_size_is_no_dead_end(golden_g4: Golden, tmp_path: Path) -> None:
    """`build` refuses it with a command that works when its numbers are filled in, and so does what that advises."""
    checkpoint = golden_g4.save_pt(tmp_path / "g4.pt")
    spec = golden_g4.spec
    status, said = run("build", checkpoint, "--target", "cpu", "--out", tmp_path / "bundle")
    assert status == 2
    assert "table [architecture], num_heads = N, tail_depth = N," in said
    command = said.partition("this writes a recipe: elit-export ")[2].split()
    assert command == ["init", str(checkpoint), "--num-heads", "N", "--tail-depth", "N"]
    command[3], command[5] = str(spec.num_heads), str(spec.tail_depth)
    out = tmp_path / "recipe.toml"
    assert run(*command, "--out", out)[0] == 0
    assert load_recipe(out).architecture.num_heads == spec.num_heads
    status, said = run("build", out, "--target", "cpu", "--out", tmp_path / "bundle")
    assert status == 0, said


def test_a_checkpoint_is_built_as_by_the_recipe_that_init_writes(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After `build CHECKPOINT` a build by the recipe has nothing to do."""
    shutil.copy(tiny_checkpoint, tmp_path / "tiny.safetensors")
    monkeypatch.chdir(tmp_path)
    status, said = run("build", "tiny.safetensors", "--target", "cpu")
    assert status == 0, said
    assert run("init", "tiny.safetensors")[0] == 0
    for source in ("recipe.toml", "tiny.safetensors"):
        status, said = run("build", source)
        assert status == 0
        assert said.endswith("engines/build/tiny: nothing changed, nothing done")


def test_two_checkpoints_are_refused() -> None:
    status, said = run("build", "shipped:fashion", "--checkpoint", "x.pt")
    assert (status, said) == (2, "error: --checkpoint x.pt: shipped:fashion is a checkpoint too; give one of them")


@pytest.mark.parametrize("command", ["init", "build"])
def test_an_unknown_target_is_refused_before_the_checkpoint_is_read(command: str) -> None:
    status, said = run(command, "missing.pt", "--target", "quantum")
    assert status == 2
    assert "no target 'quantum' among the usual ones, cpu, cuda" in said
    assert said.endswith("; choose one of these, or write a recipe")
    assert run(command, "missing.pt", "--target", "h100")[1].endswith("; did you mean 'h100-tensorrt'?")


@pytest.mark.parametrize("command", ["init", "build"])
def test_an_empty_name_is_refused(command: str) -> None:
    status, said = run(command, "")
    assert status == 2
    assert "empty" in said

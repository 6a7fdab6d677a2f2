"""The recipe that `init` writes and `build CHECKPOINT` builds by."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from elit_export.backends import BACKENDS, usual_targets
from elit_export.bundle.recipe import Architecture, DecoderTable, ProfileTable, Recipe, load_recipe, recipe_from_values
from elit_export.compiler.usual_recipe import UsualRecipe, usual_name, usual_rows
from elit_export.errors import InputError
from elit_export.models.registry import named_spec
from elit_export.spec import MAX_TEXT_TOKENS, PIXELS, SD_VAE, DataFacts, ModelSpec, default_profiles
from tests.helpers import tiny_spec
from tests.text_models import text_spec


def usual(spec: ModelSpec | None = None, **changes: Any) -> UsualRecipe:
    facts: dict[str, Any] = {"name": "mine", "checkpoint": "mine.pt", "spec": spec or tiny_spec(), "data": PIXELS}
    return UsualRecipe(**(facts | changes))


def uncommented(text: str) -> str:
    """With every key and table taken in."""
    return re.sub(r"^# (\[+\w+\]+|\w+ = )", r"\1", text, flags=re.M)


@pytest.mark.parametrize("name", usual_targets())
def test_every_usual_target_is_one_that_a_recipe_may_have(name: str, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(usual(targets=[name]).text())
    recipe = load_recipe(tmp_path / "r.toml")
    assert recipe.checkpoint == str(tmp_path / "mine.pt")
    assert recipe.only_target() == name
    assert recipe.target(name).backend == usual_targets()[name]["backend"]


def test_names_of_usual_targets_are_of_one_backend_each() -> None:
    assert len(usual_targets()) == sum(len(backend.usual) for backend in BACKENDS.values())
    assert all(backend.usual for backend in BACKENDS.values())


def test_several_targets_lie_in_one_recipe() -> None:
    assert list(usual(targets=["cpu", "openvino", "rtx"]).recipe().targets) == ["cpu", "openvino", "rtx"]


def test_an_unknown_target_names_the_usual_ones() -> None:
    with pytest.raises(InputError, match="no target 'quantum' among the usual ones, cpu, cuda, openvino") as raised:
        usual(targets=["cpu", "quantum"]).text()
    assert raised.value.remedy == "choose one of these, or write a recipe"
    with pytest.raises(InputError) as raised:
        usual(targets=["h100"]).text()
    assert raised.value.remedy == "did you mean 'h100-tensorrt'?"


def test_comments_hold_what_is_used_without_them() -> None:
    """Taken in, architecture and profiles change nothing."""
    spec = tiny_spec()
    whole = recipe_from_values(tomllib.loads(uncommented(usual(spec).text())), "test")
    assert whole.architecture.model_dump() == {"num_heads": 2, "head_depth": 1, "tail_depth": 1}
    assert whole.profiles
    assert whole.profiles_for(spec) == usual(spec).recipe().profiles_for(spec)
    assert whole.profiles_for(spec) == default_profiles(spec.latents, usual_rows(spec))


def test_numbers_that_the_file_does_not_tell_are_told() -> None:
    recipe = usual(given={"num_heads": 2, "tail_depth": 1}).recipe()
    assert recipe.architecture.model_dump() == {"num_heads": 2, "head_depth": None, "tail_depth": 1}


def test_a_model_with_text_gets_its_range_and_a_model_of_latents_a_decoder() -> None:
    text = usual(text_spec(), data=SD_VAE).text()
    assert tomllib.loads(text)["text"] == {"min": 1, "opt": 128, "max": MAX_TEXT_TOKENS}
    assert recipe_from_values(tomllib.loads(uncommented(text)), "test").decoder
    assert "[decoder]" not in usual().text()


@pytest.mark.parametrize(
    "name", ['new\nline = 1\n[targets.evil]\nbackend = "x"', 'quote"s', "bell\x07", "del\x7f", "snow☃", "back\\slash"]
)
def test_names_in_a_checkpoint_cannot_leave_their_comments(name: str) -> None:
    """Nor paths their strings."""
    written = usual(data=DataFacts(kind="vae", vae=name, class_names=(name, "other")), checkpoint=name, interface=name)
    recipe = written.recipe()
    assert (recipe.checkpoint, recipe.interface, list(recipe.targets)) == (name, name, ["cpu"])


@pytest.mark.parametrize(
    ("spec", "rows"), [(tiny_spec(), (1, 16, 64)), (named_spec("ELIT-SiT-XL/2", resolution=256), (1, 2, 8))]
)
def test_rows_follow_what_a_call_costs(spec: ModelSpec, rows: tuple[int, int, int]) -> None:
    """XL/2 gets what its shipped recipe has."""
    assert usual_rows(spec).corners() == rows


@pytest.mark.parametrize(
    ("checkpoint", "name"),
    [
        ("shipped:fashion", "fashion"),
        ("a/my model.pt", "my-model"),
        ("../x.ema.safetensors", "x.ema"),
        ("☃.pt", "model"),
    ],
)
def test_the_name_is_that_of_the_file(checkpoint: str, name: str) -> None:
    assert usual_name(checkpoint) == name


# ---------------------------------------------------------------- the page on recipes

PAGE = (Path(__file__).parent.parent.parent / "docs" / "recipes.md").read_text(encoding="utf-8")


def test_the_page_on_recipes_has_every_key() -> None:
    """Also those in its comments; its example is read as it stands, and with all of them."""
    (example,) = re.findall(r"^```toml\n(.*?)```", PAGE, re.M | re.S)
    assert recipe_from_values(tomllib.loads(example), "page").profiles
    whole = re.sub(r"^# ", "", example, flags=re.M)
    keys = set(re.findall(r"^(\w+) = ", whole, re.M)) | set(re.findall(r"^\[+(\w+)", whole, re.M))
    wanted = {key for table in (Recipe, Architecture, ProfileTable, DecoderTable) for key in table.model_fields}
    assert wanted <= keys
    assert recipe_from_values(tomllib.loads(whole), "page").decoder


def test_the_page_on_recipes_has_every_usual_target() -> None:
    told = []
    for names, backend, precisions in re.findall(r"^\| (`.*`) \| `([\w-]+)` \| ([\w, ]+) \|", PAGE, re.M):
        listed, each = re.findall(r"`([^`]+)`", names), precisions.split(", ")
        told += [(name, backend, each[min(index, len(each) - 1)]) for index, name in enumerate(listed)]
    assert told == [(name, table["backend"], table["precision"]) for name, table in ordered()]


def ordered() -> list[tuple[str, dict[str, Any]]]:
    """The page's order: TensorRT for RTX first, which needs no GPU to build."""
    return sorted(usual_targets().items(), key=lambda one: "-tensorrt" in one[0])

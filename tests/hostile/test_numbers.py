"""Numbers without end, from users and in files: refused in one sentence with the limit and its reason, at once."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from elit_export.bundle.manifest import DecoderAnswers
from elit_export.bundle.readers import read_toml
from elit_export.bundle.recipe import load_recipe
from elit_export.checkpoints.vae import read_decoder
from elit_export.errors import CheckpointError, InputError, RecipeError
from elit_export.runtime.conditioning import as_conditioning
from elit_export.runtime.options import SamplingOptions
from elit_export.spec import PIXELS, DecoderSpec, Profile, Range
from elit_export.spec.limits import Bound
from elit_export.text.folder import read_encoder
from elit_export.training.trainer import TrainConfig
from tests.helpers import tiny_spec
from tests.hostile.conftest import forge

BILLION = 10**9
HUGE = "9" * 5000

# arguments → what is said
OPTIONS: list[tuple[str, str]] = [
    (f"sample bundle --steps {BILLION}", "steps is 1,000,000,000, at most 10,000 steps: samplings are converged"),
    (f"sample bundle --labels 0-{BILLION}", "label 0-1000000000 is out of range: classes are 0 to "),
    (f"sample bundle --labels {HUGE}", "is out of range: classes are 0 to "),
    (f"sample bundle --labels 0,{HUGE}-{HUGE}", "is out of range: classes are 0 to "),
    (f"sample bundle --images {BILLION}", "at most 1,000,000 images in a call: their noise and samples are held"),
    ("sample bundle --images 1000000 --labels 0,1", "is 2,000,000, at most 1,000,000 images in a call"),
    (f"sample bundle --cache static:every@{BILLION}", "N is 1,000,000,000, at most 10,000 steps"),
    (f"sample bundle --cache static:every@{HUGE}", "N has 5000 digits, at most 10,000 steps"),
    (f"sample bundle --schedule 0-{BILLION}:full", "is 1,000,000,000, at most 10,000 steps"),
    (f"sample bundle --schedule 0-{HUGE}:full", "has 5000 digits, at most 10,000 steps"),
    (f"calibrate cache bundle --images {BILLION}", "at most 100,000 trajectories: what each shows is held in memory"),
    (f"calibrate cache bundle --steps {BILLION}", "at most 10,000 steps"),
    (f"calibrate cache bundle --rows {BILLION}", "at most 1,048,576 rows of an engine"),
    (f"train data --out run --width {BILLION}", "at most 65,536 numbers a token: the widest transformers"),
    (f"train data --out run --group {BILLION}", "at most 64 tokens along a group: its square is the number of budgets"),
    (f"train data --out run --split 1-{BILLION}-1", "at most 1,024 blocks: every block is written into the graph"),
    (f"train data --out run --steps {BILLION}", "at most 100,000,000 steps: more would take years"),
    (f"train data --out run --batch-size {BILLION}", "at most 65,536 images in a batch"),
    (f"train-classifier data --out c --width {BILLION}", "at most 4,096 numbers in a layer of a classifier"),
    (f"bench engines bundle --rows {BILLION}", "at most 1,048,576 rows of an engine"),
    (f"bench engines bundle --rounds {BILLION}", "at most 100,000 rounds: every time is kept"),
    (f"bench samplers bundle --images {BILLION}", "at most 1,000,000 images in a call"),
    (f"bench cache bundle --fine-steps {BILLION}", "at most 10,000 steps"),
    (f"bench soak bundle --samplings {BILLION}", "at most 10,000,000 samplings: a longer soak would take months"),
    (f"evaluate bundle --images {BILLION}", "at most 1,000,000 images in a call"),
    (f"evaluate bundle --way euler:{BILLION}", "steps is 1,000,000,000, at most 10,000 steps"),
    (f"inspect ELIT-SiT-XL/2 --resolution {BILLION}", "at most 1,048,576 pixels a side"),
    (f"inspect bundle --text {BILLION}", "at most 1,024 tokens of text: models with text have positions for no more"),
    ("sample bundle --out=", "it is empty or no name; give one, or leave the option out"),
    ("inspect bundle --json=", "it is empty or no name"),
    ("build r.toml --checkpoint=", "it is empty or no name"),
]


@pytest.mark.parametrize(("arguments", "told"), OPTIONS, ids=[each[:60] for each, _ in OPTIONS])
def test_numbers_of_users_are_refused_with_the_limit_and_its_reason(
    refused: Callable[..., str], bundle: Path, arguments: str, told: str
) -> None:
    message = refused(*arguments.split())
    assert told in " ".join(message.split()), message


SPECS: list[tuple[dict[str, Any], str]] = [
    ({"group_size": 10**5, "input_size": 4 * 10**5}, "is 400,000, at most 16,384 pixels or latents a side"),
    ({"group_size": 10**5}, "group_size is 100,000, at most 64 tokens along a group"),
    ({"core_depth": 10**6}, "core_depth is 1,000,000, at most 1,024 blocks: every block is written"),
    (
        dict.fromkeys(("head_depth", "core_depth", "tail_depth"), 1024),
        "the sum of head_depth, core_depth and tail_depth is 3,072, at most 1,024 blocks",
    ),
    ({"in_channels": BILLION}, "in_channels is 1,000,000,000, at most 4,096 channels"),
    ({"hidden_size": 4 * BILLION}, "hidden_size is 4,000,000,000, at most 65,536 numbers a token"),
    ({"num_heads": 10**30}, "num_heads is about 2**99, at most 1,024 heads"),
    ({"mlp_ratio": 1e308}, r"mlp_ratio is 1e\+308, at most 64 times the width"),
    ({"num_classes": 10**12}, "num_classes is 1,000,000,000,000, at most 1,000,000 classes"),
    ({"input_size": 16384, "patch_size": 1, "group_size": 64}, "is 268,435,456, at most 262,144 spatial tokens"),
]


@pytest.mark.parametrize(("changes", "told"), SPECS, ids=[str(changes)[:40] for changes, _ in SPECS])
def test_numbers_of_specs_in_a_manifest_are_refused(
    refused: Callable[..., str], bundle: Path, changes: dict[str, Any], told: str
) -> None:
    forge(bundle, lambda values: values["model"]["spec"].update(changes))
    message = refused("inspect", bundle)
    assert re.search(told.replace("**", r"\*\*"), message), message
    assert "build it again: elit-export build RECIPE" in message


@pytest.mark.parametrize(("rows", "told"), [(10**12, "or equal to 1048576"), (300_000, "has no array")])
def test_rows_that_the_reference_does_not_have_are_refused(
    refused: Callable[..., str], bundle: Path, rows: int, told: str
) -> None:
    forge(bundle, lambda values: values["plan_sets"][0]["reference"].update({"cache_rows": [rows]}))
    assert told in refused("verify", bundle)


@pytest.mark.parametrize(("name", "value"), [("kept", 10**12), ("text", 10**12), ("rows", 0)])
def test_numbers_of_reference_cases_are_refused(
    refused: Callable[..., str], bundle: Path, name: str, value: int
) -> None:
    forge(bundle, lambda values: values["plan_sets"][0]["reference"]["cases"][0].update({name: value}))
    message = refused("inspect", bundle)
    assert f"plan_sets.0.reference.cases.0.{name}: Input should be" in message
    assert "build it again" in message


@pytest.mark.parametrize("rows", [0, (1 << 20) + 1])
def test_rows_of_a_decoder_are_bounded(rows: int) -> None:
    with pytest.raises(ValidationError, match=r"rows\.0\n.*should be"):
        DecoderAnswers.model_validate({"artifact": {}, "key": "k", "rows": [rows]})


def test_numbers_of_profiles_in_a_manifest_are_refused(refused: Callable[..., str], bundle: Path) -> None:
    def change(values: Any) -> None:
        values["plan_sets"][0]["profiles"][0]["rows"] = {"min": 1, "opt": 1, "max": 10**12}

    forge(bundle, change)
    assert "rows.max is 1,000,000,000,000, at most 1,048,576 rows of an engine" in refused("inspect", bundle)


RECIPE = """
name = "r"
checkpoint = "c.pt"
rows = {{ min = 1, opt = 1, max = {rows} }}
text = {{ min = 1, opt = 1, max = {text} }}
[targets.cpu]
backend = "onnxruntime"
device = "cpu"
precision = "fp32"
[decoder]
folder = "f"
tile = {tile}
"""


@pytest.mark.parametrize(
    ("numbers", "told"),
    [
        ({"rows": 10**12}, "rows.max is 1,000,000,000,000, at most 1,048,576 rows of an engine: memory for all"),
        ({"text": 10**12}, "text.max is 1,000,000,000,000, at most 1,024 tokens of text"),
        ({"tile": 4 * 10**9}, "tile: input should be less than or equal to 1024, is 4000000000"),
        ({"rows": HUGE}, "not TOML: a whole number of thousands of digits; mend the recipe there"),
        ({"rows": "0x" + "f" * 100_000}, "not TOML: a whole number of more than 128 bits; mend the recipe there"),
        ({"rows": "[" * 100_000}, "not TOML: nested more than 64 deep; mend the recipe there"),
        ({"rows": "[" * 100 + "]" * 100}, "not TOML: nested more than 64 deep; mend the recipe there"),
        (
            {"rows": "{" + "a." * 100_000 + "a = 1}"},
            "not TOML: a dotted key of more than 64 parts; mend the recipe there",
        ),
    ],
    ids=["rows", "text", "tile", "digits", "bits", "brackets", "lists", "dots"],
)
def test_numbers_of_recipes_are_refused(
    refused: Callable[..., str], tmp_path: Path, numbers: dict[str, Any], told: str
) -> None:
    values = {"rows": 8, "text": 8, "tile": 64} | numbers
    (tmp_path / "r.toml").write_text(RECIPE.format(**values))
    assert told in refused("build", "r.toml")


def test_a_recipe_within_the_limits_is_read(tmp_path: Path) -> None:
    """Also with a byte order mark, as editors write it."""
    text = RECIPE.format(rows=1 << 20, text=1024, tile=1024)
    (tmp_path / "r.toml").write_text(text, encoding="utf-8-sig")
    assert load_recipe(tmp_path / "r.toml").rows.max == 1 << 20
    (tmp_path / "r.toml").write_text(text.replace("1048576", "1048577"))
    with pytest.raises(RecipeError, match=r"rows\.max is 1,048,577, at most 1,048,576"):
        load_recipe(tmp_path / "r.toml")


@pytest.mark.parametrize(
    "line",
    [".".join(["'\u2028'"] * 20_000) + " = 1", "[" + " . ".join(['"a.\\"."'] * 20_000) + "]"],
    ids=["quoted", "a header"],
)
def test_dotted_keys_without_end_are_refused(refused: Callable[..., str], tmp_path: Path, line: str) -> None:
    (tmp_path / "r.toml").write_text(f'# it\'s a "comment"\n{line}\n', encoding="utf-8")
    assert "not TOML: a dotted key of more than 64 parts; mend the recipe there" in refused("build", "r.toml")


def test_dots_in_comments_strings_and_numbers_are_read(tmp_path: Path) -> None:
    dots, quotes = "." * 1000, '"' * 3
    lines = [f"# {dots}", f"a = '{dots}'", f"{'b.' * 63}b = 1", f"c = [{'0.5, ' * 1000}]", f'"{dots}" = 1 # {dots}']
    lines += [f'd = {quotes}\n"{dots}\n{quotes} # {dots}']
    (tmp_path / "r.toml").write_text("\n".join(lines), encoding="utf-8")
    found = read_toml(tmp_path / "r.toml", what="it", error=RecipeError)
    assert (found["a"], len(found["c"]), found["d"]) == (dots, 1000, f'"{dots}\n')


@pytest.mark.parametrize("text", ['"""\\' * 250_000, '"' * 10**6, "a." * 20 + " " * 900_000], ids=["\\", '"', " "])
def test_toml_is_gone_through_once(tmp_path: Path, text: str) -> None:
    start = time.monotonic()
    (tmp_path / "r.toml").write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match="not TOML"):
        read_toml(tmp_path / "r.toml", what="it", error=RecipeError)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (f"[{HUGE}]", "not JSON: a whole number of thousands of digits; copy or write the limits again"),
        ("[" * 100_000, "not JSON: nested more than 64 deep; copy or write the limits again"),
        (f"[{10**60}]", "not JSON: a whole number of more than 128 bits"),
        ("\ufeff[]", ""),
    ],
    ids=["digits", "brackets", "bits", "byte order mark"],
)
def test_numbers_of_limits_are_refused(refused: Callable[..., str], tmp_path: Path, content: str, told: str) -> None:
    """With a byte order mark the file is read: it is the bundle that is not there."""
    (tmp_path / "l.json").write_text(content, encoding="utf-8")
    message = refused("bench", "memory", "nowhere", "--check", "l.json")
    assert (told or "no bundle at nowhere") in message


def test_a_manifest_of_brackets_is_damaged(refused: Callable[..., str], bundle: Path) -> None:
    (bundle / "manifest.json").write_text("[" * 100_000)
    assert "damaged: nested more than 64 deep; build it again" in refused("inspect", bundle)


# ---------------------------------------------------------------- folders of other libraries


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"layers_per_block": 10**6}, "layers_per_block is 1,000,000, at most 64 parts in a stage: every one becomes"),
        ({"latent_channels": BILLION}, "latent_channels is 1,000,000,000, at most 16,384 channels in a layer"),
        ({"block_out_channels": [64, BILLION]}, "block_out_channels is 1,000,000,000, at most 16,384"),
        ({"block_out_channels": [64] * 2000}, "the length of block_out_channels is 2,000, at most 1,024 blocks"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_numbers_of_vae_folders_are_refused(tmp_path: Path, config: dict[str, Any], told: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", **config}))
    with pytest.raises(CheckpointError, match=f"config.json: {told}.*; copy the folder again"):
        read_decoder(tmp_path)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1,000,000, at most 1,024 blocks"),
        ({"hidden_size": BILLION}, "hidden_size is 1,000,000,000, at most 65,536"),
        ({"vocab_size": 10**12}, "vocab_size is 1,000,000,000,000, at most 4,000,000 tokens in a vocabulary"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_numbers_of_text_encoder_folders_are_refused(
    tmp_path: Path, config: dict[str, Any], told: str, nested: bool
) -> None:
    values = {"text_config": config} if nested else config
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl", **values}))
    with pytest.raises(CheckpointError, match=f"config.json: {told}.*; copy the folder again"):
        read_encoder(tmp_path)


# ---------------------------------------------------------------- from Python


def test_numbers_from_python_are_refused() -> None:
    spec, one = tiny_spec(), Range(1, 1, 1)
    training = {"steps": 1, "batch_size": 1, "warmup_steps": 1, "min_kept": 1, "seed": 0}
    rates = {"learning_rate": 1.0, "ema_decay": 0.5, "label_dropout": 0.5, "full_share": 0.5}
    decoder = {"channels": 1, "image_channels": 3, "scale": (1.0,), "shift": (0.0,), "factor": 8, "side": 8}
    made: list[tuple[Callable[[], object], str]] = [
        (lambda: SamplingOptions(steps=BILLION), "steps is 1,000,000,000, at most 10,000"),
        (lambda: as_conditioning(range(10**8), spec, PIXELS), "number of labels is 100,000,000, at most 1,000,000"),
        (lambda: Profile("p", one, Range(1, 1, 10**12)), "profile p: rows.max is 1,000,000,000,000, at most"),
        (lambda: Profile("p", Range(1, 1, 10**12), one), "profile p: latents.max is 1,000,000,000,000, at most 4,096"),
        (lambda: TrainConfig(**training | rates | {"steps": 10**12}), "steps is 1,000,000,000,000, at most"),  # type: ignore[arg-type]
        (lambda: DecoderSpec(**decoder | {"side": 10**12}), "decoder: side is 1,000,000,000,000, at most 1,024"),  # type: ignore[arg-type]
        (lambda: DecoderSpec(**decoder | {"factor": 65}), "decoder: factor is 65, at most 64"),  # type: ignore[arg-type]
    ]
    for make, told in made:
        with pytest.raises(InputError, match=re.escape(told)) as refused:
            make()
        from_file = ", or copy the file again where a file says so" if told.startswith(("profile", "decoder")) else ""
        assert refused.value.remedy in (f"give a smaller number{from_file}", "give fewer")


def test_a_bound_is_inclusive_and_reads_digits() -> None:
    bound = Bound(100, "things", "there is no room")
    bound.check(100, "it")
    assert bound.whole("0" * 5000 + "99", "it") == 99
    for call in (lambda: bound.check(101, "it"), lambda: bound.whole("101", "it")):
        with pytest.raises(
            InputError, match=r"^it is 101, at most 100 things: there is no room; give a smaller number$"
        ):
            call()
    with pytest.raises(InputError, match="it has 5000 digits, at most 100 things"):
        bound.whole(HUGE, "it")


def test_data_that_no_memory_holds_are_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    """Two images, each of 16384 by 16384 pixels when they are padded, are less than the limit; 100,000 are more."""
    from tests.hostile.test_bombs import idx_head

    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-images-idx3-ubyte").write_bytes(idx_head(100_000, 1, 1) + bytes(100_000))
    (tmp_path / "data" / "train-labels-idx1-ubyte").write_bytes(idx_head(100_000) + bytes(100_000))
    message = refused("train", "data", "--out", "run", "--size", "16384")
    assert "100000 images of 16384x16384 is 26,843,545,600,000, at most 68,719,476,736 bytes of images" in message

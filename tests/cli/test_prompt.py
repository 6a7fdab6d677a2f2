"""Prompts on the command line: embedded, given to sample, refused."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import numpy as np
import pytest
import torch

from elit_export.bundle.reading import Bundle
from elit_export.bundle.store import writing
from elit_export.errors import pip_install
from elit_export.runtime.prompts import Prompts
from elit_export.runtime.request import Request
from elit_export.spec import Range
from elit_export.text.encoder import TextEncoder, Weights, load_encoder, prompts_of
from elit_export.text.files import load_prompts
from tests.cli.test_cli import ok, refused, run
from tests.text.encoders import WIDTH, encoder, save_encoder
from tests.text_models import text_spec

FOX = "a red fox"
GUIDED = ["--guidance", "cfg:3"]
LIMITS = Range(1, 8, 64)  # tokens of text
TOLD = ["--prompt", FOX, "--prompt", "an owl, at night", "--negative", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoder") / "pipeline")


@pytest.fixture(scope="module")
def loaded(folder: Path) -> TextEncoder:
    return load_encoder(folder)


@pytest.fixture(scope="module")
def text_bundle(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that says it is of a text-to-image model; its engines are not."""
    path = Path(shutil.copytree(tiny_bundle.folder, tmp_path_factory.mktemp("text") / "bundle"))
    manifest = tiny_bundle.manifest
    plan_sets = tuple(
        plan_set.model_copy(
            update={"profiles": tuple(facts.model_copy(update={"text": LIMITS}) for facts in plan_set.profiles)}
        )
        for plan_set in manifest.plan_sets
    )
    with writing(path) as writer:
        model = manifest.model.model_copy(update={"spec": text_spec(input_size=8, group_size=2)})
        writer.commit(manifest.model_copy(update={"model": model, "plan_sets": plan_sets}))
    return path


DATA = SimpleNamespace(kind="latents", vae="small")


class Drawing:
    """Stands for a pipeline: keeps the request."""

    asked: Any = None
    makes_pictures = False

    @classmethod
    def of(cls, *_: object) -> Self:
        return cls()

    def run(self, request: Request, _: object) -> SimpleNamespace:
        Drawing.asked = request
        latents = np.zeros(request.start.shape)
        return SimpleNamespace(latents=latents, labels=(), data=DATA, summary=lambda: "drawn")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...


@pytest.fixture
def drawing(monkeypatch: pytest.MonkeyPatch) -> type[Drawing]:
    """What sample asks of its pipeline is kept as `asked`."""
    monkeypatch.setattr("elit_export.runtime.pipeline.Pipeline", Drawing)
    monkeypatch.setattr(Drawing, "asked", None)
    return Drawing


def assert_asked(request: Request, expected: Prompts, *, guided: bool) -> None:
    """Without guidance nothing asks for negative prompts."""
    weak = expected.negative if guided else expected.positive
    assert weak
    for inputs, told in ((request.conditioning, expected.positive), (request.null_conditioning, weak)):
        assert np.array_equal(inputs["text"], told.text)
        assert np.array_equal(inputs["text_mask"], told.mask)


def assert_same(found: Any, expected: Prompts) -> None:
    for one, other in ((found.positive, expected.positive), (found.negative, expected.negative)):
        assert np.array_equal(one.text, other.text)
        assert np.array_equal(one.mask, other.mask)


# ---------------------------------------------------------------- embed


def test_embed_writes_what_sample_takes(folder: Path, loaded: TextEncoder, tmp_path: Path) -> None:
    out = tmp_path / "made" / "fox.npz"
    said = ok("embed", folder, *TOLD, "--out", out)
    expected = prompts_of(loaded, [FOX, "an owl, at night"], [""])
    assert_same(load_prompts(out, text_spec()), expected)
    tokens = expected.positive.text.shape[1]
    assert (
        f"wrote {out}: 2 prompts of up to {tokens} tokens and a negative one of 5, {WIDTH} numbers each; draw" in said
    )
    with np.load(out) as file:
        assert file["prompts"].tolist() == [FOX, "an owl, at night"]
        assert file["negative_prompts"].tolist() == [""]


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The encoder with bfloat16 weights."""
    path = save_encoder(tmp_path_factory.mktemp("half") / "pipeline")
    encoder().to(torch.bfloat16).save_pretrained(path / "text_encoder")
    return path


def test_embed_takes_weights_as_stored(half: Path, tmp_path: Path) -> None:
    ok("embed", half, "--prompt", FOX, "--encoder-weights", "stored", "--out", tmp_path / "p.npz")
    ok("embed", half, "--prompt", FOX, "--out", tmp_path / "wide.npz")
    found, wide = (load_prompts(tmp_path / name, text_spec()).positive.text for name in ("p.npz", "wide.npz"))
    assert np.array_equal(found, load_encoder(half, weights=Weights.STORED).embed([FOX]).text)
    assert 0 < np.abs(found - wide).max() < 0.2


def test_sample_takes_weights_as_stored(text_bundle: Path, half: Path, drawing: type[Drawing], tmp_path: Path) -> None:
    options = ["--prompt", FOX, "--encoder", half, "--encoder-weights", "stored", "--out", tmp_path / "s.png"]
    ok("sample", text_bundle, *options)
    assert np.array_equal(
        drawing.asked.conditioning["text"], load_encoder(half, weights=Weights.STORED).embed([FOX]).text
    )
    assert not np.array_equal(drawing.asked.conditioning["text"], load_encoder(half).embed([FOX]).text)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "--prompt is missing; say what to show"),
        (["--prompt", "x", "--out", "p.png"], "--out p.png: embeddings are written as .npz"),
        (["--prompt", "@ " * 1024], "tokens long, at most 1024 are accepted; shorten it"),
    ],
)
def test_embed_refuses_what_is_wrong(folder: Path, tmp_path: Path, options: list[str], said: str) -> None:
    out = [] if "--out" in options else ["--out", str(tmp_path / "p.npz")]
    assert said in refused("embed", folder, *options, *out)
    assert not list(tmp_path.iterdir())


def test_embed_of_a_missing_folder_says_which_is_wanted(tmp_path: Path) -> None:
    said = refused("embed", tmp_path / "nowhere", "--prompt", "x", "--out", tmp_path / "p.npz")
    assert "no text encoder at" in said
    assert "text_encoder/ and tokenizer/, as diffusers saves a pipeline" in said


# ---------------------------------------------------------------- sample


def test_sample_embeds_prompts(
    text_bundle: Path, folder: Path, loaded: TextEncoder, drawing: type[Drawing], tmp_path: Path
) -> None:
    said = ok("sample", text_bundle, *TOLD, *GUIDED, "--encoder", folder, "--out", tmp_path / "s.png")
    assert_asked(drawing.asked, prompts_of(loaded, [FOX, "an owl, at night"], [""]), guided=True)
    assert "drawn" in said
    with np.load(tmp_path / "s.npz") as file:
        assert file.files == ["latents"]


def test_sample_takes_embeddings(text_bundle: Path, folder: Path, drawing: type[Drawing], tmp_path: Path) -> None:
    file = tmp_path / "fox.npz"
    ok("embed", folder, *TOLD, "--out", file)
    ok("sample", text_bundle, "--prompts", file, "--out", tmp_path / "s.png")
    assert_asked(drawing.asked, load_prompts(file, text_spec()), guided=False)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "--prompt is missing, this model takes text; say what to show with --prompt TEXT --encoder FOLDER, or"),
        (["--prompt", "x"], "--encoder is missing, this model takes text"),
        (["--negative", "", "--encoder", "e"], "--prompt is missing, this model takes text"),
        (["--labels", "3"], "--labels 3: this model takes text; say what to show with --prompt TEXT"),
        (["--prompts", "p.npz", "--prompt", "x"], "--prompts holds the embeddings; leave --prompt out"),
        (["--prompts", "p.npz", "--negative", ""], "--prompts holds the embeddings; leave --negative out"),
        (["--prompts", "p.npz", "--encoder", "e"], "--prompts holds the embeddings; leave --encoder out"),
        (["--prompts", "p.npz", "--encoder-weights", "stored"], "holds the embeddings; leave --encoder-weights out"),
        (["--prompts", "nowhere.npz"], "no embeddings at nowhere.npz; write it with elit-export embed"),
        (["--prompt", "x", "--encoder", "nowhere"], "no text encoder at nowhere"),
        (["--prompt", "x", "--encoder", "nowhere", "--guidance", "cgf:4"], "guidance 'cgf:4'"),
        (["--prompt", "x", "--encoder", "nowhere", "--schedule", "0-3:full"], "schedule"),
        (["--prompt", "x", "--encoder", "nowhere", "--cache", "teacake:1"], "cache"),
        (["--prompt", "x", "--encoder", "nowhere", "--guidance", "cfg:4"], "has a negative branch; give --negative"),
        (["--prompt", "x", "--encoder", "nowhere", "--negative", ""], "guidance none uses no --negative"),
        (["--prompt", "x", "--encoder", "nowhere", "--seed", "-1"], "seed -1 must lie in 0 to 2**64 - 1"),
    ],
)
def test_sample_of_a_text_model_refuses_what_is_wrong(text_bundle: Path, options: list[str], said: str) -> None:
    assert said in refused("sample", text_bundle, *options)


@pytest.mark.usefixtures("drawing")
def test_sample_refuses_a_prompt_that_is_too_long_for_the_engines(text_bundle: Path, folder: Path) -> None:
    said = refused("sample", text_bundle, "--prompt", "fox " * 100, "--encoder", folder)
    assert "prompt 1 ('fox fox fox fox fox ')" in said.replace("…", "")
    assert f"at most {LIMITS.max} are accepted" in said


def test_sample_refuses_the_encoder_of_another_model(text_bundle: Path, tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "wide", hidden_size=32, rope_parameters=None)
    said = refused("sample", text_bundle, "--prompt", "x", "--encoder", folder)
    assert "embeds text in 32 numbers a token, the model takes 24; give the encoder that the model was trained" in said


def test_sample_refuses_embeddings_of_another_width(text_bundle: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "p.npz", text=np.zeros((1, 3, 32), np.float32), mask=np.ones((1, 3), int))
    said = refused("sample", text_bundle, "--prompts", tmp_path / "p.npz")
    assert "p.npz: text has shape (1, 3, 32), must be (images, tokens, 24) for this model; embed" in said


@pytest.mark.parametrize("out", ["fox.png", "fox", "fox.npz", "here/../fox.png"])
def test_sample_never_overwrites_the_embeddings(
    text_bundle: Path, folder: Path, drawing: type[Drawing], tmp_path: Path, out: str
) -> None:
    file = tmp_path / "fox.npz"
    (tmp_path / "here").mkdir()
    ok("embed", folder, "--prompt", FOX, "--out", file)
    before = file.read_bytes()
    said = refused("sample", text_bundle, "--prompts", file, "--out", tmp_path / out)
    assert f"--out {tmp_path / out} would overwrite {file} with latents; choose another name" in said
    assert file.read_bytes() == before
    assert drawing.asked is None


def test_sample_draws_several_images_of_a_prompt(
    text_bundle: Path, folder: Path, loaded: TextEncoder, drawing: type[Drawing], tmp_path: Path
) -> None:
    ok("sample", text_bundle, *TOLD, *GUIDED, "--encoder", folder, "--images", "2", "--out", tmp_path / "s.png")
    assert_asked(drawing.asked, prompts_of(loaded, [FOX, "an owl, at night"], [""]).repeated(2), guided=True)


def test_sample_draws_several_different_images_of_a_label(tiny_bundle: Bundle, tmp_path: Path) -> None:
    ok("sample", tiny_bundle.folder, "--labels", "2,0", "--images", "2", "--steps", "2", "--out", tmp_path / "s.png")
    with np.load(tmp_path / "s.npz") as file:
        assert file["labels"].tolist() == [2, 2, 0, 0]
        assert len(np.unique(file["images"], axis=0)) == 4
    assert "--images" in refused("sample", tiny_bundle.folder, "--images", "0")


@pytest.mark.parametrize("guidance", [["cfg:1"], ["cfg:4", "--guidance-interval", "0.5001", "0.5002"]], ids=str)
def test_guidance_that_no_step_uses_needs_no_negative_prompt(
    text_bundle: Path, folder: Path, drawing: type[Drawing], tmp_path: Path, guidance: list[str]
) -> None:
    options = ["--encoder", folder, "--steps", "7", "--guidance", *guidance, "--out", tmp_path / "s.png"]
    ok("sample", text_bundle, "--prompt", FOX, *options)
    assert drawing.asked.null_conditioning is drawing.asked.conditioning


@pytest.mark.usefixtures("drawing")
def test_sample_refuses_a_long_prompt_before_the_weights_are_read(
    text_bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elit_export.text.encoder._model", None)
    said = refused("sample", text_bundle, "--prompt", "x", "--negative", "fox " * 100, "--encoder", folder, *GUIDED)
    assert f"at most {LIMITS.max} are accepted" in said


@pytest.mark.parametrize("option", ["--prompt", "--negative", "--encoder", "--prompts", "--encoder-weights"])
def test_sample_of_a_class_model_refuses_text(tiny_bundle: Bundle, option: str) -> None:
    said = refused("sample", tiny_bundle.folder, option, "stored")
    assert f"{option}: this model takes no text, it draws classes; choose them with --labels" in said


@pytest.mark.usefixtures("drawing")
def test_sample_without_transformers_names_the_extra(
    text_bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    said = refused("sample", text_bundle, "--prompt", "x", "--encoder", folder)
    assert f"needs transformers; {pip_install('text')}, or embed prompts elsewhere" in said


def test_help_tells_of_prompts() -> None:
    said = run("sample", "--help").output
    assert all(option in said for option in ("--prompt TEXT", "--negative", "--encoder", "--prompts FILE.npz"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--labels", "0-999999999"], "label 0-999999999 is out of range: classes are 0 to 2"),
        (["--labels", "9" * 5000], "is out of range: classes are 0 to 2"),
        (["--labels", "2-1"], "label range 2-1 runs backwards; write 1-2"),
        (["--labels", "0", "--images", "999999999999"], "at most 1,000,000 images in a call"),
    ],
)
def test_huge_numbers_are_refused_before_they_are_expanded(tiny_bundle: Bundle, options: list[str], said: str) -> None:
    assert said in refused("sample", tiny_bundle.folder, *options)

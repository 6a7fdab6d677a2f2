"""Embeddings are those of transformers and of diffusers' pipeline; what is wrong with folders that are refused."""

from __future__ import annotations

import errno
import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from elit_export.errors import BackendUnavailable, CheckpointError, InputError
from elit_export.text.encoder import TextEncoder, Weights, check_installed, embed_prompts, load_encoder, prompts_of
from elit_export.text.folder import CONFIG, INDEX, KINDS, WEIGHTS, read_encoder
from tests.text.encoders import AFTER, DROPPED, TEMPLATE, WIDTH, by_hand, encoder, save_encoder, tokenizer
from tests.text_models import text_spec

TEXTS = ["a red fox in the snow", "", " ", "\n\ntext", "objects and a background, très détaillés {}", "雪 <|im_end|>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Do not change it: copy it first."""
    return save_encoder(tmp_path_factory.mktemp("encoder") / "pipeline")


@pytest.fixture(scope="module")
def loaded(folder: Path) -> TextEncoder:
    return load_encoder(folder)


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copied"))


# ---------------------------------------------------------------- what is embedded


def test_embeddings_are_those_of_the_whole_model(loaded: TextEncoder) -> None:
    found = loaded.embed(TEXTS)
    for text, mask, expected in zip(found.text, found.mask, by_hand(encoder(), TEXTS), strict=True):
        assert np.abs(text[: len(expected)] - expected).max() <= 1e-5
        assert np.array_equal(mask, np.arange(len(mask)) < len(expected))
        assert not text[len(expected) :].any()
    assert (found.text.dtype, found.mask.dtype) == (np.float32, np.int64)
    assert found.text[0].std() > 0.3  # no dead encoder


def test_embeddings_are_those_of_the_pipeline_of_diffusers(loaded: TextEncoder) -> None:
    diffusers = pytest.importorskip("diffusers")
    parts = dict.fromkeys(("scheduler", "vae", "transformer"))
    pipeline = diffusers.QwenImagePipeline(text_encoder=encoder(), tokenizer=tokenizer(), **parts)
    with torch.no_grad():
        expected, mask = pipeline.encode_prompt(TEXTS, device=torch.device("cpu"))
    found = loaded.embed(TEXTS)
    assert np.abs(found.text - expected.numpy()).max() <= 1e-5
    assert np.array_equal(found.mask, mask.numpy())
    assert (pipeline.prompt_template_encode, pipeline.prompt_template_encode_start_idx) == (TEMPLATE, DROPPED)


def test_a_prompt_is_embedded_as_if_it_were_alone(loaded: TextEncoder) -> None:
    together = loaded.embed(TEXTS)
    for number, prompt in enumerate(TEXTS):
        alone = loaded.embed([prompt])
        assert alone.mask.all()
        length = alone.text.shape[1]
        assert np.array_equal(together.text[number, :length], alone.text[0])
        assert together.mask[number].sum() == length


def test_an_empty_prompt_is_the_end_of_the_template(loaded: TextEncoder) -> None:
    assert loaded.embed([""]).text.shape == (1, AFTER, WIDTH)


def test_words_make_a_difference(loaded: TextEncoder) -> None:
    found = loaded.embed(["a cat", "a dog"])
    assert np.abs(found.text[0] - found.text[1]).max() > 1e-3


def test_one_negative_is_for_all_images(loaded: TextEncoder) -> None:
    found = prompts_of(loaded, ["one", "and another one"], [""]).checked(text_spec())
    assert found.negative
    alone = loaded.embed([""])
    assert len(found) == len(found.negative.text) == 2
    assert all(np.array_equal(text, alone.text[0]) for text in found.negative.text)
    each = prompts_of(loaded, ["one", "and another one"], ["dark", "x"]).negative
    assert each
    assert np.array_equal(each.text, loaded.embed(["dark", "x"]).text)
    assert prompts_of(loaded, ["one"]).negative is None


# ---------------------------------------------------------------- which folders are read


def test_an_encoder_is_found_alone_and_beside_its_tokenizer(copied: Path, loaded: TextEncoder) -> None:
    expected = loaded.embed(TEXTS).text
    assert np.array_equal(load_encoder(copied / "text_encoder").embed(TEXTS).text, expected)
    one = Path(shutil.copytree(copied / "text_encoder", copied / "one" / "model"))
    shutil.copytree(copied / "tokenizer", one, dirs_exist_ok=True)
    assert read_encoder(one).tokenizer == one
    assert np.array_equal(load_encoder(one).embed(TEXTS).text, expected)


@pytest.mark.parametrize("prefixes", [("model.language_model.", "model.visual."), ("model.", "visual.")])
def test_old_and_new_names_of_weights_are_read(copied: Path, loaded: TextEncoder, prefixes: tuple[str, str]) -> None:
    def renamed(key: str) -> str:
        for old, new in zip(("model.", "visual."), prefixes, strict=True):
            if key.startswith(old):
                return new + key.removeprefix(old)
        return key

    change_weights(copied, lambda weights: {renamed(key): tensor for key, tensor in weights.items()})
    assert np.array_equal(load_encoder(copied).embed(TEXTS).text, loaded.embed(TEXTS).text)


def test_shards_are_read(copied: Path, loaded: TextEncoder) -> None:
    shutil.rmtree(copied / "text_encoder")
    encoder().save_pretrained(copied / "text_encoder", max_shard_size="30KB")
    assert not (copied / "text_encoder" / WEIGHTS).exists()
    assert np.array_equal(load_encoder(copied).embed(TEXTS).text, loaded.embed(TEXTS).text)


def test_an_older_flat_configuration_is_read(copied: Path, loaded: TextEncoder) -> None:
    def flatten(config: dict[str, Any]) -> None:
        part = config.pop("text_config")
        kept = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        config.update({name: part[name] for name in (*kept, "vocab_size", "rms_norm_eps", "max_window_layers")})
        config.update(rope_theta=1e6, rope_scaling={"type": "mrope", "mrope_section": [2, 2, 2]})
        config.update(torch_dtype="float32", use_sliding_window=False)

    change_config(copied, flatten)
    assert read_encoder(copied).width == WIDTH
    assert np.abs(load_encoder(copied).embed(TEXTS).text - loaded.embed(TEXTS).text).max() <= 1e-6


def test_a_tokenizer_of_words_and_merges_is_read(copied: Path, loaded: TextEncoder) -> None:
    """As Qwen-Image publishes it."""
    place = copied / "tokenizer"
    content = json.loads((place / "tokenizer.json").read_text())
    (place / "tokenizer.json").unlink()
    (place / "vocab.json").write_text(json.dumps(content["model"]["vocab"]))
    (place / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(m) for m in content["model"]["merges"])]))
    added = {token.pop("id"): token for token in content["added_tokens"]}
    facts = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": added,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        **{"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "unk_token": None, "add_prefix_space": False},
    }
    (place / "tokenizer_config.json").write_text(json.dumps(facts))
    assert np.array_equal(load_encoder(copied).embed(TEXTS).text, loaded.embed(TEXTS).text)


def test_bfloat16_weights_run_as_float32_or_as_stored(copied: Path, loaded: TextEncoder) -> None:
    shutil.rmtree(copied / "text_encoder")
    encoder().to(torch.bfloat16).save_pretrained(copied / "text_encoder")
    widened, stored = load_encoder(copied), load_encoder(copied, weights=Weights.STORED)
    types = [{weight.dtype for weight in found._model.parameters()} for found in (widened, stored)]
    assert types == [{torch.float32}, {torch.bfloat16}]
    expected = loaded.embed(TEXTS).text
    errors = [np.abs(found.embed(TEXTS).text - expected).max() for found in (widened, stored)]
    assert 0 < errors[0] < errors[1] < 0.2
    assert stored.embed(TEXTS).text.dtype == np.float32


def test_only_what_embeds_text_is_loaded(loaded: TextEncoder) -> None:
    names = [name for name, _ in loaded._model.named_parameters()]
    assert len(names) > 20
    assert not [name for name in names if "visual" in name or "head" in name]


def test_nothing_is_asked_of_the_network_and_nothing_is_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("asked the network")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    load_encoder(folder).embed(["x"])
    assert capfd.readouterr() == ("", "")


def test_reading_the_configuration_needs_neither_torch_nor_transformers(folder: Path) -> None:
    script = "import sys; from elit_export.text.encoder import read_encoder; read_encoder(sys.argv[1])"
    script += "; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script, str(folder)], check=False).returncode == 0


# ---------------------------------------------------------------- texts that are refused


def test_a_text_of_too_many_tokens_is_refused_with_their_number(loaded: TextEncoder) -> None:
    words = "the " * 10
    count = loaded.embed([words]).text.shape[1]
    assert loaded.embed([words], max_tokens=count).text.shape[1] == count
    told = rf"prompt 2 \('the the the the the '…\) is {count} tokens long, at most {count - 1} are accepted; shorten it"
    with pytest.raises(InputError, match=told):
        loaded.embed(["", words], max_tokens=count - 1)
    with pytest.raises(InputError, match=r"is \d{4} tokens long, at most 1024 are accepted; shorten it"):
        prompts_of(loaded, ["x"], ["@ " * 1024])


@pytest.mark.parametrize(
    ("prompts", "told"),
    [
        ([], "at least one text"),
        ("a cat", "a list of at least one text, not 'a cat'"),
        (["x", 3], "prompt 2 is 3, must be text"),
        (["\udcff"], "prompt 1 is not Unicode text"),
    ],
)
def test_what_is_no_text_is_refused(loaded: TextEncoder, prompts: Any, told: str) -> None:
    with pytest.raises(InputError, match=told):
        loaded.embed(prompts)


@pytest.mark.parametrize("negatives", [["", "", ""], "no"])
def test_negatives_are_one_or_as_many(loaded: TextEncoder, negatives: Any) -> None:
    with pytest.raises(InputError, match=r"2 prompts and . negative ones; give none, one for all or one for each"):
        prompts_of(loaded, ["a", "b"], negatives)


# ---------------------------------------------------------------- folders that are refused


def change_config(folder: Path, change: Callable[[dict[str, Any]], Any], part: str = "text_encoder") -> None:
    path = folder / part / (CONFIG if part == "text_encoder" else "tokenizer_config.json")
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = folder / "text_encoder" / WEIGHTS
    changed = change(load_file(path))
    save_file({key: tensor.contiguous() for key, tensor in changed.items()}, path, {"format": "pt"})


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no text encoder at .*nowhere; give a folder with text_encoder/ and to"):
        load_encoder(tmp_path / "nowhere")


def test_a_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"no config\.json in it or in its `text_encoder`; give a folder with text_enc"
    ):
        load_encoder(tmp_path)


@pytest.mark.parametrize(("content", "told"), [("{", "not JSON"), ("[1]", "no table"), ("\udcff", "not JSON")])
def test_a_damaged_configuration_is_refused(copied: Path, content: str, told: str) -> None:
    (copied / "text_encoder" / CONFIG).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=rf"config\.json: {told}.*copy the folder again"):
        read_encoder(copied)


@pytest.mark.parametrize("named", [["T5EncoderModel"], [], ["A", "B"], "Qwen", [3]])
def test_another_class_is_refused_before_transformers_is_asked(copied: Path, named: object) -> None:
    change_config(copied, lambda config: config.update(architectures=named))
    with pytest.raises(CheckpointError, match=rf"its class is .*; known: {', '.join(KINDS)}; for another encoder give"):
        read_encoder(copied)


def test_without_a_class_the_type_of_model_decides(copied: Path) -> None:
    change_config(copied, lambda config: config.pop("architectures"))
    assert read_encoder(copied).kind.class_name in KINDS
    change_config(copied, lambda config: config.update(model_type="t5"))
    with pytest.raises(CheckpointError, match="its class is 't5'; known"):
        read_encoder(copied)


@pytest.mark.parametrize("width", [0, True, "24", None])
def test_a_width_that_cannot_be_is_named(copied: Path, width: object) -> None:
    change_config(copied, lambda config: config["text_config"].update(hidden_size=width))
    with pytest.raises(CheckpointError, match=rf"config\.json: hidden_size is {width!r}, must be a whole number"):
        read_encoder(copied)


def test_a_folder_without_weights_is_refused(copied: Path) -> None:
    (copied / "text_encoder" / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"no weights, model\.safetensors is missing; save it again with trans"):
        read_encoder(copied)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_kernel_that_a_configuration_names_is_not_fetched(
    copied: Path, loaded: TextEncoder, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    """transformers would download it and run its code."""
    path = read_encoder(copied).path / CONFIG
    config = json.loads(path.read_text())
    config[key] = config["text_config"][key] = "somebody/kernel"
    path.write_text(json.dumps(config))
    fetched: list[object] = []
    monkeypatch.setattr(
        transformers.modeling_utils, "lazy_import_flash_attention", lambda *given, **_: fetched.append(given)
    )
    found = load_encoder(copied)
    assert fetched == []
    assert np.array_equal(found.embed(TEXTS[:1]).text, loaded.embed(TEXTS[:1]).text)


def test_pickled_weights_are_refused_with_the_reason(copied: Path) -> None:
    place = copied / "text_encoder"
    (place / WEIGHTS).unlink()
    torch.save({}, place / "pytorch_model.bin")
    told = r"\(it has pytorch_model\.bin\); save it again .*; pickled weights are not read, as they can run any code"
    with pytest.raises(CheckpointError, match=told):
        load_encoder(copied)


@pytest.mark.parametrize(
    ("index", "told"),
    [
        ({"weight_map": {"a": "model-1.safetensors"}}, r"lacks model-1\.safetensors, which its index names; copy"),
        (
            {"weight_map": {"a": "../other.safetensors"}},
            r"names '\.\./other\.safetensors', which is not a safetensors file of its",
        ),
        (
            {"weight_map": {"a": "model-1.bin"}},
            r"names 'model-1\.bin', which is not a safetensors file of its own folder",
        ),
        ({}, "has no weight_map"),
    ],
)
def test_an_index_of_other_files_is_refused(copied: Path, index: object, told: str) -> None:
    (copied / "text_encoder" / WEIGHTS).unlink()
    (copied / "text_encoder" / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=told):
        read_encoder(copied)


KEY = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda weights: {k: v for k, v in weights.items() if k != KEY}, r"do not fit config\.json: missing layers\.0"),
        (lambda weights: weights | {"model.more": torch.ones(2)}, r"do not fit config\.json: unknown more; copy the"),
        (
            lambda weights: weights | {KEY: torch.ones(3, 3)},
            r"json: layers\.0\.mlp\.up_proj\.weight of another shape; copy",
        ),
        (lambda weights: {"lm_head.weight": weights["lm_head.weight"]}, r"missing .* and \d+ more; copy the folder"),
    ],
)
def test_weights_that_do_not_fit_are_refused(copied: Path, change: Any, told: str) -> None:
    change_weights(copied, change)
    with pytest.raises(CheckpointError, match=told):
        load_encoder(copied)


def test_weights_that_are_not_finite_are_refused(copied: Path) -> None:
    change_weights(copied, lambda weights: weights | {KEY: weights[KEY] * torch.nan})
    with pytest.raises(CheckpointError, match="its weights give embeddings that are not finite; copy them again"):
        load_encoder(copied).embed(["x"])


@pytest.mark.parametrize("content", [b"", b"123456789" * 20])
def test_damaged_weights_are_refused(copied: Path, content: bytes) -> None:
    (copied / "text_encoder" / WEIGHTS).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"text_encoder: transformers cannot read it: .*; copy the folder again"):
        load_encoder(copied)


@pytest.mark.parametrize("change", [{"num_hidden_layers": "two"}, {"num_attention_heads": 0}, {"hidden_act": "none"}])
def test_a_configuration_of_no_model_is_refused(copied: Path, change: dict[str, Any]) -> None:
    change_config(copied, lambda config: config["text_config"].update(change))
    with pytest.raises(CheckpointError, match=r"text_encoder: .*copy the folder again"):
        load_encoder(copied)


def test_a_configuration_that_does_not_run_is_refused_when_it_is_loaded(copied: Path) -> None:
    """Its weights fit: the places of rotation are not those of a head."""

    def change(config: dict[str, Any]) -> None:
        config["text_config"]["rope_parameters"]["mrope_section"] = [2, 2, 20]

    change_config(copied, change)
    with pytest.raises(CheckpointError, match=r"text_encoder: transformers cannot run it: .*; copy the folder again"):
        load_encoder(copied)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        OSError("Cannot allocate memory (os error 12)"),
    ],
    ids=["Python", "torch", "torch on the CPU", "the system", "safetensors"],
)
def test_too_little_memory_is_told_apart_from_damage(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(transformers.Qwen2_5_VLTextModel, "from_pretrained", fail)
    told = (
        r"not enough memory \(.*\); take half with --encoder-weights stored, or run elit-export embed on a larger mac"
    )
    with pytest.raises(BackendUnavailable, match=told) as found:
        load_encoder(folder)
    assert "copy the folder again" not in str(found.value)


@pytest.mark.parametrize(
    ("texts", "told"),
    [
        ((["@ " * 1024], [""]), r"prompt 1 \(.*tokens long, at most 1024 are accepted"),
        ((["x"], ["@ " * 1024]), r"prompt 1 \(.*tokens long, at most 1024 are accepted"),
        ((["x", "y"], ["a", "b", "c"]), "2 prompts and 3 negative ones"),
        (([], []), "at least one text"),
    ],
)
def test_texts_are_checked_before_weights_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, texts: tuple[list[str], list[str]], told: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the weights were read")

    monkeypatch.setattr(transformers.Qwen2_5_VLTextModel, "from_pretrained", fail)
    with pytest.raises(InputError, match=told):
        embed_prompts(folder, *texts)


def test_a_missing_tokenizer_is_refused(copied: Path) -> None:
    shutil.rmtree(copied / "tokenizer")
    told = (
        r"no tokenizer for .*: neither it nor .*tokenizer has tokenizer\.json or vocab\.json and merges\.txt; copy `to"
    )
    with pytest.raises(CheckpointError, match=told):
        read_encoder(copied)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer_is_refused(copied: Path, name: str) -> None:
    (copied / "tokenizer" / name).write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer: transformers cannot read it: .*; copy the folder again"):
        load_encoder(copied)


def test_the_tokenizer_of_another_model_is_refused(copied: Path) -> None:
    path = copied / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text().replace("<|im_start|>", "<start>"))
    change_config(copied, lambda config: config.pop("extra_special_tokens"), "tokenizer")
    with pytest.raises(CheckpointError, match=r"has no token <\|im_start\|>: not the tokenizer of a .*; copy that of"):
        load_encoder(copied)


def test_a_tokenizer_of_more_tokens_than_the_encoder_is_refused(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "small", vocab_size=300)
    with pytest.raises(CheckpointError, match=r"has \d+ tokens, .*text_encoder knows 300; copy both from the same"):
        load_encoder(folder)


def test_code_of_a_folder_never_runs(copied: Path) -> None:
    mark = copied / "ran"
    code = f"from pathlib import Path\nPath({str(mark)!r}).touch()\nclass Own: pass\n"
    mapped = {"AutoConfig": "own.Own", "AutoModel": "own.Own", "AutoTokenizer": ["own.Own", "own.Own"]}
    for part in ("text_encoder", "tokenizer"):
        (copied / part / "own.py").write_text(code)
        change_config(copied, lambda config: config.update(auto_map=mapped), part)
    load_encoder(copied).embed(["x"])
    change_config(copied, lambda config: config.update(tokenizer_class="Own"), "tokenizer")
    with pytest.raises(CheckpointError, match="tokenizer: transformers cannot read it"):
        load_encoder(copied)
    assert not mark.exists()


def test_another_width_than_the_model_is_refused(folder: Path) -> None:
    read_encoder(folder).check_fits(text_spec())
    told = r"embeds text in 24 numbers a token, the model takes 32; give the encoder that the model was trained with"
    with pytest.raises(InputError, match=told):
        read_encoder(folder).check_fits(text_spec(text_width=32))


@pytest.mark.parametrize("library", ["transformers", "torch"])
def test_the_extra_is_named_where_a_library_is_missing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    for needs in (check_installed, lambda: load_encoder(folder)):
        with pytest.raises(BackendUnavailable, match=rf"needs {library}; pip install -e '.*\[text\]', or embed"):
            needs()

"""Prompts → embeddings, by the text encoder in a user's folder.

Only the part that embeds text is loaded, without vision tower and head. Weights are never unpickled, no code of the
folder runs, and the network is not used. Each prompt runs alone, so that its embedding does not depend on the others.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from elit_export.arrays import Float32
from elit_export.checkpoints.hf_folder import CONFIG, is_of_memory
from elit_export.errors import BackendUnavailable, CheckpointError, InputError, pip_install, summary
from elit_export.runtime.prompts import Embedded, Prompts
from elit_export.spec import MAX_TEXT_TOKENS
from elit_export.text.folder import EncoderFolder, read_encoder

LOADING = threading.Lock()
OPTIONS = {"local_files_only": True, "trust_remote_code": False}
ATTENTION = "sdpa"  # PyTorch's own, whatever a configuration names: that may be a kernel to download and run


class Weights(StrEnum):
    """The type of weights that an encoder runs with: 7 billion take 28 GB in FLOAT32, 14 GB STORED in bfloat16."""

    FLOAT32 = "float32"
    STORED = "stored"


class Template:
    """A tokenizer with the prompt template of its encoder; needs no weights."""

    def __init__(self, folder: EncoderFolder, tokenizer: Any) -> None:
        """Raise CheckpointError for the tokenizer of another kind of encoder."""
        self.folder = folder
        self._tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab()
        if missing := [mark for mark in folder.kind.marks if mark not in vocabulary]:
            raise CheckpointError(
                f"{folder.tokenizer}: has no token {missing[0]}: not the tokenizer of a {folder.kind.class_name}",
                "copy that of the same pipeline",
            )
        self.vocabulary_size = max(vocabulary.values()) + 1
        self.dropped = len(self._ids(folder.kind.before))  # tokens at the start, which are not given to the model

    def tokens(self, prompts: Sequence[str], *, max_tokens: int) -> list[list[int]]:
        """Return the token numbers of each prompt in its template.

        Raises InputError for a prompt of more than `max_tokens`, with the end of the template: none is truncated.
        """
        if isinstance(prompts, str) or not prompts:
            raise InputError(f"prompts must be a list of at least one text, not {prompts!r}")
        return [self._checked_ids(number, prompt, max_tokens) for number, prompt in enumerate(prompts, 1)]

    def _checked_ids(self, number: int, prompt: str, max_tokens: int) -> list[int]:
        _check_text(number, prompt)
        kind = self.folder.kind
        ids = self._ids(f"{kind.before}{prompt}{kind.after}")
        if (count := len(ids) - self.dropped) > max_tokens:
            raise InputError(
                f"prompt {number} ({prompt[:20]!r}…) is {count} tokens long, at most {max_tokens} are accepted",
                "shorten it",
            )
        return ids

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, verbose=False)["input_ids"])


class TextEncoder:
    """An encoder with its weights, on the CPU."""

    def __init__(self, template: Template, model: Any) -> None:
        """Raise CheckpointError if tokenizer and model do not fit each other, or the model does not run."""
        self.template, self.folder = template, template.folder
        self._model = model
        if template.vocabulary_size > (rows := model.get_input_embeddings().num_embeddings):
            raise CheckpointError(
                f"{self.folder.tokenizer}: has {template.vocabulary_size} tokens, {self.folder.path} knows {rows}",
                "copy both from the same pipeline",
            )
        self._hidden([0])

    def embed(self, prompts: Sequence[str], *, max_tokens: int = MAX_TEXT_TOKENS) -> Embedded:
        """Return the last hidden states of each prompt, without those of the start of the template.

        Raises InputError as `Template.tokens` does.
        """
        return _padded([self._embedded(ids) for ids in self.template.tokens(prompts, max_tokens=max_tokens)])

    def _embedded(self, ids: list[int]) -> Float32:  # (L, W)
        values = self._hidden(ids)[self.template.dropped :]
        if not np.isfinite(values).all():
            raise CheckpointError(
                f"{self.folder.path}: its weights give embeddings that are not finite",
                "copy them again, and run float16 ones as float32",
            )
        return values

    def _hidden(self, ids: list[int]) -> Float32:  # (len(ids), W)
        import torch

        with _as_package_errors(self.folder.path, "run"), torch.inference_mode():
            hidden = self._model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state
        values: Float32 = hidden[0].float().numpy()
        return values


def _check_text(number: int, prompt: object) -> None:
    if not isinstance(prompt, str):
        raise InputError(f"prompt {number} is {prompt!r}, must be text")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"prompt {number} is not Unicode text: {error}", "re-enter it") from error


def _padded(rows: list[Float32]) -> Embedded:
    """Stack rows of different lengths, padded with zeros at their ends."""
    lengths = np.array([len(row) for row in rows])
    text = np.zeros((len(rows), lengths.max(), rows[0].shape[1]), np.float32)  # (B, L, W)
    for padded_row, row in zip(text, rows, strict=True):
        padded_row[: len(row)] = row
    return Embedded(text, (np.arange(lengths.max())[None] < lengths[:, None]).astype(np.int64))


def prompts_of(
    encoder: TextEncoder, prompts: Sequence[str], negatives: Sequence[str] = (), *, max_tokens: int = MAX_TEXT_TOKENS
) -> Prompts:
    """Embed prompts and, for guidance, negative prompts: none, one for all or one for each."""
    _check_numbers(prompts, negatives)
    positive = encoder.embed(prompts, max_tokens=max_tokens)
    if not negatives:
        return Prompts(positive)
    negative = encoder.embed(negatives, max_tokens=max_tokens)
    return Prompts(positive, negative.repeated(len(prompts) // len(negatives)))


def embed_prompts(
    folder: str | Path | EncoderFolder,
    prompts: Sequence[str],
    negatives: Sequence[str] = (),
    *,
    weights: Weights = Weights.FLOAT32,
    max_tokens: int = MAX_TEXT_TOKENS,
) -> Prompts:
    """Embed as prompts_of does. The encoder is loaded, which may take minutes, only after all texts were checked."""
    template = load_template(folder)
    _check_numbers(prompts, negatives)
    for texts in (prompts, negatives) if negatives else (prompts,):
        template.tokens(texts, max_tokens=max_tokens)
    return prompts_of(load_encoder(template, weights=weights), prompts, negatives, max_tokens=max_tokens)


def _check_numbers(prompts: Sequence[str], negatives: Sequence[str]) -> None:
    if isinstance(negatives, str) or len(negatives) not in (0, 1, len(prompts)):
        raise InputError(
            f"{len(prompts)} prompts and {len(negatives)} negative ones", "give none, one for all or one for each"
        )


# ---------------------------------------------------------------- loading


def check_installed() -> None:
    """Raise BackendUnavailable if transformers or torch are not installed."""
    if missing := [name for name in ("transformers", "torch") if find_spec(name) is None]:
        raise BackendUnavailable(
            f"a text encoder needs {missing[0]}",
            f"{pip_install('text')}, or embed prompts elsewhere and give the file: "
            "elit-export sample BUNDLE --prompts FILE.npz",
        )


def load_template(folder: str | Path | EncoderFolder) -> Template:
    """Load the tokenizer alone; raises CheckpointError if it is damaged or belongs to another encoder."""
    template_folder = folder if isinstance(folder, EncoderFolder) else read_encoder(folder)
    check_installed()
    from transformers import AutoTokenizer  # seconds

    with _quiet(), _as_package_errors(template_folder.tokenizer, "read"):
        tokenizer = AutoTokenizer.from_pretrained(template_folder.tokenizer, **OPTIONS)
    return Template(template_folder, tokenizer)


def load_encoder(folder: str | Path | Template, *, weights: Weights = Weights.FLOAT32) -> TextEncoder:
    """Load the encoder with its weights; raises CheckpointError if they are damaged or do not fit the configuration.

    Raises BackendUnavailable if they do not fit into memory.
    """
    template = folder if isinstance(folder, Template) else load_template(folder)
    return TextEncoder(template, _model(template.folder, weights))


def _model(folder: EncoderFolder, weights: Weights) -> Any:
    """Load the text part by transformers, which also knows older names of weights."""
    import torch
    import transformers

    kind = folder.kind
    with _quiet(), _as_package_errors(folder.path, "read"):
        model, report = getattr(transformers, kind.text_class).from_pretrained(
            folder.path,
            config=getattr(transformers, kind.config_class).from_pretrained(folder.path, **OPTIONS).text_config,
            key_mapping=dict(kind.renamed),
            use_safetensors=True,
            dtype=torch.float32 if weights is Weights.FLOAT32 else "auto",
            output_loading_info=True,
            attn_implementation=ATTENTION,
            ignore_mismatched_sizes=True,  # reported below by name
            **OPTIONS,
        )
    mismatches = [f"{key} of another shape" for key, *_ in sorted(report["mismatched_keys"])]
    mismatches += [f"missing {key}" for key in sorted(report["missing_keys"])]
    mismatches += [f"unknown {key}" for key in sorted(report["unexpected_keys"]) if not key.startswith(kind.unneeded)]
    if mismatches:
        raise CheckpointError(
            f"{folder.path}: its weights do not fit {CONFIG}: {', '.join(mismatches[:3])}"
            f"{f' and {len(mismatches) - 3} more' if len(mismatches) > 3 else ''}",
            "copy the folder again",
        )
    return model.eval().requires_grad_(requires_grad=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers, which logs weights not needed here. The lock is needed: its log level is global."""
    import transformers.utils.logging

    logging: Any = transformers.utils.logging
    with LOADING:
        verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            if had_bars:
                logging.enable_progress_bar()


@contextmanager
def _as_package_errors(path: Path, to: str) -> Iterator[None]:
    """Turn what transformers raises for a folder, in any class, into errors of this package."""
    try:
        yield
    except Exception as error:
        if is_of_memory(error):
            raise BackendUnavailable(
                f"{path}: not enough memory ({summary(error, lines=2)})",
                "take half with --encoder-weights stored, or run elit-export embed on a larger machine and give its "
                "file: elit-export sample BUNDLE --prompts FILE.npz",
            ) from error
        raise CheckpointError(
            f"{path}: transformers cannot {to} it: {summary(error, lines=2)}", "copy the folder again"
        ) from error

"""A user's text encoder → embeddings of prompts.

Only what embeds text is loaded, no vision tower and no head. Weights are never unpickled, no code of the folder runs,
and nothing is asked of the network. Every prompt runs by itself, so that its embedding does not depend on the others.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from elit_export.arrays import Float32
from elit_export.checkpoints.hf_folder import CONFIG
from elit_export.errors import BackendUnavailable, CheckpointError, InputError, summary
from elit_export.runtime.prompts import Embedded, Prompts
from elit_export.spec import MAX_TEXT_TOKENS
from elit_export.text.folder import EncoderFolder, read_encoder

LOADING = threading.Lock()
OPTIONS = {"local_files_only": True, "trust_remote_code": False}
ATTENTION = "sdpa"  # PyTorch's own, whatever a configuration names: that may be a kernel to download and run


class Weights(StrEnum):
    """The numbers an encoder runs in. Of 7 billion bfloat16 ones FLOAT32 takes 28 GB, STORED half of it."""

    FLOAT32 = "float32"
    STORED = "stored"


class Template:
    """A prompt's tokens as its encoder is fed them; needs no weights."""

    def __init__(self, folder: EncoderFolder, tokenizer: Any) -> None:
        """Raises CheckpointError for the tokenizer of another kind of encoder."""
        self.folder = folder
        self._tokenizer = tokenizer
        known = tokenizer.get_vocab()
        if missing := [mark for mark in folder.kind.marks if mark not in known]:
            raise CheckpointError(
                f"{folder.tokenizer}: has no token {missing[0]}: not the tokenizer of a {folder.kind.class_name}",
                "copy that of the same pipeline",
            )
        self.known = max(known.values()) + 1
        self.dropped = len(self._ids(folder.kind.before))  # tokens, which the model is not told

    def tokens(self, prompts: Sequence[str], *, longest: int) -> list[list[int]]:
        """Token numbers of each prompt in its template.

        Raises InputError for a prompt of more than `longest` tokens, the template's end among them: none is cut.
        """
        if isinstance(prompts, str) or not prompts:
            raise InputError(f"prompts must be a list of at least one text, not {prompts!r}")
        return [self._checked_ids(number, prompt, longest) for number, prompt in enumerate(prompts, 1)]

    def _checked_ids(self, number: int, prompt: str, longest: int) -> list[int]:
        _check_text(number, prompt)
        kind = self.folder.kind
        ids = self._ids(f"{kind.before}{prompt}{kind.after}")
        if (count := len(ids) - self.dropped) > longest:
            raise InputError(
                f"prompt {number} ({prompt[:20]!r}…) is {count} tokens long, {longest} are the most", "shorten it"
            )
        return ids

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, verbose=False)["input_ids"])


class TextEncoder:
    """An encoder with its weights, on the CPU."""

    def __init__(self, template: Template, model: Any) -> None:
        """Raises CheckpointError if tokenizer and model are not of one another, or the model does not run."""
        self.template, self.folder = template, template.folder
        self._model = model
        if template.known > (rows := model.get_input_embeddings().num_embeddings):
            raise CheckpointError(
                f"{self.folder.tokenizer}: has {template.known} tokens, {self.folder.path} knows {rows}",
                "copy both from the same pipeline",
            )
        self._hidden([0])

    def embed(self, prompts: Sequence[str], *, longest: int = MAX_TEXT_TOKENS) -> Embedded:
        """What a model is told of each prompt: the last hidden states, without those of the template's beginning.

        Raises InputError as `Template.tokens`.
        """
        return _padded([self._embedded(ids) for ids in self.template.tokens(prompts, longest=longest)])

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

        with _told(self.folder.path, "run"), torch.inference_mode():
            hidden = self._model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state
        values: Float32 = hidden[0].float().numpy()
        return values


def _check_text(number: int, prompt: object) -> None:
    if not isinstance(prompt, str):
        raise InputError(f"prompt {number} is {prompt!r}, must be text")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"prompt {number} is no text in Unicode: {error}", "type it anew") from error


def _padded(rows: list[Float32]) -> Embedded:
    """Rows of different lengths below one another, filled with zeros at their ends."""
    lengths = np.array([len(row) for row in rows])
    text = np.zeros((len(rows), lengths.max(), rows[0].shape[1]), np.float32)  # (B, L, W)
    for place, row in zip(text, rows, strict=True):
        place[: len(row)] = row
    return Embedded(text, (np.arange(lengths.max())[None] < lengths[:, None]).astype(np.int64))


def prompts_of(
    encoder: TextEncoder, prompts: Sequence[str], negatives: Sequence[str] = (), *, longest: int = MAX_TEXT_TOKENS
) -> Prompts:
    """Embed what images are to show and, for guidance, what it leads away from: one text for each or one for all."""
    _check_numbers(prompts, negatives)
    positive = encoder.embed(prompts, longest=longest)
    if not negatives:
        return Prompts(positive)
    negative = encoder.embed(negatives, longest=longest)
    return Prompts(positive, negative.repeated(len(prompts) // len(negatives)))


def embedded_by(
    folder: str | Path | EncoderFolder,
    prompts: Sequence[str],
    negatives: Sequence[str] = (),
    *,
    weights: Weights = Weights.FLOAT32,
    longest: int = MAX_TEXT_TOKENS,
) -> Prompts:
    """As prompts_of, by an encoder that is loaded once all texts are known to be right: it may take minutes."""
    template = load_template(folder)
    _check_numbers(prompts, negatives)
    for texts in (prompts, negatives) if negatives else (prompts,):
        template.tokens(texts, longest=longest)
    return prompts_of(load_encoder(template, weights=weights), prompts, negatives, longest=longest)


def _check_numbers(prompts: Sequence[str], negatives: Sequence[str]) -> None:
    if isinstance(negatives, str) or len(negatives) not in (0, 1, len(prompts)):
        raise InputError(
            f"{len(prompts)} prompts and {len(negatives)} negative ones", "give none, one for all or one for each"
        )


# ---------------------------------------------------------------- loading


def check_installed() -> None:
    """Raise BackendUnavailable if transformers or torch are not here."""
    if missing := [name for name in ("transformers", "torch") if find_spec(name) is None]:
        raise BackendUnavailable(
            f"a text encoder needs {missing[0]}",
            "pip install 'elit-export[text]', or embed prompts elsewhere and give the file: "
            "elit-export sample BUNDLE --prompts FILE.npz",
        )


def load_template(folder: str | Path | EncoderFolder) -> Template:
    """The tokenizer alone; raises CheckpointError if it is damaged or another encoder's."""
    found = folder if isinstance(folder, EncoderFolder) else read_encoder(folder)
    check_installed()
    from transformers import AutoTokenizer  # seconds

    with _quiet(), _told(found.tokenizer, "read"):
        tokenizer = AutoTokenizer.from_pretrained(found.tokenizer, **OPTIONS)
    return Template(found, tokenizer)


def load_encoder(folder: str | Path | Template, *, weights: Weights = Weights.FLOAT32) -> TextEncoder:
    """The encoder with its weights; raises CheckpointError if they are damaged or not those of the configuration.

    Raises BackendUnavailable where they do not fit into memory.
    """
    template = folder if isinstance(folder, Template) else load_template(folder)
    return TextEncoder(template, _model(template.folder, weights))


def _model(folder: EncoderFolder, weights: Weights) -> Any:
    """The text part as transformers makes it, which also knows older names of weights."""
    import torch
    import transformers

    kind = folder.kind
    with _quiet(), _told(folder.path, "read"):
        model, found = getattr(transformers, kind.text_class).from_pretrained(
            folder.path,
            config=getattr(transformers, kind.config_class).from_pretrained(folder.path, **OPTIONS).text_config,
            key_mapping=dict(kind.renamed),
            use_safetensors=True,
            dtype=torch.float32 if weights is Weights.FLOAT32 else "auto",
            output_loading_info=True,
            attn_implementation=ATTENTION,
            ignore_mismatched_sizes=True,  # told below by name
            **OPTIONS,
        )
    wrong = [f"{key} of another shape" for key, *_ in sorted(found["mismatched_keys"])]
    wrong += [f"missing {key}" for key in sorted(found["missing_keys"])]
    wrong += [f"unknown {key}" for key in sorted(found["unexpected_keys"]) if not key.startswith(kind.unneeded)]
    if wrong:
        raise CheckpointError(
            f"{folder.path}: its weights do not fit {CONFIG}: {', '.join(wrong[:3])}"
            f"{f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''}",
            "copy the folder again",
        )
    return model.eval().requires_grad_(requires_grad=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers tells at length of weights not needed here. One at a time: all of the process share what it says."""
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
def _told(path: Path, to: str) -> Iterator[None]:
    """What transformers raises of a folder is of no one class."""
    try:
        yield
    except Exception as error:
        if _is_of_memory(error):
            raise BackendUnavailable(
                f"{path}: not enough memory ({summary(error, lines=2)})",
                "take half with --encoder-weights stored, or run elit-export embed on a larger machine and give its "
                "file: elit-export sample BUNDLE --prompts FILE.npz",
            ) from error
        raise CheckpointError(
            f"{path}: transformers cannot {to} it: {summary(error, lines=2)}", "copy the folder again"
        ) from error


def _is_of_memory(error: BaseException) -> bool:
    """Of Python, of the system, or of torch, whose allocator on the CPU has no class of its own."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM or f"(os error {errno.ENOMEM})" in str(error)  # as safetensors tells it
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)

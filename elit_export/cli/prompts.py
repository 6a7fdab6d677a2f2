"""The options by which commands take prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import click

from elit_export.cli.common import FILE, FOLDER
from elit_export.errors import InputError
from elit_export.runtime.conditioning import kind_of
from elit_export.runtime.coverage import Coverage
from elit_export.runtime.options import ResolvedOptions
from elit_export.runtime.prompts import Prompts
from elit_export.runtime.request import check_calls
from elit_export.spec import MAX_TEXT_TOKENS, ModelSpec
from elit_export.text.encoder import Weights, embed_prompts
from elit_export.text.files import load_prompts
from elit_export.text.folder import EncoderFolder, read_encoder

PROMPT = click.option("--prompt", "texts", multiple=True, metavar="TEXT", help="What an image shows; may be repeated.")
NEGATIVE = click.option(
    "--negative", metavar="TEXT", help="Prompt of the negative branch of guidance, for all images; may be empty."
)
EMBEDDED = click.option("--prompts", "file", type=FILE, metavar="FILE.npz", help="Embeddings, as written by `embed`.")
WEIGHTS = click.option(
    "--encoder-weights",
    "weights",
    type=click.Choice([choice.value for choice in Weights]),
    help="stored: as in its files, half the memory for bfloat16 ones.  [default: float32]",
)

HOW = "say what to show with --prompt TEXT --encoder FOLDER, or give embeddings with --prompts FILE.npz"


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """The options that describe images to a text-to-image model."""

    texts: tuple[str, ...]
    negative: str | None
    encoder: Path | None
    file: Path | None
    weights: str | None

    @property
    def typed(self) -> list[str]:
        """The names of the options that were typed."""
        options = {"--prompts": self.file, "--prompt": self.texts or None, "--negative": self.negative}
        options |= {"--encoder": self.encoder, "--encoder-weights": self.weights}
        return [name for name, value in options.items() if value is not None]

    def refuse_to_overwrite(self, out: Path, arrays: Path) -> None:
        """Raise InputError if latents were to be written into the file of embeddings."""
        if self.file is not None and self.file.resolve() == arrays.resolve():
            raise InputError(f"--out {out} would overwrite {self.file} with latents", "choose another name")

    def refuse_for_classes(self) -> None:
        """Raise InputError if any was typed for a model of classes."""
        if self.typed:
            raise InputError(
                f"{self.typed[0]}: this model takes no text, it draws classes", "choose them with --labels"
            )

    def prompts(self, spec: ModelSpec, coverage: Coverage, options: ResolvedOptions, images: int) -> Prompts:
        """Embeddings from a file or by an encoder, for so many images of each; raises InputError or CheckpointError.

        An encoder runs last, when all else is known to be right, and before engines are opened: it may take as much
        memory.
        """
        if self.file is not None:
            if len(self.typed) > 1:
                raise InputError("--prompts holds the embeddings", f"leave {self.typed[1]} out")
            return load_prompts(self.file, spec)
        if not self.texts or self.encoder is None:
            missing = "--encoder is missing" if self.texts else "--prompt is missing"
            raise InputError(f"{missing}, this model takes text", HOW)
        if options.needs_null and self.negative is None:
            raise InputError(f"guidance {options.guidance} has a negative branch", "give --negative TEXT, or ''")
        if self.negative is not None and not options.needs_null:
            raise InputError(f"guidance {options.guidance} uses no --negative", "leave it out, or add cfg:4")
        folder = read_encoder(self.encoder)
        folder.check_fits(spec)
        check_calls(coverage, options, len(self.texts) * images, tokens=1, null_tokens=1)
        return embedded(folder, self.texts, self.negative, self.weights, coverage.longest_text)


def prompts_in(file: Path | None, spec: ModelSpec) -> Prompts | None:
    """Embeddings for a model that takes text, None for one of classes; raises InputError if the file fits neither."""
    if kind_of(spec) is not Prompts:
        if file is not None:
            raise InputError(f"--prompts {file}: this model takes no text, it draws classes", "leave --prompts out")
        return None
    if file is None:
        raise InputError("--prompts is missing, this model takes text", "write some with elit-export embed FOLDER")
    return load_prompts(file, spec).checked(spec)


def embedded(
    folder: Path | EncoderFolder,
    texts: Sequence[str],
    negative: str | None,
    weights: str | None,
    max_tokens: int = MAX_TEXT_TOKENS,
) -> Prompts:
    """Embed prompts as the options say; raises InputError, CheckpointError or BackendUnavailable."""
    how = Weights(weights) if weights else Weights.FLOAT32
    return embed_prompts(folder, texts, negatives_of(negative), weights=how, max_tokens=max_tokens)


def negatives_of(negative: str | None) -> tuple[str, ...]:
    return () if negative is None else (negative,)


def prompt_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the PromptOptions; the command gets them as `described`."""

    @wraps(command)
    def with_options(**options: Any) -> Any:
        described = PromptOptions(**{name: options.pop(name) for name in PromptOptions.__dataclass_fields__})
        return command(described=described, **options)

    encoder = click.option("--encoder", type=FOLDER, help="Of --prompt: a folder with text_encoder/ and tokenizer/.")
    for option in (WEIGHTS, EMBEDDED, encoder, NEGATIVE, PROMPT):
        with_options = option(with_options)
    return with_options

"""embed: prompts through a text encoder, for machines without it."""

from __future__ import annotations

from pathlib import Path

import click

from elit_export.cli.common import FOLDER, OUTPUT, say
from elit_export.cli.prompts import NEGATIVE, PROMPT, WEIGHTS, embedded, negatives_of
from elit_export.errors import InputError
from elit_export.text.files import save_prompts


@click.command()
@click.argument("folder", type=FOLDER)
@PROMPT
@NEGATIVE
@WEIGHTS
@click.option("--out", type=OUTPUT, default=Path("prompts.npz"), show_default=True)
def embed(folder: Path, texts: tuple[str, ...], negative: str | None, weights: str | None, out: Path) -> None:
    """Embed prompts by the text encoder in FOLDER, for `sample --prompts` on machines without it."""
    if not texts:
        raise InputError("--prompt is missing", "say what to show, once per image")
    if out.suffix != ".npz":
        raise InputError(f"--out {out}: embeddings are written as .npz")
    prompts = embedded(folder, texts, negative, weights)
    save_prompts(out, prompts, texts=texts, negatives=negatives_of(negative))
    _, tokens, width = prompts.positive.text.shape
    away = f" and a negative one of {prompts.negative.text.shape[1]}" if prompts.negative else ""
    say(
        f"wrote {out}: {len(prompts)} prompts of up to {tokens} tokens{away}, {width} numbers each; draw them with "
        f"elit-export sample BUNDLE --prompts {out}"
    )

"""Files with the embeddings of prompts.

The file holds `text` (B, L, W) and `mask` (B, L), and for guidance `negative_text` and `negative_mask`: anything that
embeds text can write one with NumPy. It may also hold the texts themselves: `prompts` and `negative_prompts`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from elit_export.arrays import HostArray
from elit_export.bundle.atomic import atomic_write
from elit_export.bundle.readers import GIB, PlainArraysError, array_headers, plain_arrays
from elit_export.errors import InputError
from elit_export.runtime.prompts import Embedded, Prompts, as_float32
from elit_export.spec import ModelSpec

NEGATIVE = "negative_"
TEXTS = ("prompts", "negative_prompts")
ARRAYS = ("text", "mask", "negative_text", "negative_mask")
KNOWN = (*ARRAYS, *TEXTS)
TOKENS = 1 << 22  # of all prompts together: 4,096 of the longest, or 54,000 of 77 tokens
NUMBER_BYTES = 8  # of a number, of which most have 2 or 4
EMBEDDINGS_BYTES = 4 * GIB  # 290 prompts of 1,024 tokens, 3,584 numbers each, in float32
REMEDY = "write it with elit-export embed FOLDER --prompt TEXT --out FILE.npz, or by numpy.savez(FILE, text=…, mask=…)"


def save_prompts(path: Path, prompts: Prompts, *, texts: Sequence[str] = (), negatives: Sequence[str] = ()) -> None:
    """Write embeddings and their texts, whole or not at all; raises InputError for a suffix other than .npz."""
    if path.suffix != ".npz":
        raise InputError(f"{path}: embeddings are written as .npz")
    arrays: dict[str, Any] = {"text": prompts.positive.text, "mask": prompts.positive.mask}
    if prompts.negative:
        arrays |= {"negative_text": prompts.negative.text, "negative_mask": prompts.negative.mask}
    arrays |= {name: np.array(lines) for name, lines in zip(TEXTS, (texts, negatives), strict=True) if lines}
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def load_prompts(path: Path, spec: ModelSpec) -> Prompts:
    """Read embeddings of the width that a model takes; raises InputError. `Prompts.checked` then looks at the rest."""
    arrays = _read(path, spec.text_width)
    has_negative = any(NEGATIVE + name in arrays for name in ("text", "mask"))
    return Prompts(_embedded(path, arrays, ""), _embedded(path, arrays, NEGATIVE) if has_negative else None)


def _read(path: Path, width: int) -> dict[str, HostArray]:
    try:
        headers = array_headers(path, what="the embeddings", error=InputError)
        if unknown := sorted(set(headers) - set(KNOWN)):
            raise InputError(f"{path}: holds {unknown[0]!r}; known: {', '.join(KNOWN)}", REMEDY)
        for name in ("text", "negative_text"):
            _check_header(path, name, headers.get(name), width)
        limit_bytes = min(EMBEDDINGS_BYTES, TOKENS * (width + 1) * NUMBER_BYTES)
        return plain_arrays(path, ARRAYS, what="the embeddings", error=InputError, limit_bytes=limit_bytes)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise InputError(f"no embeddings at {path}", REMEDY) from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except PlainArraysError as error:
        raise InputError(f"{path}: not a .npz of plain arrays, or damaged", REMEDY) from error


def _check_header(path: Path, name: str, header: tuple[str, tuple[int, ...]] | None, width: int) -> None:
    """Raise InputError for embeddings of another model, before they are read."""
    if header is not None and len(header[1]) == 3 and header[1][2] != width:
        raise InputError(
            f"{path}: {name} has shape {header[1]}, must be (images, tokens, {width}) for this model",
            "embed the prompts with the encoder of this model: elit-export embed FOLDER --prompt TEXT --out FILE.npz",
        )


def _embedded(path: Path, arrays: Mapping[str, HostArray], prefix: str) -> Embedded:
    names = (f"{prefix}text", f"{prefix}mask")
    if missing := [name for name in names if name not in arrays]:
        raise InputError(f"{path}: has no `{missing[0]}`; a mask is 1 for a token and 0 for padding", REMEDY)
    text, mask = (arrays[name] for name in names)
    if text.dtype.kind != "f" or text.ndim != 3:
        raise InputError(
            f"{path}: {names[0]} is {text.dtype} {text.shape}, must be float32 or float16 (images, tokens, width)"
        )
    if mask.dtype.kind not in "biu" or mask.shape != text.shape[:2]:
        raise InputError(f"{path}: {names[1]} is {mask.dtype} {mask.shape}, must be whole numbers {text.shape[:2]}")
    return Embedded(as_float32(text), mask.astype(np.int64))

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
from elit_export.bundle.readers import GIB, PlainArraysError, array_names, plain_arrays
from elit_export.errors import InputError
from elit_export.runtime.prompts import Embedded, Prompts, as_float32

NEGATIVE = "negative_"
TEXTS = ("prompts", "negative_prompts")
ARRAYS = ("text", "mask", "negative_text", "negative_mask")
KNOWN = (*ARRAYS, *TEXTS)
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


def load_prompts(path: Path) -> Prompts:
    """Read embeddings; raises InputError. `Prompts.checked` then says whether they fit a model."""
    arrays = _read(path)
    has_negative = any(NEGATIVE + name in arrays for name in ("text", "mask"))
    return Prompts(_embedded(path, arrays, ""), _embedded(path, arrays, NEGATIVE) if has_negative else None)


def _read(path: Path) -> dict[str, HostArray]:
    try:
        names = array_names(path, what="the embeddings", error=InputError)
        if unknown := sorted(set(names) - set(KNOWN)):
            raise InputError(f"{path}: holds {unknown[0]!r}; known: {', '.join(KNOWN)}", REMEDY)
        return plain_arrays(path, ARRAYS, what="the embeddings", error=InputError, limit_bytes=EMBEDDINGS_BYTES)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise InputError(f"no embeddings at {path}", REMEDY) from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except PlainArraysError as error:
        raise InputError(f"{path}: not a .npz of plain arrays, or damaged", REMEDY) from error


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

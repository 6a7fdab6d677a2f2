"""The kinds of layers of a model: which are cast to half precision, which may run in 8 bits."""

from __future__ import annotations

from enum import StrEnum
from typing import Self


class LayerKind(StrEnum):
    """A kind of layer. `casts`: a lower precision rounds its weights. `quantizes`: its products may run in 8 bits."""

    casts: bool
    quantizes: bool

    ATTENTION = "attention", True, True  # its linear layers
    MLP = "MLP", True, True
    SKIP = "joins", True, True  # projections that fuse a long skip with the tokens
    MERGE = "merging", True, True  # merges tokens, or splits them again
    PRODUCTS = "attention products", False, True  # of queries, keys and values; no weights
    CONSTANT = "constant", False, False  # a layer on parameters alone, which graphs fold
    EMBEDDER = "embedder", False, False
    MODULATION = "modulation", False, False
    NORM = "norm", False, False
    TABLE = "table", False, False  # of positions, queries or classes
    FINAL = "final layer", False, False

    def __new__(cls, name: str, casts: bool = False, quantizes: bool = False) -> Self:
        member = str.__new__(cls, name)
        member._value_ = name
        member.casts, member.quantizes = casts, quantizes
        return member

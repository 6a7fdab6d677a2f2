"""The kinds of layers of a model: which are rounded to half precision, which may run in 8 bits."""

from __future__ import annotations

from enum import StrEnum
from typing import Self


class LayerKind(StrEnum):
    """`casts`: a lower precision rounds its weights. `quantizes`: its products may run in 8 bits."""

    casts: bool
    quantizes: bool

    ATTENTION = "attention", True, True  # linear layers around it
    MLP = "MLP", True, True
    SKIP = "joins", True, True  # that bring a long skip and the tokens back to one width
    MERGE = "merging", True, True  # of tokens, and splitting them again
    PRODUCTS = "attention products", False, True  # of queries, keys and values; no weights
    CONSTANT = "constant", False, False  # a layer of parameters alone, which graphs fold
    EMBEDDER = "embedder", False, False
    MODULATION = "modulation", False, False
    NORM = "norm", False, False
    TABLE = "table", False, False  # of positions, queries or classes
    FINAL = "final layer", False, False

    def __new__(cls, name: str, casts: bool = False, quantizes: bool = False) -> Self:
        made = str.__new__(cls, name)
        made._value_ = name
        made.casts, made.quantizes = casts, quantizes
        return made

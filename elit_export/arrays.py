"""Names for arrays, so that signatures are short. Shapes stand beside their use."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from elit_export.errors import InputError

HostArray = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Pixels = npt.NDArray[np.uint8]
Arrays = dict[str, HostArray]


def refuse_masked(values: object, name: str) -> None:
    """Raise InputError for a masked array, or a list with one in it: what is masked would count as a number."""
    parts = values if isinstance(values, list | tuple) else ()
    if any(isinstance(value, np.ma.MaskedArray) for value in (values, *parts)):
        raise InputError(f"{name} is a masked array", "fill it first: array.filled(VALUE)")

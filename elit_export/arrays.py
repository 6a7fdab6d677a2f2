"""Names for arrays, so that signatures are short. Shapes stand beside their use."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

HostArray = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Pixels = npt.NDArray[np.uint8]
Arrays = dict[str, HostArray]

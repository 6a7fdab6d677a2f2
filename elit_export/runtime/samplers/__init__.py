"""The table of samplers."""

from __future__ import annotations

from elit_export.errors import InputError
from elit_export.runtime.samplers.adams_bashforth import AB2, AB3
from elit_export.runtime.samplers.adams_moulton import ABM3
from elit_export.runtime.samplers.base import Sampler
from elit_export.runtime.samplers.euler import EULER
from elit_export.runtime.samplers.euler_maruyama import EULER_MARUYAMA
from elit_export.runtime.samplers.heun import HEUN
from elit_export.runtime.samplers.unipc import UNIPC

SAMPLERS = {
    sampler.name: sampler
    for sampler in (
        EULER,
        HEUN,
        AB2,
        AB3,
        ABM3,
        UNIPC,
        EULER_MARUYAMA,
    )
}


def sampler_named(name: str) -> Sampler:
    if name not in SAMPLERS:
        raise InputError(f"unknown sampler {name!r}; known: {', '.join(SAMPLERS)}")
    return SAMPLERS[name]

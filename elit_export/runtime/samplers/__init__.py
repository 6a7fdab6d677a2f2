"""The table of samplers."""

from __future__ import annotations

from elit_export.errors import InputError
from elit_export.runtime.samplers.adams_bashforth import ab2, ab3
from elit_export.runtime.samplers.base import Sampler
from elit_export.runtime.samplers.euler import euler
from elit_export.runtime.samplers.euler_maruyama import euler_maruyama, sde_times
from elit_export.runtime.samplers.heun import heun

SAMPLERS = {
    sampler.name: sampler
    for sampler in (
        Sampler("euler", euler),
        Sampler("heun", heun, evaluates_end=lambda step, steps: step < steps - 1),
        Sampler("ab2", ab2),
        Sampler("ab3", ab3, evaluates_end=lambda step, _steps: step == 0),
        Sampler("euler-maruyama", euler_maruyama, min_steps=2, uses_noise=True, times=sde_times),
    )
}


def sampler_named(name: str) -> Sampler:
    if name not in SAMPLERS:
        raise InputError(f"unknown sampler {name!r}; known: {', '.join(SAMPLERS)}")
    return SAMPLERS[name]

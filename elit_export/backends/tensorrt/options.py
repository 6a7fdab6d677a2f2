"""The options of a TensorRT or TensorRT for RTX target in a recipe, and the differences of the two libraries."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from elit_export.backends.target import PolygraphyRunner, Target, TargetFacts
from elit_export.spec import Precision

# The oldest compute capability with arithmetic of a precision, and the oldest for hardware-compatible plans.
FIRST_WITH = {Precision.BF16: (8, 0), Precision.FP8: (8, 9)}
AMPERE = (8, 0)


@dataclass(frozen=True, kw_only=True)
class Flavour:
    """One of the two libraries, which have the same Python API.

    When building, `names_capabilities`: it builds for named GPUs, which need not be present; `compatibility`: it can
    build for other GPUs and later versions than those named. When running, `compiles_on_device`: it has a runtime cache
    and captures CUDA graphs itself; `tells_validity`: it checks a plan's header before deserializing.
    `polygraphy_environment` makes Polygraphy use this library.
    """

    module: str
    oldest: tuple[int, int]
    names_capabilities: bool
    timing_cache: bool
    compatibility: bool
    compiles_on_device: bool
    tells_validity: bool
    polygraphy_environment: tuple[str, ...] = ()

    def library(self) -> Any:
        return import_module(self.module)


FLAVOURS = {
    "tensorrt": Flavour(
        module="tensorrt",
        oldest=(10, 14),
        names_capabilities=False,
        timing_cache=True,
        compatibility=True,
        compiles_on_device=False,
        tells_validity=False,
    ),
    "tensorrt-rtx": Flavour(
        module="tensorrt_rtx",
        oldest=(1, 4),
        names_capabilities=True,
        timing_cache=False,
        compatibility=False,
        compiles_on_device=True,
        tells_validity=True,
        polygraphy_environment=("POLYGRAPHY_USE_TENSORRT_RTX=1",),
    ),
}


def _capability(text: str) -> str:
    if not re.fullmatch(r"\d{1,2}\.\d", text):
        raise ValueError(f"{text!r} is not a compute capability; they look like '8.9' and '12.0'")
    return text


class TensorRTTarget(Target):
    """A target of TensorRT, or of TensorRT for RTX, which builds for the named `compute_capabilities` without a GPU.

    `layout`: one plan per profile, or one plan whose weights all profiles share. `workspace_mb` and
    `optimization_level` limit the builder, both None for the library's own choice; `compatibility` lets
    a plan run on other GPUs at a cost in speed. `timing_cache` is shared by the plans of a target.
    `cuda_graphs` replays each call as one launch. `detailed_inspection` keeps layer names in the plan.
    """

    facts: ClassVar = TargetFacts(devices=("cuda",), precisions=tuple(Precision))

    backend: Literal["tensorrt", "tensorrt-rtx"]
    device: str = "cuda"
    compute_capabilities: tuple[Annotated[str, AfterValidator(_capability)], ...] = Field(min_length=1, strict=False)
    layout: Literal["per-profile", "multi-profile"] = "per-profile"
    workspace_mb: int | None = Field(default=None, ge=1)
    optimization_level: int | None = Field(default=None, ge=0, le=5)
    compatibility: Literal["none", "version", "hardware", "both"] = "none"
    timing_cache: bool = False
    cuda_graphs: bool = True
    detailed_inspection: bool = False

    @model_validator(mode="after")
    def _distinct_capabilities(self) -> Self:
        if len(set(self.compute_capabilities)) < len(self.compute_capabilities):
            raise ValueError(f"compute_capabilities {list(self.compute_capabilities)} names one twice")
        return self

    @property
    def flavour(self) -> Flavour:
        return FLAVOURS[self.backend]

    @property
    def plans_are_programs(self) -> bool:
        """A version-compatible plan brings code that runs on the host."""
        return self.fits_later_versions

    @property
    def polygraphy(self) -> PolygraphyRunner:
        options = ("--model-type", "engine", "--trt")
        return PolygraphyRunner(options=options, environment=self.flavour.polygraphy_environment, by_profile=True)

    @property
    def fits_later_versions(self) -> bool:
        return self.flavour.compatibility and self.compatibility in ("version", "both")

    @property
    def fits_other_gpus(self) -> bool:
        return self.compatibility in ("hardware", "both")

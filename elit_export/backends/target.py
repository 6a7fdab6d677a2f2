"""The fields of a `[targets.NAME]` table that all backends share; the backends' own classes add more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from elit_export.spec import Precision

MAX_THREADS = 1024  # more than any machine has cores; libraries would start them all
Threads = Annotated[int, Field(ge=0, le=MAX_THREADS)]  # 0 uses all cores


@dataclass(frozen=True)
class InputFormat:
    """The format of graph that a backend builds from; `graphs.formats` writes it.

    `suffix` ends the names of stored graphs. `bounds_rows`: a graph holds the maximum of rows it accepts. `is_program`:
    opening a graph can run any code that is in it.
    """

    name: str
    suffix: str = ""
    bounds_rows: bool = False
    is_program: bool = False


ONNX = InputFormat("onnx")
PROGRAM = InputFormat("program", suffix="-program", bounds_rows=True, is_program=True)  # of torch.export


@dataclass(frozen=True, kw_only=True)
class PolygraphyRunner:
    """The options by which `polygraphy run` opens a plan. `environment` goes before the command.

    `by_profile`: a plan has optimization profiles, and a run is of one of them.
    """

    options: tuple[str, ...]
    environment: tuple[str, ...] = ()
    by_profile: bool = False


POLYGRAPHY_ONNXRT = PolygraphyRunner(options=("--model-type", "onnx", "--onnxrt"))


@dataclass(frozen=True, kw_only=True)
class TargetFacts:
    """The targets that a backend supports, and the graphs it builds from.

    `supports_if`: it can run a graph with an `If`. `casts_weights`: it makes all precisions from the fp32 graph itself.
    `keeps_nodes`: its plans run the nodes of their graph, so that a deviation can be traced to one.
    `plans_are_programs`: opening a plan can run any code in it.
    """

    devices: tuple[str, ...]
    precisions: tuple[Precision, ...]
    input_format: InputFormat = ONNX
    supports_if: bool = True
    casts_weights: bool = False
    keeps_nodes: bool = True
    plans_are_programs: bool = False

    def graph_precision(self, target_precision: Precision, *, exact: bool) -> Precision:
        """Return the precision of a stored graph: an exact one is fp32, and some backends cast weights themselves."""
        return Precision.FP32 if exact or self.casts_weights else target_precision


class Target(BaseModel):
    """The device and precision of plans.

    `fused` asks for one more plan: a whole cached step, for hosts without this runtime.
    `accept_below_tolerance` is the reason to keep plans that miss their tolerance, which every report then shows.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    facts: ClassVar[TargetFacts]

    backend: str
    device: str
    precision: Annotated[Precision, Field(strict=False)]
    fused: bool = False
    accept_below_tolerance: Annotated[str, Field(pattern=r"\S")] | None = None

    @model_validator(mode="after")
    def _supported(self) -> Self:
        facts, precisions = self.facts, tuple(precision.value for precision in self.facts.precisions)
        for what, value, known in (
            ("device", self.device, facts.devices),
            ("precision", self.precision.value, precisions),
        ):
            if value not in known:
                raise ValueError(f"{what} {value!r}: backend {self.backend} has {', '.join(known)}")
        if self.fused:
            self._check_fused()
        return self

    def _check_fused(self) -> None:
        if not self.facts.supports_if:
            raise ValueError(f"fused: backend {self.backend} cannot run a graph with an If; leave it out")
        if self.precision.quantized:
            raise ValueError(f"fused: only `step` is quantized to {self.precision.value}; leave it out")
        if self.facts.casts_weights and self.precision is not Precision.FP32:
            raise ValueError(
                f"fused: backend {self.backend} would also round the values that decide, so that it decides otherwise; "
                f"use precision fp32 or leave it out"
            )

    @property
    def plans_are_programs(self) -> bool:
        """Whether opening a plan can run any code in it: then only trusted plans are opened."""
        return self.facts.plans_are_programs

    @property
    def polygraphy(self) -> PolygraphyRunner | None:
        """The runner that opens plans of this target in Polygraphy; None where it has none."""
        return None

    def options(self) -> dict[str, Any]:
        """Return the options that the backend adds, as the manifest keeps them."""
        return self.model_dump(mode="json", exclude=set(Target.model_fields))

"""What a bundle's manifest holds: facts of a model, its graphs, plans, PyTorch's outputs and calibrations."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Annotated, Any, ClassVar, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    model_validator,
)

from elit_export.bundle.artifacts import REFERENCE_FILE, Artifact, Facts, Name, hashed
from elit_export.bundle.calibration_inputs import CalibrationFacts
from elit_export.bundle.presets import StoredPresets
from elit_export.spec import (
    COEFFICIENTS,
    Budget,
    DataFacts,
    DecoderSpec,
    Fit,
    ModelSpec,
    Precision,
    Profile,
    Range,
    SolverFacts,
)
from elit_export.spec.limits import BUDGETS, ROWS, STEPS, TEXT

SCHEMA = 8


def _range_from_corners(value: object) -> object:
    corners = tuple(field.name for field in fields(Range))
    return dict(zip(corners, value, strict=True)) if isinstance(value, list | tuple) and len(value) == 3 else value


def _usable(fit: Fit) -> Fit:
    is_finite = all(map(math.isfinite, (*fit.coefficients, fit.low, fit.high)))
    if len(fit.coefficients) != COEFFICIENTS or not is_finite or min(fit.low, fit.high) < 0:
        raise ValueError(f"a fit has {COEFFICIENTS} finite coefficients and holds for distances of at least 0")
    return fit


StoredRange = Annotated[Range, BeforeValidator(_range_from_corners), PlainSerializer(Range.corners)]  # [min, opt, max]
StoredFit = Annotated[Fit, AfterValidator(_usable)]
Rows = Annotated[int, Field(ge=1, le=int(ROWS.maximum))]


class Parity(Facts):
    """The parity of a profile with PyTorch: the worst of its reference cases, or why it was not run.

    One that missed its tolerance is here only if the recipe accepts that; `reason` says why.
    """

    status: str = Field(pattern=r"^(passed|accepted|not run)$")
    reason: str = ""
    sqnr_db: float | None = None
    max_relative: float | None = None

    @property
    def ran(self) -> bool:
        return self.status != "not run"


class ReferenceCase(Facts):
    """Arrays `INDEX/x`, `INDEX/t`, …, `INDEX/velocity`, `INDEX/residual` of the reference file."""

    profile: str
    kept: int = Field(ge=1, le=int(BUDGETS.maximum))
    rows: Rows
    text: int = Field(default=0, ge=0, le=int(TEXT.maximum))  # tokens, in models with text


class ReferenceTrajectory(Facts):
    """Arrays `NAME/STEP` of the reference file, the states of a sampling, and how they were sampled.

    In models with text `labels` are numbers of prompts (`runtime.conditioning`), and `text` is how long these may be.
    """

    name: Name
    labels: tuple[int, ...]
    text: StoredRange | None = None
    steps: int = Field(ge=1, le=int(STEPS.maximum))
    schedule: str
    guidance: str
    sampler: str


class Graph(Facts):
    """A graph as it was exported or quantized, `file` in `artifact`; `graph` names its GraphSpec.

    `key` is a hash of all it was made from, by which a later build knows it is fresh. `sqnr_db` is the worst of a
    quantized graph against PyTorch over the reference cases, run by ONNX Runtime.
    """

    KIND: ClassVar = "graphs"

    artifact: Artifact
    graph: str
    precision: Precision
    file: Name
    key: str
    versions: dict[str, str]
    sqnr_db: float | None = None
    _check_hashed = model_validator(mode="after")(hashed)


class Reference(Facts):
    """PyTorch's outputs. `key` as of a graph; `cache_rows` are the rows that `probe` and `reuse` were asked with."""

    KIND: ClassVar = "reference"
    file: ClassVar[str] = REFERENCE_FILE

    artifact: Artifact
    key: str
    cache_rows: tuple[Rows, ...]
    cases: tuple[ReferenceCase, ...]
    trajectories: tuple[ReferenceTrajectory, ...]
    _check_hashed = model_validator(mode="after")(hashed)


class Plan(Facts):
    """One serialized engine: `file` in `artifact` is what a backend opens. `key` as of a graph."""

    KIND: ClassVar = "plans"

    artifact: Artifact
    key: str
    file: Name
    versions: dict[str, str]
    built_on: dict[str, str]
    _check_hashed = model_validator(mode="after")(hashed)


class ProfileFacts(Facts):
    name: str
    latents: StoredRange
    rows: StoredRange
    text: StoredRange | None = None
    plan: Plan
    parity: Parity

    @property
    def profile(self) -> Profile:
        return Profile(self.name, self.latents, self.rows, self.text)


class DecoderAnswers(Facts):
    """Pixels that diffusers decodes: arrays `ROWS/pixels` for each of `rows`. `key` is like that of a Graph."""

    KIND: ClassVar = "reference"
    file: ClassVar[str] = REFERENCE_FILE

    artifact: Artifact
    key: str
    rows: tuple[Rows, ...]
    _check_hashed = model_validator(mode="after")(hashed)


class DecoderFacts(Facts):
    """A VAE decoder as it was built: the class of diffusers, a hash of its folder, and its numbers."""

    class_name: str
    sha256: str
    spec: DecoderSpec
    rows: StoredRange
    plan: Plan
    parity: Parity
    answers: DecoderAnswers


class PlanSet(Facts):
    """The plans of one target in one precision; `options` are the target's choices beyond that.

    `cache` are the plans of the graphs that step caching calls, which serve every budget. `fused` is that of
    the graph which holds them all, where the recipe asks for it; it serves hosts without this runtime. `decoder` makes
    pictures of VAE latents, where the recipe has one. `samples` are what a quantized one was calibrated on, `accepted`
    the reason for which it may miss its tolerance.
    """

    target: str
    backend: str
    device: str
    precision: Precision
    options: dict[str, Any]
    graph: str
    profiles: tuple[ProfileFacts, ...] = Field(min_length=1)
    cache: dict[str, Plan]
    fused: Plan | None
    decoder: DecoderFacts | None
    reference: Reference
    samples: CalibrationFacts | None
    accepted: str | None

    @property
    def name(self) -> str:
        """There is one plan set of a target in a precision."""
        return f"{self.target} {self.precision.value}"

    @property
    def plans(self) -> tuple[Plan, ...]:
        """Return each plan once, however many profiles share it; those of the cache and the decoder last."""
        every = [*(facts.plan for facts in self.profiles), *self.cache.values()]
        every += [self.fused] if self.fused else []
        every += [self.decoder.plan] if self.decoder else []
        return tuple({plan.artifact.name: plan for plan in every}.values())

    @property
    def model_bytes(self) -> int:
        """The size of the plans on disk, without that of the decoder, which is not a part of the model."""
        of_decoder = self.decoder.plan.artifact.size_bytes if self.decoder else 0
        return sum(plan.artifact.size_bytes for plan in self.plans) - of_decoder

    @property
    def parities(self) -> tuple[Parity, ...]:
        """The parity with PyTorch of every profile, and of the decoder if there is one."""
        return (*(facts.parity for facts in self.profiles), *((self.decoder.parity,) if self.decoder else ()))

    def with_parity(self, profiles: Mapping[str, Parity], decoder: Parity) -> Self:
        """Return the plan set with the parity of each profile, by its name, and of the decoder."""
        facts = tuple(one.model_copy(update={"parity": profiles[one.name]}) for one in self.profiles)
        with_decoder = self.decoder and self.decoder.model_copy(update={"parity": decoder})
        return self.model_copy(update={"profiles": facts, "decoder": with_decoder})

    def without_parity(self) -> dict[str, Any]:
        """Return all fields except the parities: where these are equal, plans need not be compared again."""
        return self.model_dump(exclude={"profiles": {"__all__": {"parity"}}, "decoder": {"parity"}})


Record = Graph | Plan | Reference | DecoderAnswers  # what a build makes, each in an artifact of its own


Spec = Annotated[
    ModelSpec,
    BeforeValidator(lambda value: ModelSpec.from_dict(value) if isinstance(value, Mapping) else value),
    PlainSerializer(ModelSpec.to_dict),
]
Data = Annotated[
    DataFacts,
    BeforeValidator(lambda value: DataFacts.from_dict(value) if isinstance(value, Mapping) else value),
    PlainSerializer(DataFacts.to_dict),
]


class ModelFacts(Facts):
    model_config = ConfigDict(arbitrary_types_allowed=True)

    name: str
    spec: Spec
    data: Data
    checkpoint_sha256: str

    def other_checkpoint(self, checkpoint_sha256: str) -> str:
        """Say that what was measured on a model is of another checkpoint; empty if it is of this one."""
        if checkpoint_sha256 == self.checkpoint_sha256:
            return ""
        return f"of another checkpoint ({checkpoint_sha256[:12]}, not {self.checkpoint_sha256[:12]})"


class CacheFit(Facts):
    """How the change of a residual follows the distance that `probe` measures, and how well.

    `fit` is that of the budget with `kept` latents, or of all. It was fitted to `pairs`; the rest is of images that it
    was not fitted to: `held_out_error` is a root mean square, `r2` the share of the variance that it
    explains. Among trajectories of equally many steps, where the size of a step tells nothing, `r2_same_steps` is the
    same, and `rank_same_steps` how change and distance rise together: 1 as one, −1 one against the other.
    """

    kept: int | None
    fit: StoredFit
    r2: float
    r2_same_steps: float
    rank_same_steps: float
    held_out_error: float
    pairs: int


class CacheCalibration(Facts):
    """What `teacache` needs, and the trajectories that it was made from."""

    checkpoint_sha256: str
    fits: tuple[CacheFit, ...] = Field(min_length=1)
    images: int
    steps: tuple[int, ...]
    budgets: tuple[int, ...]
    guidance: tuple[str, ...]
    seed: int

    def fit_for(self, kept: int) -> Fit:
        """That of this budget, or of the nearest one that has its own."""
        return min(self.fits, key=lambda each: 0 if each.kept is None else abs(each.kept - kept)).fit


class Manifest(Facts):
    schema_version: int
    package_version: str
    model: ModelFacts
    model_key: str
    graphs: dict[str, Graph]
    plan_sets: tuple[PlanSet, ...] = Field(min_length=1)
    cache_calibration: CacheCalibration | None = None
    solvers: tuple[SolverFacts, ...] = ()
    presets: StoredPresets = ()

    def plan_set(self, target: str, precision: Precision) -> PlanSet:
        """The one of a target in a precision, which must be there."""
        return next(each for each in self.plan_sets if (each.target, each.precision) == (target, precision))

    def records(self) -> Iterator[Record]:
        """Yield every record of the build; what plan sets share comes several times."""
        yield from self.graphs.values()
        for plan_set in self.plan_sets:
            yield from plan_set.plans
            yield plan_set.reference
            if plan_set.decoder:
                yield plan_set.decoder.answers

    def artifacts(self) -> Iterator[Artifact]:
        yield from (record.artifact for record in self.records())


def budgets_of(plan_set: PlanSet, spec: ModelSpec) -> tuple[Budget, ...]:
    """The budgets that some profile of a plan set serves."""
    ranges = [facts.profile.latents for facts in plan_set.profiles]
    return tuple(budget for budget in spec.budgets if any(budget.kept in latents for latents in ranges))


def described(plan_sets: tuple[PlanSet, ...]) -> str:
    return ", ".join(f"target={plan_set.target!r} precision={plan_set.precision.value!r}" for plan_set in plan_sets)

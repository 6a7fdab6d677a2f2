"""The values that the stages of one build share: the checkpoint, and the job."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from elit_export.backends.target import Target
from elit_export.bundle.calibration_inputs import CalibrationInputs
from elit_export.bundle.keys import Keys
from elit_export.bundle.manifest import ModelFacts
from elit_export.bundle.store import Progress, Store
from elit_export.checkpoints.native import checkpoint_sha256, stored_checkpoint
from elit_export.graphs.about import Origin
from elit_export.models.elit import Elit
from elit_export.spec import CACHE_GRAPHS, FUSED, STEP, Profile

CHECKPOINT = 0.0  # the share of a build that is done when its checkpoint is read


@dataclass(frozen=True)
class Source:
    """The checkpoint of a build, read when a stage needs it."""

    path: str
    interface: str | Path | None
    architecture: dict[str, Any]
    progress: Progress

    @cached_property
    def sha256(self) -> str:
        return checkpoint_sha256(self.path, self.interface)

    def model(self) -> Elit:
        """Return the model with its weights as stored; they are read once."""
        return self._model

    @cached_property
    def _model(self) -> Elit:
        self.progress("read checkpoint", CHECKPOINT)
        return stored_checkpoint(self.path, interface=self.interface, **self.architecture)


@dataclass(frozen=True)
class Job:
    """One build: its target, model and profiles, the store it writes to, and the keys of its artifacts."""

    store: Store
    target: str
    options: Target
    source: Source
    keys: Keys
    facts: ModelFacts
    profiles: tuple[Profile, ...]
    inputs: CalibrationInputs | None
    inputs_file: Path | None
    trust: bool

    @property
    def origin(self) -> Origin:
        """The model and checkpoint that graphs name as their origin."""
        return Origin(self.facts.name, self.facts.checkpoint_sha256)

    @property
    def graph_names(self) -> tuple[str, ...]:
        """The graphs of the model for which the target has plans."""
        return (STEP, *CACHE_GRAPHS, *((FUSED,) if self.options.fused else ()))

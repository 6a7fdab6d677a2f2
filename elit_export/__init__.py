"""Compile ELIT checkpoints into one engine per compute budget, and sample with them.

The names below load what they need on first use, so that importing this package is cheap and an
application that only samples never imports torch.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elit_export.checkpoints.native import load_checkpoint
    from elit_export.compiler.build import compile_bundle
    from elit_export.errors import (
        BackendUnavailable,
        BuildError,
        BundleError,
        CalibrationError,
        CheckpointError,
        ElitExportError,
        EngineError,
        ExportError,
        InputError,
        ParityError,
        RecipeError,
    )
    from elit_export.runtime.conditioning import Labels
    from elit_export.runtime.pipeline import Pipeline
    from elit_export.runtime.prompts import Prompts
    from elit_export.runtime.sample import Sample
    from elit_export.runtime.sampling import StepRecord
    from elit_export.spec import Budget, ModelSpec

__all__ = [
    "BackendUnavailable",
    "Budget",
    "BuildError",
    "BundleError",
    "CalibrationError",
    "CheckpointError",
    "ElitExportError",
    "EngineError",
    "ExportError",
    "InputError",
    "Labels",
    "ModelSpec",
    "ParityError",
    "Pipeline",
    "Prompts",
    "RecipeError",
    "Sample",
    "StepRecord",
    "compile_bundle",
    "load_checkpoint",
]

_HOMES = {
    "Budget": "elit_export.spec",
    "Labels": "elit_export.runtime.conditioning",
    "ModelSpec": "elit_export.spec",
    "Pipeline": "elit_export.runtime.pipeline",
    "Prompts": "elit_export.runtime.prompts",
    "Sample": "elit_export.runtime.sample",
    "StepRecord": "elit_export.runtime.sampling",
    "compile_bundle": "elit_export.compiler.build",
    "load_checkpoint": "elit_export.checkpoints.native",
}
_ERRORS = "elit_export.errors"  # the home of the others

logging.getLogger(__name__).addHandler(logging.NullHandler())  # silent until an application listens


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, _ERRORS)), name)


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})

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
    from elit_export.errors import ElitExportError
    from elit_export.runtime.pipeline import Pipeline
    from elit_export.spec import Budget, ModelSpec

__all__ = ["Budget", "ElitExportError", "ModelSpec", "Pipeline", "compile_bundle", "load_checkpoint"]

_HOMES = {
    "Budget": "elit_export.spec",
    "ElitExportError": "elit_export.errors",
    "ModelSpec": "elit_export.spec",
    "Pipeline": "elit_export.runtime.pipeline",
    "compile_bundle": "elit_export.compiler.build",
    "load_checkpoint": "elit_export.checkpoints.native",
}

logging.getLogger(__name__).addHandler(logging.NullHandler())  # silent until an application listens


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)

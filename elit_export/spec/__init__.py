"""The facts of a model: its shape, the budgets it can run, the tensors its graphs take and give.

Takes: numbers and names.  Gives: values.
May touch: nothing. It imports nothing of the package but its errors.
"""

from elit_export.spec.budgets import (
    BUDGET_NAMES,
    Budget,
    Profile,
    Range,
    covered_text,
    covering,
    default_profiles,
    listed,
)
from elit_export.spec.cache import Fit
from elit_export.spec.data import PIXELS, SD_VAE, ByChannel, DataFacts, DecoderSpec, VaeSpec, by_channel_text
from elit_export.spec.graphs import (
    CACHE_GRAPHS,
    COEFFICIENTS,
    DECODE,
    FUSED,
    LATENTS,
    MAX_TEXT_TOKENS,
    PROBE,
    REUSE,
    ROWS,
    STEP,
    TEXT,
    TEXT_MASK,
    TIME,
    GraphSpec,
    Role,
    TensorSpec,
    fused_state,
)
from elit_export.spec.layers import LayerKind
from elit_export.spec.model import QK_NORM_KINDS, RELEASED_BACKBONE, ModelSpec
from elit_export.spec.precision import QUANTIZED, Precision
from elit_export.spec.solver import SolverError, SolverFacts, SolverTable

__all__ = [
    "BUDGET_NAMES",
    "CACHE_GRAPHS",
    "COEFFICIENTS",
    "DECODE",
    "FUSED",
    "LATENTS",
    "MAX_TEXT_TOKENS",
    "PIXELS",
    "PROBE",
    "QK_NORM_KINDS",
    "QUANTIZED",
    "RELEASED_BACKBONE",
    "REUSE",
    "ROWS",
    "SD_VAE",
    "STEP",
    "TEXT",
    "TEXT_MASK",
    "TIME",
    "Budget",
    "ByChannel",
    "DataFacts",
    "DecoderSpec",
    "Fit",
    "GraphSpec",
    "LayerKind",
    "ModelSpec",
    "Precision",
    "Profile",
    "Range",
    "Role",
    "SolverError",
    "SolverFacts",
    "SolverTable",
    "TensorSpec",
    "VaeSpec",
    "by_channel_text",
    "covered_text",
    "covering",
    "default_profiles",
    "fused_state",
    "listed",
]

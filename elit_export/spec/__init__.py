"""The facts of a model: its shape, the budgets it can run, the tensors its graphs take and give.

Takes: numbers and names.  Gives: Budget, Profile, ModelSpec, DataFacts, Precision, TensorSpec.
May touch: nothing.  Knows nothing of: weights, files, backends.
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
from elit_export.spec.data import PIXELS, SD_VAE, ByChannel, DataFacts, DecoderSpec, by_channel_text
from elit_export.spec.model import QK_NORM_KINDS, RELEASED_BACKBONE, ModelSpec
from elit_export.spec.tensors import (
    CACHE_GRAPHS,
    COEFFICIENTS,
    DECODE,
    EXACT_GRAPHS,
    FUSED,
    FUSED_CHOICES,
    LATENTS,
    LONGEST_TEXT,
    QUANTIZED,
    ROWS,
    STEP,
    TEXT,
    TEXT_MASK,
    Precision,
    TensorSpec,
)

__all__ = [
    "BUDGET_NAMES",
    "CACHE_GRAPHS",
    "COEFFICIENTS",
    "DECODE",
    "EXACT_GRAPHS",
    "FUSED",
    "FUSED_CHOICES",
    "LATENTS",
    "LONGEST_TEXT",
    "PIXELS",
    "QK_NORM_KINDS",
    "QUANTIZED",
    "RELEASED_BACKBONE",
    "ROWS",
    "SD_VAE",
    "STEP",
    "TEXT",
    "TEXT_MASK",
    "Budget",
    "ByChannel",
    "DataFacts",
    "DecoderSpec",
    "ModelSpec",
    "Precision",
    "Profile",
    "Range",
    "TensorSpec",
    "by_channel_text",
    "covered_text",
    "covering",
    "default_profiles",
    "listed",
]

"""What a build is asked for, checked before torch is imported: the recipe's target, its device, and its samples."""

from __future__ import annotations

from pathlib import Path

from elit_export.backends import BACKENDS
from elit_export.bundle.calibration_inputs import command_for
from elit_export.bundle.recipe import Recipe
from elit_export.errors import CalibrationError


def check_asked(recipe: Recipe, target: str, samples: Path | None, out: Path) -> None:
    """Raise RecipeError for a target that is not in the recipe, and CalibrationError for samples that do not fit it.

    Before its samples the device is checked: raises what the backend's builder does.
    """
    options = recipe.target(target)
    BACKENDS[options.backend].builder().check(options)
    precision = options.precision
    remedy = command_for(samples or "samples.npz", out, text=recipe.text is not None)
    if precision.quantized and samples is None:
        raise CalibrationError(
            f"target {target} is {precision.value}, which is calibrated on real inputs",
            f"{remedy} (from a bundle with any other target), then build with --samples samples.npz",
        )
    if precision.quantized and samples and not samples.exists():
        raise CalibrationError(
            f"target {target} is {precision.value}: no calibration samples at {samples}",
            f"{remedy} (from a bundle with any other target)",
        )
    if not precision.quantized and samples is not None:
        raise CalibrationError(f"target {target} is {precision.value} and takes no samples", "leave them out")

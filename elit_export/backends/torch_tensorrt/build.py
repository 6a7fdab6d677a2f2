"""Exported program → a program compiled by Torch-TensorRT.

This file has not run on a GPU: without one the library cannot be imported.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch_tensorrt

from elit_export.backends.protocols import Builder, BuiltPlan, GraphFile, OnShare, RealInputs
from elit_export.backends.torch_tensorrt.options import TorchTensorRTTarget
from elit_export.errors import BuildError
from elit_export.spec import LATENTS, ROWS, TEXT, Profile, Range, TensorSpec


class TorchTensorRTBuilder:
    """Builds a program per profile."""

    def check(self, target: TorchTensorRTTarget) -> None:
        """Raise BuildError if torch cannot use a GPU: the library builds for the GPU of this machine."""
        if not torch.cuda.is_available():
            raise BuildError("torch-tensorrt builds for the GPU of this machine, and torch sees none")

    def fingerprint(self, target: TorchTensorRTTarget) -> dict[str, str]:
        return {"library": torch_tensorrt.__version__}

    def group_profiles(self, profiles: Sequence[Profile], target: TorchTensorRTTarget) -> list[tuple[Profile, ...]]:
        """Return one group per profile: Torch-TensorRT has one optimization profile."""
        return [(profile,) for profile in profiles]

    def build_plan(
        self,
        graph: GraphFile,
        folder: Path,
        profiles: Sequence[Profile],
        target: TorchTensorRTTarget,
        inputs: RealInputs | None,
        progress: OnShare,
    ) -> BuiltPlan:
        """Write the compiled program into `folder`; raises BuildError with what the library said."""
        (profile,) = profiles
        file = graph.path.with_suffix(".ep").name
        try:
            compiled = torch_tensorrt.dynamo.compile(
                torch.export.load(graph.path),
                arg_inputs=[_range(tensor, profile) for tensor in graph.spec.inputs],
                use_explicit_typing=True,
                disable_tf32=True,
            )
            torch_tensorrt.save(compiled, str(folder / file), output_format="exported_program", retrace=False)
        except (RuntimeError, ValueError) as error:
            raise BuildError(f"torch-tensorrt cannot build {profile.name}: {error}") from error
        progress(1.0)
        return BuiltPlan(
            file=file,
            label=f"{profile.name}-torch-tensorrt{torch_tensorrt.__version__}",
            versions={"torch-tensorrt": torch_tensorrt.__version__, "torch": torch.__version__},
            built_on={"machine": platform.machine(), "system": platform.system(), "gpu": torch.cuda.get_device_name()},
        )


def _range(tensor: TensorSpec, profile: Profile) -> Any:
    """Return the specification of an input, whose dynamic dimensions have the ranges of the profile."""
    ranges = {ROWS: profile.rows, LATENTS: profile.latents, TEXT: profile.text}
    corners = [_corners(ranges[size]) if isinstance(size, str) else (size,) * 3 for size in tensor.dims]
    smallest, usual, largest = zip(*corners, strict=True)
    dtype = getattr(torch, tensor.dtype)
    return torch_tensorrt.Input(min_shape=smallest, opt_shape=usual, max_shape=largest, dtype=dtype, name=tensor.name)


def _corners(dimension: Range | None) -> tuple[int, int, int]:
    assert dimension, "a graph with text needs a profile with text"
    return dimension.corners()


BUILDERS: dict[str, Builder] = {"torch-tensorrt": TorchTensorRTBuilder()}

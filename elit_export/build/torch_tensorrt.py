"""Saved program → a program compiled by Torch-TensorRT. Not run: the library cannot be imported without a GPU.

Takes: a torch.export program, profiles, a target.  Gives: a saved program per profile.
May touch: the folder it is given.  Knows nothing of: ONNX.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch_tensorrt

from elit_export.build.plan import BuiltPlan, OnShare
from elit_export.errors import BuildError
from elit_export.recipe import TorchTensorRTTarget
from elit_export.samples import Samples
from elit_export.spec import LATENTS, ROWS, STEP, Profile, Range


def check(target: TorchTensorRTTarget) -> None:
    """Raise BuildError without a GPU that torch can use: it builds for the one that is here."""
    if not torch.cuda.is_available():
        raise BuildError("torch-tensorrt builds for the GPU of this machine, and torch sees none")


def made_by(target: TorchTensorRTTarget) -> dict[str, str]:
    return {"library": torch_tensorrt.__version__}


def grouped(profiles: Sequence[Profile], target: TorchTensorRTTarget) -> list[tuple[Profile, ...]]:
    """One program each: Torch-TensorRT has one optimization profile."""
    return [(profile,) for profile in profiles]


def build_plan(
    graph: Path,
    folder: Path,
    profiles: Sequence[Profile],
    target: TorchTensorRTTarget,
    samples: Samples | None,
    progress: OnShare,
) -> BuiltPlan:
    """Write the compiled program into `folder`; raises BuildError with what the library said."""
    (profile,) = profiles
    file = graph.with_suffix(".ep").name
    program = torch.export.load(graph)
    try:
        compiled = torch_tensorrt.dynamo.compile(
            program,
            arg_inputs=_inputs(program, profile, elastic=graph.stem == STEP),
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


def _inputs(program: Any, profile: Profile, *, elastic: bool) -> list[Any]:
    """Ranges of the profile for every input: its first dimension is the rows, another that is dynamic that of text.

    The last input of an elastic graph is `latents`, which has a dimension of its own.
    """
    tensors = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder" and _is_input(node)]
    first = [(profile.rows, ROWS)] * len(tensors)
    if elastic:
        first[-1] = (profile.latents, LATENTS)
    return [_range(tensor, ranges, profile.text, name) for tensor, (ranges, name) in zip(tensors, first, strict=True)]


def _is_input(node: Any) -> bool:
    return not str(node.target).startswith(("p_", "b_", "c_"))


def _range(tensor: Any, first: Range, text: Range | None, name: str) -> Any:
    others = [(size,) * 3 if isinstance(size, int) or not text else text.corners() for size in tensor.shape[1:]]
    smallest, usual, largest = zip(first.corners(), *others, strict=True)
    return torch_tensorrt.Input(min_shape=smallest, opt_shape=usual, max_shape=largest, dtype=tensor.dtype, name=name)

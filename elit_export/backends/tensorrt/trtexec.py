"""The line by which NVIDIA's `trtexec` builds a graph as this package's builder does."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from elit_export.spec import GraphSpec, Profile

# As the builder: types are in the graph, and fp32 is fp32.
FLAGS = ("--stronglyTyped", "--noTF32", "--skipInference")


def trtexec_line(graph: Path, spec: GraphSpec, profiles: Sequence[Profile]) -> str:
    """One plan with an optimization profile for each of the profiles, beside the graph and named after both."""
    plan = graph.with_name(f"{graph.stem}-{'-'.join(profile.name for profile in profiles)}.plan")
    words = ["trtexec", f"--onnx={graph}", f"--saveEngine={plan}", *FLAGS]
    for index, profile in enumerate(profiles):
        words += [f"--profile={index}"] if len(profiles) > 1 else []
        words += _shapes(spec, profile)
    return shlex.join(words)


def _shapes(spec: GraphSpec, profile: Profile) -> Iterator[str]:
    """Yield the shapes of inputs that have a dynamic dimension; the graph holds those of the others."""
    corners = spec.corner_shapes(profile)
    dynamic = [tensor.name for tensor in spec.inputs if any(isinstance(size, str) for size in tensor.dims)]
    for corner, option in enumerate(("minShapes", "optShapes", "maxShapes")):
        shapes = (f"{name}:{'x'.join(map(str, corners[name][corner]))}" for name in dynamic)
        yield f"--{option}={','.join(shapes)}"

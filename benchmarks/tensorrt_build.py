"""Time, size and memory of TensorRT plans of a checkpoint, in both layouts.

    python benchmarks/tensorrt_build.py CHECKPOINT RECIPE TARGET

Each layout is built in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from elit_export.backends import BACKENDS
from elit_export.backends.protocols import GraphFile
from elit_export.backends.tensorrt.options import TensorRTTarget
from elit_export.bundle.recipe import load_recipe
from elit_export.checkpoints.native import load_checkpoint
from elit_export.cost.flops import flops
from elit_export.graphs.export import export_graph
from elit_export.spec import STEP, ModelSpec, default_profiles

LAYOUTS = ("per-profile", "multi-profile")
MEGABYTE = 1e6


def main() -> None:
    match sys.argv[1:]:
        case [checkpoint, recipe, target]:
            compare(checkpoint, Path(recipe), target)
        case ["build", graph, recipe, target, layout, spec]:
            build(Path(graph), Path(recipe), target, layout, ModelSpec.from_dict(json.loads(spec)))
        case _:
            sys.exit(__doc__)


def compare(checkpoint: str, recipe: Path, target: str) -> None:
    started = time.perf_counter()
    model = load_checkpoint(checkpoint)
    print(card(model.spec))
    with tempfile.TemporaryDirectory() as folder:
        graph = export_graph(model, STEP, Path(folder), load_recipe(recipe).target(target).precision)
        print(f"export: {time.perf_counter() - started:.0f} s, peak {peak_gb():.1f} GB")
        spec = json.dumps(model.spec.to_dict())
        del model
        for layout in LAYOUTS:
            command = [sys.executable, __file__, "build", str(graph), str(recipe), target, layout, spec]
            subprocess.run(command, check=True)


def card(spec: ModelSpec) -> str:
    gflop = flops(spec, spec.full).total / 1e9
    return f"width {spec.hidden_size}, {spec.depth} blocks, {gflop:.1f} GFLOP at {spec.full}"


def build(graph: Path, recipe: Path, target: str, layout: str, spec: ModelSpec) -> None:
    loaded = load_recipe(recipe)
    chosen = loaded.target(target)
    assert isinstance(chosen, TensorRTTarget)
    chosen = chosen.model_copy(update={"layout": layout})
    builder = BACKENDS[chosen.backend].builder()
    builder.check(chosen)
    groups = builder.group_profiles(default_profiles(spec.latents, loaded.rows.value()), chosen)
    file = GraphFile(graph, spec.graph(STEP))
    started, sizes = time.perf_counter(), []
    for profiles in groups:
        with tempfile.TemporaryDirectory() as folder:
            built = builder.build_plan(file, Path(folder), profiles, chosen, None, lambda _share: None)
            sizes.append((Path(folder) / built.file).stat().st_size)
    print(
        f"{layout}: {len(sizes)} plans, {sum(sizes) / MEGABYTE:.0f} MB in all, "
        f"{time.perf_counter() - started:.0f} s, peak {peak_gb():.1f} GB"
    )


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


if __name__ == "__main__":
    main()

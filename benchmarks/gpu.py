"""TensorRT on a GPU beside PyTorch: budget × precision × rows × layout × CUDA graphs. Not run on a GPU so far.

    python benchmarks/gpu.py --json gpu.json
    python benchmarks/gpu.py --checkpoint xl2.safetensors --rows 2,8 --json xl.json

Times are medians of calls taken in turn; they include the copies to and from the host. The ratio is
PyTorch's time over the engine's, at the same budget and rows in the same process.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from elit_export.backends import BACKENDS
from elit_export.bench.engines import bench_inputs, engine_runner
from elit_export.bench.timing import timed_in_turn
from elit_export.bundle.recipe import Recipe, recipe_from_values
from elit_export.checkpoints.native import load_checkpoint
from elit_export.compiler.build import compile_bundle
from elit_export.cost.flops import flops
from elit_export.graphs.rounding import in_precision
from elit_export.models.sit import ElitSiT
from elit_export.runtime.pipeline import Pipeline
from elit_export.spec import Budget, Precision

PRECISIONS = ("fp32", "fp16", "bf16")
LAYOUTS = ("per-profile", "multi-profile")
COLUMNS = ("budget", "precision", "rows", "layout", "graphs", "ms", "eager / engine", "compile / engine")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="shipped:fashion")
    parser.add_argument("--backend", default="tensorrt-rtx", choices=["tensorrt", "tensorrt-rtx"])
    parser.add_argument("--rows", default="2,16", help="engine rows per call, by commas")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "no GPU that this PyTorch can use: torch.cuda.is_available() is false\n")
    rows = [int(count) for count in arguments.rows.split(",")]
    found = list(measured(arguments.checkpoint, arguments.backend, rows, arguments.rounds))
    facts = {"device": torch.cuda.get_device_name(), "backend": arguments.backend, "results": found}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(facts, indent=1) + "\n")
    Console().print(table(facts["device"], found))


def measured(checkpoint: str, backend: str, rows: list[int], rounds: int) -> Iterator[dict[str, Any]]:
    model = load_checkpoint(checkpoint)
    for precision in PRECISIONS:
        rounded = in_precision(model, Precision(precision))
        for layout in LAYOUTS:
            for graphs in (True, False):
                made = recipe(checkpoint, backend, precision, layout, rows, graphs=graphs)
                with tempfile.TemporaryDirectory() as folder:
                    compile_bundle(made, "gpu", out=folder)
                    with Pipeline.load(folder) as pipeline:
                        for facts in budgets(pipeline, rounded, rows, rounds):
                            yield {"precision": precision, "layout": layout, "graphs": graphs, **facts}


def capability(backend: str) -> str:
    """Of the GPU that is here; raises BackendUnavailable if a library is missing."""
    BACKENDS[backend].loader()
    from elit_export.backends.tensorrt.cuda import Cuda

    return Cuda().compute_capability()


def recipe(checkpoint: str, backend: str, precision: str, layout: str, rows: list[int], *, graphs: bool) -> Recipe:
    target = {
        "backend": backend,
        "precision": precision,
        "layout": layout,
        "cuda_graphs": graphs,
        "compute_capabilities": [capability(backend)],
    }
    ranges = {"min": 1, "opt": min(rows), "max": max(rows)}
    values = {"name": "gpu", "checkpoint": checkpoint, "rows": ranges, "targets": {"gpu": target}}
    return recipe_from_values(values, "benchmarks/gpu.py")


def budgets(pipeline: Pipeline, model: ElitSiT, rows: list[int], rounds: int) -> Iterator[dict[str, Any]]:
    on_gpu = model.cuda()
    others = {"eager": runner(on_gpu.step), "compile": runner(torch.compile(on_gpu.step, dynamic=True))}
    for budget in pipeline.spec.named_budgets.values():
        for count in rows:
            yield one(pipeline, others, budget, count, rounds)


def runner(step: Callable[..., Any]) -> Callable[[dict[str, Any]], Any]:
    """As an engine's call: inputs from the host, the velocity back, the residual stays."""

    @torch.inference_mode()
    def run(inputs: dict[str, Any]) -> Any:
        velocity, _residual = step(*(torch.from_numpy(array).cuda() for array in inputs.values()))
        return velocity.cpu()

    return run


def one(pipeline: Pipeline, others: dict[str, Any], budget: Budget, rows: int, rounds: int) -> dict[str, Any]:
    inputs = bench_inputs(pipeline, budget, rows)
    runners = {"engine": engine_runner(pipeline, budget), **others}
    timings = timed_in_turn(
        {name: lambda run=run: run(inputs) for name, run in runners.items()}, rounds=rounds, warmup=5
    )
    engine_ms = timings["engine"].median_ms
    return {
        "budget": str(budget),
        "rows": rows,
        "ms": engine_ms,
        "gflops_per_s": flops(pipeline.spec, budget).total * rows / engine_ms / 1e6,
        "speedups": {name: timing.median_ms / engine_ms for name, timing in timings.items() if name != "engine"},
    }


def table(device: str, found: list[dict[str, Any]]) -> Table:
    made = Table(*COLUMNS, title=device)
    for facts in found:
        ratios = [f"{facts['speedups'][name]:.2f}" for name in ("eager", "compile")]
        kinds = [str(facts[name]) for name in ("budget", "precision", "rows", "layout", "graphs")]
        made.add_row(*kinds, f"{facts['ms']:.3f}", *ratios)
    return made


if __name__ == "__main__":
    main()

"""Measures the accuracy that each kind of layer loses in 8 bits."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from elit_export.arrays import Arrays, HostArray
from elit_export.backends.protocols import Engine, to_host
from elit_export.bundle.calibration_inputs import MIN_SAMPLES, CalibrationInputs
from elit_export.calibrate.inputs import RecordedRow, SampleRecipe, recorded_rows
from elit_export.cost.flops import flops, layer_flops
from elit_export.graphs.quantize import LAYERS_IN, quantized_graph
from elit_export.runtime.bank import EngineBank, Slot, sizes_of
from elit_export.runtime.pipeline import Pipeline
from elit_export.runtime.prompts import Prompts, joined
from elit_export.spec import LATENTS, Budget, DataFacts, ModelSpec, Precision, Profile, Range
from elit_export.verify.metrics import Difference, difference

AS_BUILT = "all as built"
HELD_OUT_ROWS = 20  # of each budget
MAX_ROWS = 1 << 16  # an upper bound of the rows of any call


@dataclass(frozen=True)
class Sensitivity:
    """The share of FLOPs and the errors of one kind of layer quantized alone, or of AS_BUILT, by latents kept."""

    layers: str
    flops_share: dict[int, float]
    velocity: dict[int, Difference]
    residual: dict[int, Difference]


def sensitivities(
    graph: Path,
    spec: ModelSpec,
    data: DataFacts,
    precision: Precision,
    samples: CalibrationInputs,
    prompts: Prompts | None = None,
) -> Iterator[Sensitivity]:
    """Measure each kind of layer alone, then the default selection of layers: `sensitivity_count` results.

    Errors are measured on rows of trajectories with another seed than that of the samples, at each of their budgets;
    for a model with text these are conditioned on `prompts`.
    """
    with _engine(graph) as float32_engine:
        held_out = held_out_rows(float32_engine, spec, data, samples, prompts)
        expected = _outputs(float32_engine, held_out)
    for name in [*_layer_kinds(spec), AS_BUILT]:
        layers = LAYERS_IN[precision] if name == AS_BUILT else (name,)
        with tempfile.TemporaryDirectory(prefix="elit-export-") as folder:
            rest = Precision.FP16 if name == AS_BUILT else Precision.FP32
            quantized_path = quantized_graph(graph, Path(folder), precision, samples, spec, layers, rest=rest)
            quantized = outputs_of(quantized_path, held_out)
        yield Sensitivity(
            name,
            flops_share={
                kept: flops_share(spec, kept, layers, text=sizes_of(rows)[1]) for kept, rows in held_out.items()
            },
            velocity={kept: difference(quantized[kept]["velocity"], expected[kept]["velocity"]) for kept in held_out},
            residual={kept: difference(quantized[kept]["residual"], expected[kept]["residual"]) for kept in held_out},
        )


def sensitivity_count(spec: ModelSpec) -> int:
    """Count the results of `sensitivities`."""
    return len(_layer_kinds(spec)) + 1


def _layer_kinds(spec: ModelSpec) -> list[str]:
    """List the kinds of layers that a model has; a model without tail blocks has none of the tail."""
    text = 1 if spec.takes_text else 0  # any length will do
    return [name for name, count in layer_flops(spec, spec.full, text=text).items() if count]


def flops_share(spec: ModelSpec, kept: int, layers: Sequence[str], *, text: int = 0) -> float:
    """Compute the share of a step's FLOPs in some kinds of layers, with `text` tokens of text."""
    budget = Budget(kept, spec.latents)
    by_layer = layer_flops(spec, budget, text=text)
    return sum(by_layer[name] for name in layers) / flops(spec, budget, text=text).total


def held_out_rows(
    float32_engine: Engine, spec: ModelSpec, data: DataFacts, samples: CalibrationInputs, prompts: Prompts | None = None
) -> dict[int, Arrays]:
    """Record, by latents kept, HELD_OUT_ROWS rows of trajectories like those of the samples, with another seed.

    They are at the same t for every budget, evenly from the first to the last step, because the error grows towards 0.
    """
    facts, kept = samples.facts, np.unique(samples.kept).tolist()
    recipe = SampleRecipe(
        images=max(2, math.ceil(HELD_OUT_ROWS / facts.steps)),
        steps=facts.steps,
        sampler=facts.sampler,
        guidance=facts.guidance,
        budgets=tuple(kept),
        samples=MIN_SAMPLES,
        seed=facts.seed + 1,
        rows=2,
    )
    text = spec.any_text
    profile = Profile("held out", Range(1, spec.latents, spec.latents), Range(1, 1, MAX_ROWS), text)
    pipeline = Pipeline(EngineBank([Slot(profile, float32_engine)], spec.budgets, Precision.FP32), spec, data)
    recorded = [row for part in recorded_rows(pipeline, recipe, prompts) for row in part]
    return {latents: _batch([row for row in recorded if row.kept == latents]) for latents in kept}


def _batch(rows: Sequence[RecordedRow]) -> Arrays:
    ordered = sorted(rows, key=lambda row: row.t)
    indices = np.linspace(0, len(ordered) - 1, HELD_OUT_ROWS).round().astype(int)
    selected = [ordered[index].inputs for index in indices]
    batch = joined([{name: array for name, array in row.items() if name != LATENTS} for row in selected])
    return {**batch, LATENTS: selected[0][LATENTS]}


def outputs_of(graph: Path, rows: Mapping[int, Arrays]) -> dict[int, dict[str, HostArray]]:
    """Run a graph on each of the batches, without fusing its nodes."""
    with _engine(graph) as engine:
        return _outputs(engine, rows)


def _outputs(engine: Engine, rows: Mapping[int, Arrays]) -> dict[int, dict[str, HostArray]]:
    return {kept: {name: to_host(array) for name, array in engine(inputs).items()} for kept, inputs in rows.items()}


def _engine(graph: Path) -> Engine:
    from elit_export.backends.onnxruntime.engine import open_as_written

    return open_as_written(graph)

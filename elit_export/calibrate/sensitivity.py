"""What each kind of layer costs in accuracy in 8 bits."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from elit_export.arrays import Arrays, HostArray
from elit_export.backends.protocols import Engine, to_host
from elit_export.bundle.calibration_inputs import FEWEST, CalibrationInputs
from elit_export.calibrate.inputs import SampleRecipe, Seen, seen_rows
from elit_export.cost.flops import flops, layer_flops
from elit_export.graphs.quantize import LAYERS_IN, quantized_graph
from elit_export.runtime.bank import EngineBank, Slot, sizes_of
from elit_export.runtime.pipeline import Pipeline
from elit_export.runtime.prompts import Prompts, joined
from elit_export.spec import LATENTS, Budget, DataFacts, ModelSpec, Precision, Profile, Range
from elit_export.verify.metrics import Difference, difference

AS_BUILT = "all as built"
HELD_OUT_ROWS = 20  # of each budget
MOST_ROWS = 1 << 16  # more rows than any call has


@dataclass(frozen=True)
class Sensitivity:
    """One kind of layer quantized alone (or AS_BUILT): its share of the FLOPs and the errors, by latents kept."""

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
    """`sensitivity_count` of them: each kind of layer alone, then all that are quantized if nothing else is asked for.

    The errors are of rows from trajectories with another seed than that of the samples, at each of their budgets; of a
    model with text they show `prompts`.
    """
    with _engine(graph) as exact:
        held_out = held_out_rows(exact, spec, data, samples, prompts)
        expected = _answers(exact, held_out)
    for name in [*_layers_of(spec), AS_BUILT]:
        layers = LAYERS_IN[precision] if name == AS_BUILT else (name,)
        with tempfile.TemporaryDirectory(prefix="elit-export-") as folder:
            rest = Precision.FP16 if name == AS_BUILT else Precision.FP32
            made = quantized_graph(graph, Path(folder), precision, samples, spec, layers, rest=rest)
            found = answers_of(made, held_out)
        yield Sensitivity(
            name,
            flops_share={
                kept: flops_share(spec, kept, layers, text=sizes_of(rows)[1]) for kept, rows in held_out.items()
            },
            velocity={kept: difference(found[kept]["velocity"], expected[kept]["velocity"]) for kept in held_out},
            residual={kept: difference(found[kept]["residual"], expected[kept]["residual"]) for kept in held_out},
        )


def sensitivity_count(spec: ModelSpec) -> int:
    return len(_layers_of(spec)) + 1


def _layers_of(spec: ModelSpec) -> list[str]:
    """The kinds of layers that a model has; one without tail blocks has none of the tail's."""
    text = 1 if spec.takes_text else 0  # any length tells
    return [name for name, count in layer_flops(spec, spec.full, text=text).items() if count]


def flops_share(spec: ModelSpec, kept: int, layers: Sequence[str], *, text: int = 0) -> float:
    """Share of all FLOPs of a step that kinds of layers hold, with so many tokens of text."""
    budget = Budget(kept, spec.latents)
    each = layer_flops(spec, budget, text=text)
    return sum(each[name] for name in layers) / flops(spec, budget, text=text).total


def held_out_rows(
    exact: Engine, spec: ModelSpec, data: DataFacts, samples: CalibrationInputs, prompts: Prompts | None = None
) -> dict[int, Arrays]:
    """By latents kept, HELD_OUT_ROWS rows of trajectories like those of the samples, with another seed.

    They lie at the same t for every budget, evenly from the first to the last step, because the error grows towards 0.
    """
    facts, kept = samples.facts, np.unique(samples.kept).tolist()
    recipe = SampleRecipe(
        images=max(2, math.ceil(HELD_OUT_ROWS / facts.steps)),
        steps=facts.steps,
        sampler=facts.sampler,
        guidance=facts.guidance,
        budgets=tuple(kept),
        samples=FEWEST,
        seed=facts.seed + 1,
        rows=2,
    )
    text = spec.any_text
    profile = Profile("every", Range(1, spec.latents, spec.latents), Range(1, 1, MOST_ROWS), text)
    pipeline = Pipeline(EngineBank([Slot(profile, exact)], spec.budgets, Precision.FP32), spec, data)
    seen = [row for part in seen_rows(pipeline, recipe, prompts) for row in part]
    return {number: _batch([row for row in seen if row.kept == number]) for number in kept}


def _batch(seen: Sequence[Seen]) -> Arrays:
    ordered = sorted(seen, key=lambda row: row.t)
    rows = [ordered[index].inputs for index in np.linspace(0, len(ordered) - 1, HELD_OUT_ROWS).round().astype(int)]
    together = joined([{name: array for name, array in row.items() if name != LATENTS} for row in rows])
    return {**together, LATENTS: rows[0][LATENTS]}


def answers_of(graph: Path, rows: Mapping[int, Arrays]) -> dict[int, dict[str, HostArray]]:
    """What a graph gives to each of the batches, node by node as it is written."""
    with _engine(graph) as engine:
        return _answers(engine, rows)


def _answers(engine: Engine, rows: Mapping[int, Arrays]) -> dict[int, dict[str, HostArray]]:
    return {kept: {name: to_host(array) for name, array in engine(inputs).items()} for kept, inputs in rows.items()}


def _engine(graph: Path) -> Engine:
    from elit_export.backends.onnxruntime.engine import open_as_written

    return open_as_written(graph)

"""Computes PyTorch's reference outputs: the model as an engine, run at the reference cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from elit_export.arrays import Arrays
from elit_export.backends.protocols import FunctionEngine, to_host
from elit_export.bundle.manifest import ReferenceCase, ReferenceTrajectory
from elit_export.models.elit import Elit
from elit_export.runtime.bank import EngineBank, Slot
from elit_export.runtime.pipeline import Pipeline
from elit_export.spec import CACHE_GRAPHS, LATENTS, STEP, DecoderSpec, Precision, Profile, Range
from elit_export.verify.cases import cache_inputs, case_rows, decoder_inputs, trajectory_rows, trajectory_states

MAX_ROWS = 1 << 20


def torch_engine(model: Elit, graph: str = STEP, *, compiled: bool = False) -> FunctionEngine:
    """Wrap a graph's method of the model, on its own device, as an engine; with `compiled` by torch.compile."""
    method, spec = getattr(model, graph), model.spec.graph(graph)
    run = torch.compile(method, dynamic=True) if compiled else method
    device = next(model.parameters()).device

    @torch.inference_mode()
    def forward(inputs: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        tensors = (torch.from_numpy(inputs[tensor.name]).to(device) for tensor in spec.inputs)
        outputs = run(*tensors)
        named = zip(spec.outputs, outputs if isinstance(outputs, tuple) else (outputs,), strict=True)
        return {tensor.name: output.cpu().numpy() for tensor, output in named}

    return FunctionEngine(forward, spec)


def torch_pipeline(model: Elit) -> Pipeline:
    """Make a pipeline with PyTorch in place of engines, at every budget."""
    text = model.spec.any_text
    profile = Profile("torch", Range(1, model.spec.latents, model.spec.latents), Range(1, 1, MAX_ROWS), text)
    cache = {graph: torch_engine(model, graph) for graph in CACHE_GRAPHS}
    bank = EngineBank([Slot(profile, torch_engine(model))], model.spec.budgets, Precision.FP32, cache)
    return Pipeline(bank, model.spec, model.data)


def reference_arrays(
    model: Elit,
    cases: Sequence[ReferenceCase],
    rows: Sequence[int],
    trajectories: Sequence[ReferenceTrajectory],
    text: Range | None,
) -> Arrays:
    """Compute inputs and outputs of each case as `INDEX/NAME`, the states of each trajectory as `NAME/STEP`.

    Inputs of cases are rows of real trajectories: engines in 8 bits are calibrated on these, and need not be accurate
    elsewhere; `text` is the range of their prompts' lengths. Outputs of `probe` and `reuse` at each of `rows` as
    `GRAPH/ROWS/NAME`.
    """
    engine, pipeline = torch_engine(model), torch_pipeline(model)
    pool = trajectory_rows(pipeline, text)
    arrays: Arrays = {}
    for index, case in enumerate(cases):
        inputs = case_rows(case, index, pool, model.spec)
        outputs = engine({**inputs, LATENTS: np.arange(case.kept)})
        arrays |= {f"{index}/{name}": to_host(array) for name, array in {**inputs, **outputs}.items()}
    for graph, count in product(CACHE_GRAPHS, rows):
        outputs = torch_engine(model, graph)(cache_inputs(graph, count, model.spec))
        arrays |= {f"{graph}/{count}/{name}": to_host(array) for name, array in outputs.items()}
    for trajectory in trajectories:
        states = trajectory_states(pipeline, trajectory)
        arrays |= {f"{trajectory.name}/{step}": state for step, state in enumerate(states)}
    return arrays


def decoder_outputs(decoder: nn.Module, spec: DecoderSpec, rows: Sequence[int]) -> Arrays:
    """Compute a decoder's outputs at its reference inputs, as `ROWS/pixels`."""
    with torch.inference_mode():
        return {
            f"{count}/pixels": decoder(torch.from_numpy(decoder_inputs(count, spec)["z"])).numpy() for count in rows
        }

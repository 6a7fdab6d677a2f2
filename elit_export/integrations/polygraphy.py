"""Engines as runners of NVIDIA Polygraphy, so that its Comparator compares any two of them.

runners = [plan_set_runner(bundle, one) for one in bundle.manifest.plan_sets]
results = Comparator.run(runners, data_loader=reference_inputs(bundle, bundle.manifest.plan_sets[0]))
assert bool(Comparator.compare_accuracy(results, compare_func=SnrCompareFunc(snr_threshold=36)))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import perf_counter

import numpy as np
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata

from elit_export.arrays import Arrays
from elit_export.backends.protocols import Array, Engine, to_host
from elit_export.bundle.manifest import PlanSet
from elit_export.bundle.reading import Bundle
from elit_export.runtime.bank import EngineBank
from elit_export.runtime.opening import open_bank
from elit_export.spec import LATENTS, STEP, Budget, GraphSpec
from elit_export.verify.parity import case_of, load_reference


class EngineRunner(BaseRunner):  # type: ignore[misc]
    """Any Engine of a graph. `opener` gives it when the runner is activated; it is closed when that ends."""

    def __init__(self, opener: Callable[[], Engine], graph: GraphSpec, name: str) -> None:
        super().__init__(name=name)
        self._opener = opener
        self._graph = graph
        self._engine: Engine | None = None

    def activate_impl(self) -> None:
        self._engine = self._opener()

    def get_input_metadata_impl(self) -> TensorMetadata:
        """Dynamic dimensions are None, as Polygraphy writes them."""
        metadata = TensorMetadata()
        for tensor in self._graph.inputs:
            shape = [None if isinstance(size, str) else size for size in tensor.dims]
            metadata.add(tensor.name, np.dtype(tensor.dtype), shape)
        return metadata

    def infer_impl(self, feed_dict: Mapping[str, Array]) -> Arrays:
        assert self._engine, "Polygraphy activates a runner before it infers"
        begun = perf_counter()
        outputs = {name: to_host(array) for name, array in self._engine(feed_dict).items()}
        self.inference_time = perf_counter() - begun
        return outputs

    def deactivate_impl(self) -> None:
        if self._engine:
            self._engine.close()
        self._engine = None


class StepOfBank(Engine):
    """The graph `step` of a plan set as one engine: the profile that serves a call is found by its shapes."""

    def __init__(self, bank: EngineBank, of: int) -> None:
        self._bank = bank
        self._of = of

    def __call__(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """Raises InputError for a call that no profile serves."""
        budget = Budget(len(to_host(inputs[LATENTS])), self._of)
        return self._bank(budget, {name: array for name, array in inputs.items() if name != LATENTS}).outputs

    def close(self) -> None:
        self._bank.close()


def plan_set_runner(bundle: Bundle, plan_set: PlanSet) -> EngineRunner:
    """The steps of a plan set. Its plans are opened, with whatever that raises, when the runner is activated."""
    spec = bundle.manifest.model.spec
    return EngineRunner(lambda: StepOfBank(open_bank(bundle, plan_set), spec.latents), spec.graph(STEP), plan_set.name)


def reference_inputs(bundle: Bundle, plan_set: PlanSet) -> list[Arrays]:
    """The inputs of a plan set's reference cases, for the `data_loader` of Comparator.run."""
    reference, spec = plan_set.reference, bundle.manifest.model.spec
    arrays = load_reference(bundle, reference)
    return [case_of(reference, index, arrays, spec)[0] for index in range(len(reference.cases))]

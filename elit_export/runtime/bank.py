"""The engine bank: one callable that runs a step at any covered budget."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np

from elit_export.arrays import Float32, Float64, HostArray
from elit_export.backends.process import ProcessBound
from elit_export.backends.protocols import Array, Engine, to_host
from elit_export.errors import EngineError
from elit_export.runtime.coverage import Coverage
from elit_export.runtime.prompts import filled
from elit_export.spec import DECODE, LATENTS, TEXT, TEXT_MASK, Budget, Precision, Profile


@dataclass(frozen=True)
class Slot:
    """A profile and the engine that serves it; several slots may share one engine."""

    profile: Profile
    engine: Engine


class Served(NamedTuple):
    """The outputs of a call, the slot that serves a step of its size, and the tokens of text a row, with padding."""

    outputs: Mapping[str, Array]
    slot: Slot
    text: int


class EngineBank(ProcessBound):
    """Engines of one model and precision, selected by budget. It owns them: close it, or use it in `with`.

    It runs one call at a time: a lock makes a bank safe to share between threads and pipelines. After a
    fork, the child refuses calls, and closing does nothing: a thread that is missing there may hold the lock.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        budgets: Sequence[Budget],
        precision: Precision,
        cache: Mapping[str, Engine] | None = None,
        decoder: Engine | None = None,
    ) -> None:
        """Take the engines; those in `cache`, by graph name, run the graphs of the step cache, which needs them.

        `decoder` makes pixels of VAE latents.
        """
        super().__init__()
        self.slots = tuple(slots)
        self.cache = dict(cache or {})
        self.decoder = decoder
        self.precision = precision
        self.coverage = Coverage(tuple(slot.profile for slot in slots), tuple(budgets), frozenset(self.cache))
        self._by_profile = {slot.profile: slot for slot in slots}
        self._lock = threading.Lock()
        self._closed = False

    def slot_for(self, budget: Budget, rows: int, text: int = 0) -> Slot:
        """Return the slot that serves a call of so many rows and tokens of text; raises InputError if none does."""
        return self._by_profile[self.coverage.profile_for(budget, rows, text)]

    def __call__(self, budget: Budget, inputs: Mapping[str, Array]) -> Served:
        """Run one step at `budget`; `inputs` are those of `step` without `latents`, with text of any accepted length.

        Raises EngineError if the velocity is not finite, naming profile and precision.
        """
        slot, text = self._slot_of(budget, inputs)
        latents = np.arange(budget.kept, dtype=np.int64)
        outputs = self._run(slot.engine, {**filled(inputs, text), LATENTS: latents})
        _check_finite(outputs, f"profile {slot.profile.name} ({self.precision.value}) at budget {budget}")
        return Served(outputs, slot, text)

    def _slot_of(self, budget: Budget, inputs: Mapping[str, Array]) -> tuple[Slot, int]:
        """Return the slot that serves a step, and the tokens of text that it gets, with padding."""
        rows, text = sizes_of(inputs)
        slot = self.slot_for(budget, rows, text)
        return slot, slot.profile.tokens(text)

    # the graphs of the step cache, which a bank may lack (`cache`)

    def probe(self, inputs: Mapping[str, Array], signal_prev: Array) -> Mapping[str, Array]:
        """Return the `signal` of a step, and its `distance` from that of the step before."""
        return self._run(self.cache["probe"], {**without_text(inputs), "signal_prev": signal_prev})

    def reuse(
        self, budget: Budget, inputs: Mapping[str, Array], residual: Array, residual_prev: Array, weight: float
    ) -> Served:
        """Return the velocity of a step whose blocks are replaced by residual + weight · (residual − residual_prev).

        Raises EngineError as a step does.
        """
        slot, text = self._slot_of(budget, inputs)
        forecast = np.full(len(to_host(inputs["x"])), weight, np.float32)
        residuals = {"residual": residual, "residual_prev": residual_prev, "forecast": forecast}
        outputs = self._run(self.cache["reuse"], {**without_text(inputs), **residuals})
        _check_finite(outputs, "the graph `reuse`")
        return Served(outputs, slot, text)

    def time_embeddings(self, times: Float64, rows: int) -> HostArray:
        """Return the embedding of each time (len(times), D), computed in calls of so many rows."""
        padded = np.pad(times.astype(np.float32), (0, -len(times) % rows), mode="edge").reshape(-1, rows)
        embeddings = [to_host(self._run(self.cache["time"], {"t": part})["embedding"]) for part in padded]
        return np.concatenate(embeddings)[: len(times)]

    def decode(self, z: Float32) -> Float32:
        """Return the pixels that the decoder makes of its input; raises EngineError as a step does."""
        assert self.decoder
        outputs = self._run(self.decoder, {"z": z})
        _check_finite(outputs, f"the graph `{DECODE}`", "pixels")
        return to_host(outputs["pixels"])

    def _run(self, engine: Engine, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        self.check_process()
        with self._lock:
            if self._closed:
                raise EngineError("this engine bank is closed", "load the pipeline again")
            return engine(inputs)

    def close(self) -> None:
        """Close every engine once, after a call in progress."""
        if self.is_foreign:
            return
        with self._lock:
            if self._closed:
                return
            self._closed = True
            engines = [*(slot.engine for slot in self.slots), *self.cache.values()]
            engines += [self.decoder] if self.decoder else []
            with ExitStack() as stack:  # all of them, even if one fails
                for engine in {id(engine): engine for engine in engines}.values():
                    stack.callback(engine.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def sizes_of(inputs: Mapping[str, Array]) -> tuple[int, int]:
    """Return the rows and the tokens of text of a call."""
    return len(to_host(inputs["x"])), to_host(inputs[TEXT]).shape[1] if TEXT in inputs else 0


def without_text(inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Return the inputs of graphs that run no block: only blocks take text."""
    return {name: array for name, array in inputs.items() if name not in (TEXT, TEXT_MASK)}


def _check_finite(outputs: Mapping[str, Array], who: str, what: str = "velocity") -> None:
    if not np.isfinite(to_host(outputs[what])).all():
        phrase = {"velocity": "a velocity that is", "pixels": "pixels that are"}[what]
        raise EngineError(f"{who} gave {phrase} not finite")

"""The engine bank: one call, any covered budget."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Self

import numpy as np

from elit_export.arrays import Float32, Float64, HostArray
from elit_export.backends.protocols import Array, Engine, to_host
from elit_export.errors import EngineError, InputError
from elit_export.runtime.prompts import filled
from elit_export.spec import DECODE, LATENTS, TEXT, TEXT_MASK, Budget, Precision, Profile, listed


@dataclass(frozen=True)
class Slot:
    """A profile and the engine that serves it; several slots may share one engine."""

    profile: Profile
    engine: Engine

    def tokens(self, text: int) -> int:
        """How many tokens the engine runs on where it is given so many: what is shorter is filled up with padding."""
        return max(text, self.profile.text.min) if self.profile.text else text


class EngineBank:
    """Engines of one model and precision, chosen by budget. Owns them: close it, or use it in `with`.

    One call at a time: a lock makes a bank safe to share between threads and pipelines.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        budgets: Sequence[Budget],
        precision: Precision,
        cache: Mapping[str, Engine] | None = None,
        decoder: Engine | None = None,
    ) -> None:
        """`cache` are the engines of the graphs that step caching calls, by name; without them nothing is cached.

        `decoder` makes pixels of VAE latents.
        """
        self.slots = tuple(slots)
        self.cache = dict(cache or {})
        self.decoder = decoder
        self.precision = precision
        self._budgets = tuple(budgets)
        self._known = frozenset(budgets)  # asked for at every call
        self._lock = threading.Lock()
        self._closed = False

    @property
    def covered(self) -> tuple[Budget, ...]:
        return tuple(budget for budget in self._budgets if self._serving(budget))

    @property
    def not_covered(self) -> tuple[Budget, ...]:
        return tuple(budget for budget in self._budgets if not self._serving(budget))

    def slot_for(self, budget: Budget, rows: int, text: int = 0) -> Slot:
        """The slot whose ranges hold K, rows and tokens of text, and whose opt is nearest to K; or InputError.

        Where text is shorter than any takes it, the one that needs the least padding.
        """
        serving = self._serving(budget)
        if not serving:
            raise InputError(
                f"no profile covers budget {budget}; covered: {listed(self.covered)}. "
                f"Choose one of these or add a profile to the recipe and build again"
            )
        fitting = [slot for slot in serving if rows in slot.profile.rows]
        if not fitting:
            limits = ", ".join(f"{slot.profile.name} takes {slot.profile.rows} rows" for slot in serving)
            raise InputError(
                f"{rows} rows at budget {budget}: profile {limits} (min..opt..max). "
                f"Sample fewer images at once (guidance may need two rows an image) or build with other `rows`"
            )
        reading = [slot for slot in fitting if slot.profile.text is None or slot.tokens(text) in slot.profile.text]
        if not reading:
            limits = ", ".join(f"{slot.profile.name} takes {slot.profile.text}" for slot in fitting)
            raise InputError(
                f"prompts of {text} tokens: profile {limits} (min..opt..max). "
                f"Choose other prompts or build with another `text`"
            )
        return min(reading, key=lambda slot: (slot.tokens(text), abs(slot.profile.latents.opt - budget.kept)))

    def _serving(self, budget: Budget) -> list[Slot]:
        if budget not in self._known:
            raise InputError(f"this model cannot run budget {budget}; it runs {listed(self._budgets)}")
        return [slot for slot in self.slots if budget.kept in slot.profile.latents]

    def __call__(self, budget: Budget, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """Run one step at `budget`; `inputs` are the step's without `latents`, with text of any length up to the most.

        Raises EngineError if the velocity is not finite, naming profile and precision.
        """
        rows, text = sizes_of(inputs)
        slot = self.slot_for(budget, rows, text)
        latents = np.arange(budget.kept, dtype=np.int64)
        outputs = self._run(slot.engine, {**filled(inputs, slot.tokens(text)), LATENTS: latents})
        _check_finite(outputs, f"profile {slot.profile.name} ({self.precision.value}) at budget {budget}")
        return outputs

    # the graphs of the step cache, which a bank may lack (`cache`)

    def probe(self, inputs: Mapping[str, Array], signal_prev: Array) -> Mapping[str, Array]:
        """The `signal` of a step, and its `distance` from that of the step before."""
        return self._run(self.cache["probe"], {**without_text(inputs), "signal_prev": signal_prev})

    def reuse(
        self, inputs: Mapping[str, Array], residual: Array, residual_prev: Array, weight: float
    ) -> Mapping[str, Array]:
        """The velocity with residual + weight · (residual − residual_prev) in place of the blocks.

        Raises EngineError as a step does.
        """
        forecast = np.full(len(to_host(inputs["x"])), weight, np.float32)
        older = {"residual": residual, "residual_prev": residual_prev, "forecast": forecast}
        outputs = self._run(self.cache["reuse"], {**without_text(inputs), **older})
        _check_finite(outputs, "the graph `reuse`")
        return outputs

    def time_embeddings(self, times: Float64, rows: int) -> HostArray:
        """The embedding of each time (len(times), D), so many rows a call."""
        padded = np.pad(times.astype(np.float32), (0, -len(times) % rows), mode="edge").reshape(-1, rows)
        found = [to_host(self._run(self.cache["time"], {"t": part})["embedding"]) for part in padded]
        return np.concatenate(found)[: len(times)]

    def decode(self, z: Float32) -> Float32:
        """The pixels that the decoder makes of its input; raises EngineError as a step does."""
        assert self.decoder
        outputs = self._run(self.decoder, {"z": z})
        _check_finite(outputs, f"the graph `{DECODE}`", "pixels")
        return to_host(outputs["pixels"])

    def _run(self, engine: Engine, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        with self._lock:
            if self._closed:
                raise EngineError("this engine bank is closed; load the pipeline again")
            return engine(inputs)

    def close(self) -> None:
        """Close every engine once, after a call in progress."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            engines = [*(slot.engine for slot in self.slots), *self.cache.values()]
            engines += [self.decoder] if self.decoder else []
            with ExitStack() as stack:  # all of them, whatever fails
                for engine in {id(engine): engine for engine in engines}.values():
                    stack.callback(engine.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def sizes_of(inputs: Mapping[str, Array]) -> tuple[int, int]:
    """Rows, and tokens of text."""
    return len(to_host(inputs["x"])), to_host(inputs[TEXT]).shape[1] if TEXT in inputs else 0


def without_text(inputs: Mapping[str, Array]) -> dict[str, Array]:
    """For graphs that run no block, which is where text goes."""
    return {name: array for name, array in inputs.items() if name not in (TEXT, TEXT_MASK)}


def _check_finite(outputs: Mapping[str, Array], who: str, what: str = "velocity") -> None:
    if not np.isfinite(to_host(outputs[what])).all():
        told = {"velocity": "a velocity that is", "pixels": "pixels that are"}[what]
        raise EngineError(f"{who} gave {told} not finite")

"""The engine bank: one call, any covered budget.

Takes: opened engines with their profiles.  Gives: outputs.  May touch: nothing.
Knows nothing of: files, schedules, guidance.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Self

import numpy as np

from elit_export.errors import EngineError, InputError
from elit_export.runtime.engine import Array, Engine, HostArray, to_host
from elit_export.spec import LATENTS, Budget, Precision, Profile, listed


@dataclass(frozen=True)
class Slot:
    """A profile and the engine that serves it; several slots may share one engine."""

    profile: Profile
    engine: Engine


class EngineBank:
    """Engines of one model and precision, chosen by budget. Owns them: close it, or use it in `with`.

    One call at a time: a lock makes a bank safe to share between threads and pipelines.
    """

    def __init__(self, slots: Sequence[Slot], budgets: Sequence[Budget], precision: Precision) -> None:
        self.slots = tuple(slots)
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

    def slot_for(self, budget: Budget, rows: int) -> Slot:
        """The slot whose range holds K and whose opt is nearest; raises InputError if none does."""
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
        return min(fitting, key=lambda slot: abs(slot.profile.latents.opt - budget.kept))

    def _serving(self, budget: Budget) -> list[Slot]:
        if budget not in self._known:
            raise InputError(f"this model cannot run budget {budget}; it runs {listed(self._budgets)}")
        return [slot for slot in self.slots if budget.kept in slot.profile.latents]

    def __call__(self, budget: Budget, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """Run one step at `budget`; `inputs` are the step's without `latents`.

        Raises EngineError if the velocity is not finite, naming profile and precision.
        """
        slot = self.slot_for(budget, _rows(inputs))
        with self._lock:
            if self._closed:
                raise EngineError("this engine bank is closed; load the pipeline again")
            outputs = slot.engine({**inputs, LATENTS: np.arange(budget.kept, dtype=np.int64)})
        _check_finite(to_host(outputs["velocity"]), slot.profile, self.precision, budget)
        return outputs

    def close(self) -> None:
        """Close every engine once, after a call in progress."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            with ExitStack() as stack:  # all of them, whatever fails
                for engine in {id(slot.engine): slot.engine for slot in self.slots}.values():
                    stack.callback(engine.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _rows(inputs: Mapping[str, Array]) -> int:
    return len(to_host(inputs["x"]))


def _check_finite(velocity: HostArray, profile: Profile, precision: Precision, budget: Budget) -> None:
    if not np.isfinite(velocity).all():
        raise EngineError(
            f"profile {profile.name} ({precision.value}) at budget {budget} gave a velocity that is not finite"
        )

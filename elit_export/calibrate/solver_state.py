"""The state of an interrupted calibration of solvers, beside the manifest: what each table reached."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from elit_export.bundle.atomic import write_text
from elit_export.bundle.readers import read_json_object
from elit_export.calibrate.flow import Method
from elit_export.calibrate.gauss_newton import Iterate
from elit_export.calibrate.solver import Progress, TableFit
from elit_export.errors import CalibrationError, ElitExportError
from elit_export.spec import Budget, SolverTable

NAME = ".solver-calibration.json"
Pair = tuple[Budget, Budget]  # of a strong and a weak branch


class State:
    """What was reached, by the key of a fit. Every change is written at once."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        """Read what an earlier run left; raises CalibrationError if it is damaged or was another calibration."""
        self.path = folder / NAME
        self._identity = json.loads(json.dumps(identity))
        self._reached: dict[str, dict[str, Any]] = {}
        self._cost: dict[str, float] = {}
        if not self.path.exists():
            return
        with self._reading():
            stored = read_json_object(self.path)
            identity, self._reached, self._cost = (dict(stored[name]) for name in ("identity", "reached", "cost"))
        if identity != self._identity:
            other = ", ".join(key for key in self._identity if identity.get(key) != self._identity[key])
            raise CalibrationError(
                f"{self.path} is of a calibration that was interrupted, with another {other}",
                "give its options to go on, or --restart to begin again",
            )

    def progress(self, fit: TableFit) -> Progress | None:
        """Return how far a table was; None if it was not begun."""
        stored = self._reached.get(fit.key)
        if stored is None:
            return None
        with self._reading():
            now, best = (Method.of(_table(stored[name])) for name in ("now", "best"))
            if {now.calls, best.calls} != {fit.calls}:
                raise ValueError(f"a table of {fit.calls} calls has {now.calls} and {best.calls}")
            damping, best_db = float(stored["damping"]), float(stored["best_db"])
            iterations, ended = int(stored["iterations"]), bool(stored["ended"])
        return Progress(Iterate(now, damping), best, best_db, iterations, ended)

    def note(self, fit: TableFit, progress: Progress) -> None:
        self._reached[fit.key] = {
            "now": asdict(progress.now.method.table()),
            "best": asdict(progress.best.table()),
            "damping": progress.now.damping,
            "best_db": progress.best_db,
            "iterations": progress.iterations,
            "ended": progress.ended,
        }
        self._write()

    def cost(self, measure: Callable[[], Mapping[Pair, float]], pairs: Iterable[Pair]) -> dict[Pair, float]:
        """Return the time of a call at each pair of budgets; it is measured once, so that patterns stay the same."""
        if not self._cost:
            self._cost = {_pair_key(pair): ms for pair, ms in measure().items()}
            self._write()
        with self._reading():
            return {pair: float(self._cost[_pair_key(pair)]) for pair in pairs}

    def _write(self) -> None:
        held = {"identity": self._identity, "reached": self._reached, "cost": self._cost}
        write_text(self.path, json.dumps(held))

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (ElitExportError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise CalibrationError(f"{self.path}: damaged: {error}", "delete it to begin again") from error


def _pair_key(pair: Pair) -> str:
    return " ".join(str(budget.kept) for budget in pair)


def discard(folder: Path) -> None:
    """Forget an interrupted calibration."""
    (folder / NAME).unlink(missing_ok=True)


def _table(stored: Mapping[str, Any]) -> SolverTable:
    return SolverTable(tuple(stored["times"]), tuple(tuple(row) for row in stored["weights"]))

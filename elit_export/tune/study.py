"""The file of a search: what it is of, the trials of Optuna, and results. A search that was killed goes on from it.

It has one line for each thing, a checksum before it, and is only ever appended to:

    CRC {"of": {...}}              the checkpoint, plan sets and options that the rest belongs to
    CRC {"optuna": {...}}          an operation of Optuna's journal
    CRC {"kept": [name, value]}    a result
"""

from __future__ import annotations

import json
import shlex
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend
from optuna.study import Study as Trials
from optuna.trial import FrozenTrial, Trial, TrialState

from elit_export.bundle.atomic import append_text, write_text
from elit_export.bundle.readers import parsed_json, read_text
from elit_export.errors import CalibrationError

STUDY_BYTES = 64 << 20
OF, LOG, KEPT = "of", "optuna", "kept"
SEEDS = 1 << 32  # of the random numbers of Optuna
STARTUP_TRIALS = 12  # drawn at random, before the search learns from what it has seen
WHAT = "a study of `tune`"
REFUSED, MADE = "refused", "made"  # attributes of trials


class Outcome(NamedTuple):
    """Holds the two values of a trial, less is better, and by how much it misses a limit: more than zero if it does.

    `made` is what `search` returns of it.
    """

    cost: float
    loss: float
    excess: float
    made: str


Objective = Callable[[Trial], Outcome | None]


class JournalFile(BaseJournalBackend):
    """Lines in a file that one process writes; raises CalibrationError where another one does too."""

    def __init__(self, path: Path, of: Mapping[str, Any]) -> None:
        self._path = path
        entries, text = _entries(path)
        if entries:
            self._check(entries[0], json.loads(json.dumps(of)))
        if not text.endswith("\n"):
            write_text(path, text[: text.rfind("\n") + 1] or _line({OF: dict(of)}))
        self._logs = [entry[LOG] for entry in entries[1:] if LOG in entry]
        self.kept: dict[str, Any] = dict(entry[KEPT] for entry in entries[1:] if KEPT in entry)
        self._size = path.stat().st_size

    def _check(self, first: Mapping[str, Any], of: Mapping[str, Any]) -> None:
        theirs = first.get(OF)
        if not isinstance(theirs, dict):
            raise _damaged(self._path, 1)
        for name, value in of.items():
            if theirs.get(name) != value:
                raise CalibrationError(
                    f"the study {self._path} is of another search: {name} was {theirs.get(name)!r}, now it is "
                    f"{value!r}",
                    f"give another file with --study, or remove this one: rm {shlex.quote(str(self._path))}",
                )

    def read_logs(self, log_number_from: int) -> list[dict[str, Any]]:
        return self._logs[log_number_from:]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        self._append({LOG: log} for log in logs)
        self._logs += json.loads(json.dumps(logs))

    def keep(self, name: str, value: Any) -> None:
        self._append([{KEPT: [name, value]}])
        self.kept[name] = value

    def _append(self, entries: Iterable[Mapping[str, Any]]) -> None:
        if self._path.stat().st_size != self._size:
            raise CalibrationError(
                f"another process writes into the study {self._path}", "wait for it, or give another file with --study"
            )
        append_text(self._path, "".join(map(_line, entries)))
        self._size = self._path.stat().st_size


def _line(entry: Mapping[str, Any]) -> str:
    text = json.dumps(entry, separators=(",", ":"), allow_nan=False)
    return f"{zlib.crc32(text.encode()):08x} {text}\n"


def _entries(path: Path) -> tuple[list[dict[str, Any]], str]:
    """Read the complete lines, and the text with what a killed process left of a line at its end; nothing is written.

    Raises CalibrationError for a file that does not begin with a complete line of a study. A file that is missing or
    empty has no lines.
    """
    try:
        text = read_text(path, what=WHAT, error=CalibrationError, limit_bytes=STUDY_BYTES)
    except FileNotFoundError:
        return [], ""
    *lines, _unfinished = text.split("\n")
    if text and not lines:
        raise _damaged(path, 1)
    return [_parsed(path, number, line) for number, line in enumerate(lines, 1)], text


def _parsed(path: Path, number: int, line: str) -> dict[str, Any]:
    checksum, _, text = line.partition(" ")
    try:
        is_whole = checksum == f"{zlib.crc32(text.encode()):08x}"
        entry = parsed_json(text) if is_whole else None
    except ValueError as error:
        raise _damaged(path, number) from error
    if not isinstance(entry, dict):
        raise _damaged(path, number)
    return entry


def _damaged(path: Path, line: int) -> CalibrationError:
    return CalibrationError(
        f"the study {path} is damaged in line {line}, or not a study",
        f"search again: rm {shlex.quote(str(path))}; or give another file with --study",
    )


# ---------------------------------------------------------------- trials


class Study:
    """Runs a search of two objectives whose trials and results are in a file. `of` says what they belong to."""

    def __init__(self, path: Path, of: Mapping[str, Any], *, seed: int) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._seed = seed
        self._file = JournalFile(path, of)
        self._storage = JournalStorage(self._file)

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """Return the result of this name: of an earlier run, or what `make` gives now, a value that JSON holds."""
        if name not in self._file.kept:
            self._file.keep(name, make())
        return self._file.kept[name]

    def search(
        self,
        name: str,
        objective: Objective,
        *,
        trials: int,
        first: Sequence[Mapping[str, Any]],
        on_trial: Callable[[int], None],
    ) -> list[str]:
        """Make so many trials, those of earlier runs included: the choices in `first`, then what Optuna proposes.

        An objective that returns None refuses the choice. A trial that was interrupted is made again. Returns what
        was made within the limit, each once.
        """
        study = self._opened(name)
        for choices in first:
            study.enqueue_trial(dict(choices), skip_if_exists=True)
        while (done := len(_finished(study))) < trials:
            on_trial(done)
            self._make(study, objective)
        within = [trial for trial in _measured(study) if _excess(trial) <= 0]
        return list(dict.fromkeys(trial.user_attrs[MADE] for trial in within))

    def nearest(self, name: str) -> str | None:
        """Return what the trial made that misses its limit by least; None where every trial was refused."""
        nearest = min(_measured(self._opened(name)), key=_excess, default=None)
        return None if nearest is None else str(nearest.user_attrs[MADE])

    def _opened(self, name: str) -> Trials:
        study = optuna.create_study(
            storage=self._storage, study_name=name, directions=["minimize", "minimize"], load_if_exists=True
        )
        for trial in study.get_trials(states=(TrialState.RUNNING,)):
            study.tell(trial.number, state=TrialState.FAIL)
            study.enqueue_trial(trial.params)
        study.sampler = self._sampler(len(study.trials))  # not the random numbers that were drawn before
        return study

    def _sampler(self, earlier: int) -> optuna.samplers.BaseSampler:
        seed = (self._seed + earlier) % SEEDS
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP_TRIALS, multivariate=False)

    def _make(self, study: Trials, objective: Objective) -> None:
        trial = study.ask()
        outcome = objective(trial)
        if outcome is None:
            trial.set_user_attr(REFUSED, "no profile takes it")
            study.tell(trial, state=TrialState.FAIL)
            return
        trial.set_constraint("limit", outcome.excess)
        trial.set_user_attr(MADE, outcome.made)
        study.tell(trial, (outcome.cost, outcome.loss))


def _finished(study: Trials) -> list[FrozenTrial]:
    """List the trials that count: those with values and those that were refused, not those that were interrupted."""
    trials = study.get_trials(deepcopy=False)
    return [trial for trial in trials if trial.state is TrialState.COMPLETE or REFUSED in trial.user_attrs]


def _measured(study: Trials) -> list[FrozenTrial]:
    return [trial for trial in _finished(study) if MADE in trial.user_attrs]


def _excess(trial: FrozenTrial) -> float:
    """Return by how much a trial misses its limit; zero or less if it does not."""
    return max(trial.constraints.values(), default=0.0)

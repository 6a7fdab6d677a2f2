"""The file of a search: appended to, checked, gone on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from elit_export.errors import CalibrationError
from elit_export.tune.study import Outcome, Study

OF = {"checkpoint": "abc", "target": "at most 40 ms"}


def objective(trial: Any) -> Outcome | None:
    x = trial.suggest_int("x", 0, 20)
    if x == 3:
        return None
    return Outcome(float(x), float(20 - x), x - 15.0, f"x={x}")


def searched(path: Path, trials: int, first: tuple[int, ...] = (), make: Any = objective) -> list[str]:
    return Study(path, OF, seed=0).search(
        "s", make, trials=trials, first=[{"x": x} for x in first], on_trial=lambda done: None
    )


def finished(path: Path) -> int:
    """How many trials a study holds: those that were made, and those that were refused."""
    return sum('"made"' in line or '"refused"' in line for line in path.read_text().splitlines())


def test_a_search_goes_on_from_its_file_and_only_appends(tmp_path: Path) -> None:
    path = tmp_path / "s.tune"
    made = searched(path, 4, (3, 18, 5, 6))
    assert made == ["x=5", "x=6"]  # one was refused, one is above the limit
    before = path.read_bytes()
    assert searched(path, 4, (3, 18, 5, 6)) == made
    assert path.read_bytes().startswith(before)
    more = searched(path, 9, (3, 18, 5, 6))
    assert more[:2] == made
    assert finished(path) == 9


def test_a_trial_that_was_interrupted_is_made_again(tmp_path: Path) -> None:
    def stops(trial: Any) -> Outcome | None:
        outcome = objective(trial)
        if outcome and outcome.cost == 7:
            raise KeyboardInterrupt
        return outcome

    path = tmp_path / "s.tune"
    with pytest.raises(KeyboardInterrupt):
        searched(path, 3, (5, 7, 6), stops)
    assert finished(path) == 1
    assert set(searched(path, 3, (5, 7, 6))) == {"x=5", "x=7", "x=6"}


def test_results_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "s.tune"
    assert Study(path, OF, seed=0).kept("a", lambda: [1.5, 2.0]) == [1.5, 2.0]
    assert Study(path, OF, seed=0).kept("a", lambda: pytest.fail("made again")) == [1.5, 2.0]


def test_half_a_line_at_the_end_is_dropped(tmp_path: Path) -> None:
    """A process that was killed while it wrote leaves one."""
    path = tmp_path / "s.tune"
    searched(path, 3)
    whole = path.read_bytes()
    path.write_bytes(whole + b'00000000 {"optu')
    Study(path, OF, seed=0)
    assert path.read_bytes() == whole
    path.write_bytes(whole + b'00000000 {"optu')
    with pytest.raises(CalibrationError, match="of another search"):
        Study(path, OF | {"checkpoint": "def"}, seed=0)
    assert path.read_bytes() != whole  # it is not theirs to mend


@pytest.mark.parametrize("change", [(b"abc", b"abd"), (b'"x"', b'"y"'), (b"\n", b"\n\n")])
def test_a_damaged_study_is_refused(tmp_path: Path, change: tuple[bytes, bytes]) -> None:
    path = tmp_path / "s.tune"
    searched(path, 2)
    path.write_bytes(path.read_bytes().replace(*change, 1))
    with pytest.raises(CalibrationError, match=r"is damaged in line \d+, or not a study; search again: rm .*--study"):
        Study(path, OF, seed=0)


@pytest.mark.parametrize("text", ["mine\n", "mine", '{"mine": 1}', "mine\nand", "\n"])
def test_what_is_no_study_is_refused_and_stays(tmp_path: Path, text: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(text)
    with pytest.raises(CalibrationError, match="in line 1, or not a study"):
        Study(path, OF, seed=0)
    assert path.read_text() == text


def test_a_study_of_another_search_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.tune"
    searched(path, 1)
    with pytest.raises(
        CalibrationError, match=r"of another search: checkpoint was 'abc', now it is 'def'; give another"
    ):
        Study(path, OF | {"checkpoint": "def"}, seed=0)


def test_two_processes_do_not_write_into_one_study(tmp_path: Path) -> None:
    path = tmp_path / "s.tune"
    one, other = Study(path, OF, seed=0), Study(path, OF, seed=0)
    one.kept("a", lambda: 1)
    with pytest.raises(CalibrationError, match=r"another process writes into .*; wait for it, or give another file"):
        other.kept("b", lambda: 2)


@pytest.mark.parametrize("seed", [0, (1 << 32) - 1, 1 << 32, (1 << 64) - 2])
def test_every_seed_is_one_of_the_search(tmp_path: Path, seed: int) -> None:
    found = Study(tmp_path / "s.tune", OF, seed=seed).search(
        "s", objective, trials=2, first=[], on_trial=lambda done: None
    )
    assert len(found) <= 2


def test_the_trial_that_is_nearest_to_a_limit_is_known(tmp_path: Path) -> None:
    path = tmp_path / "s.tune"
    assert searched(path, 3, (20, 17, 3)) == []
    study = Study(path, OF, seed=0)
    assert study.nearest("s") == "x=17"
    assert study.nearest("another") is None

"""Run a list of work, and say before each part what comes and how many there are."""

from __future__ import annotations

from collections.abc import Callable, Iterable

OnStage = Callable[[str, int], None]  # hears the name of a stage before it runs, and how many there are in all
Stage = tuple[str, Callable[[], None]]


def run_stages(stages: Iterable[Stage], on_stage: OnStage) -> None:
    wanted = list(stages)
    for name, run in wanted:
        on_stage(name, len(wanted))
        run()

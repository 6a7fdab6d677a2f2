"""Runs the stages of a measurement, and announces each one before it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable

OnStage = Callable[[str, int], None]  # called before a stage with its name and the number of all stages
Stage = tuple[str, Callable[[], None]]


def run_stages(stages: Iterable[Stage], on_stage: OnStage) -> None:
    """Run the stages in order; `on_stage` is called before each."""
    work = list(stages)
    for name, run in work:
        on_stage(name, len(work))
        run()

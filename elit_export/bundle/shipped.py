"""Solver tables that come with the shipped model: numbers, put into every bundle that is built of it."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from pydantic import TypeAdapter

from elit_export.bundle.readers import read_json_object
from elit_export.spec import SolverFacts

SOLVERS = "fashion_solvers.json"  # the manifest's `solvers`, as `elit-export calibrate solver` made them


def shipped_solvers(checkpoint_sha256: str) -> tuple[SolverFacts, ...]:
    """Return the tables of a checkpoint; none if it is not the shipped one."""
    stored = read_json_object(Path(str(files("elit_export"))) / "assets" / SOLVERS)
    solvers = TypeAdapter(tuple[SolverFacts, ...]).validate_python(stored["solvers"])
    return tuple(facts for facts in solvers if facts.checkpoint_sha256 == checkpoint_sha256)

"""Engines that tell what they were given, so that whatever reaches a sample from another one shows.

A residual carries t, label and kept latents of the step that made it, a signal t and label. The velocity is a
line in t for each label and for the weak branch, made of what the residual says. The distance of a row with
label y is (1 + y) times what t changed, so that in a batch one row moves faster than another.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from elit_export.arrays import HostArray
from elit_export.backends.protocols import Array, Engine, HostOutput, to_host
from elit_export.runtime.bank import EngineBank, Slot
from elit_export.runtime.pipeline import Pipeline
from elit_export.spec import PIXELS, Fit, ModelSpec, Precision, Profile, Range
from tests.helpers import tiny_spec

SPEC: ModelSpec = tiny_spec()
WEAK = 1  # latents of the weak branch, which no schedule here gives to the strong one
IDENTITY = Fit((0.0, 1.0), low=0.0, high=10.0)  # what adds up is the distance itself
Arrays = Mapping[str, HostArray]
SAMPLERS = ("euler", "heun", "euler-maruyama", "ab2", "ab3", "abm3", "unipc")
GUIDED: tuple[dict[str, Any], ...] = (
    {"guidance": "none"},
    {"guidance": "cfg:2"},
    {"guidance": "ccfg:2@1"},
    {"guidance": "autoguidance:2@1"},
    {"guidance": "ccfg:2@1", "guidance_interval": (0.3, 0.7)},
)
Case = tuple[str, dict[str, Any], str]  # sampler, guidance, cache


def all_pairs(caches: tuple[str, ...]) -> list[Case]:
    """Every sampler with every guidance; over these, every cache meets every sampler and every guidance."""
    return [
        (sampler, guided, caches[(row + column) % len(caches)])
        for row, sampler in enumerate(SAMPLERS)
        for column, guided in enumerate(GUIDED)
    ]


# ---------------------------------------------------------------- what the engines answer


def carrier(*facts: HostArray) -> HostArray:
    """(B, N, D) with a fact in each of the first channels of the first token."""
    tokens = np.zeros((len(facts[0]), SPEC.tokens, SPEC.hidden_size), np.float32)
    for channel, fact in enumerate(facts):
        tokens[:, 0, channel] = fact
    return tokens


def facts_of(tokens: HostArray) -> tuple[HostArray, HostArray, HostArray]:
    """t, label and kept latents, a value for each row."""
    return tokens[:, 0, 0], tokens[:, 0, 1], tokens[:, 0, 2]


def velocity_of(x: HostArray, tokens: HostArray) -> HostArray:
    t, label, kept = facts_of(tokens)
    line = 3 * t + 100 * label + 1000 * (kept == WEAK)
    return (line[:, None, None, None] - x / 2).astype(np.float32)


def step(inputs: Arrays) -> dict[str, HostArray]:
    kept = np.full(len(inputs["x"]), len(inputs["latents"]))
    residual = carrier(inputs["t"], inputs["y"], kept)
    return {"velocity": velocity_of(inputs["x"], residual), "residual": residual}


def reuse(inputs: Arrays) -> dict[str, HostArray]:
    latest, before, weight = inputs["residual"], inputs["residual_prev"], inputs["forecast"][:, None, None]
    for residual in (latest, before):
        assert np.array_equal(facts_of(residual)[1], inputs["y"]), "a residual of another sample"
    forecast = latest + weight * (latest - before)
    forecast[:, :, 2] = latest[:, :, 2]  # which branch it is does not go on with t
    return {"velocity": velocity_of(inputs["x"], forecast)}


def probe(inputs: Arrays) -> dict[str, HostArray]:
    signal = carrier(inputs["t"], inputs["y"] + 1)
    before = inputs["signal_prev"]
    if not before.any():
        return {"signal": signal, "distance": np.full(len(signal), np.inf, np.float32)}
    assert np.array_equal(before[:, 0, 1], inputs["y"] + 1), "a signal of another sample"
    distance = np.abs(before[:, 0, 0] - inputs["t"]) * (1 + inputs["y"])
    return {"signal": signal, "distance": distance.astype(np.float32)}


def time(inputs: Arrays) -> dict[str, HostArray]:
    """An embedding whose mean is 1 + t."""
    return {"embedding": np.repeat(1 + inputs["t"][:, None], SPEC.hidden_size, axis=1)}


FUNCTIONS: dict[str, Callable[[Arrays], Mapping[str, HostArray]]] = {
    "step": step,
    "probe": probe,
    "reuse": reuse,
    "time": time,
}


# ---------------------------------------------------------------- what is written down


@dataclass(frozen=True)
class Asked:
    """One call of an engine: which graph, by which thread, with what, and the arrays that it gave out."""

    graph: str
    thread: int
    inputs: Arrays
    outputs: tuple[HostArray, ...]

    @property
    def t(self) -> float:
        return float(self.inputs["t"][0])

    def poison(self) -> None:
        """What it gave out becomes NaN, in the very memory that its caller got."""
        for array in self.outputs:
            array[...] = np.nan


class CarryingEngine(Engine):
    """Writes every call into a ledger that the engines of a bank share."""

    def __init__(self, graph: str, function: Callable[[Arrays], Mapping[str, HostArray]], ledger: list[Asked]) -> None:
        self._graph, self._function, self._ledger = graph, function, ledger
        self._on_host = SPEC.graph(graph).on_host

    def __call__(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        given = {name: to_host(array).copy() for name, array in inputs.items()}
        outputs = {name: np.array(array) for name, array in self._function(given).items()}
        self._ledger.append(Asked(self._graph, threading.get_ident(), given, tuple(outputs.values())))
        return {name: array if name in self._on_host else HostOutput(array) for name, array in outputs.items()}

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class Carrying:
    """A pipeline over such engines, and its ledger."""

    pipeline: Pipeline
    ledger: list[Asked]

    def asked(self, *graphs: str) -> list[Asked]:
        return [asked for asked in self.ledger if asked.graph in graphs]


def carrying(fit: Fit = IDENTITY, **functions: Callable[[Arrays], Mapping[str, HostArray]]) -> Carrying:
    """`functions` take the place of those above, by graph."""
    ledger: list[Asked] = []
    engines = {graph: CarryingEngine(graph, made, ledger) for graph, made in (FUNCTIONS | functions).items()}
    every = Profile("every", Range(1, SPEC.latents, SPEC.latents), Range(1, 1, 64))
    slots = [Slot(every, engines.pop("step"))]
    bank = EngineBank(slots, SPEC.budgets, Precision.FP32, engines)
    return Carrying(Pipeline(bank, SPEC, PIXELS, fits=dict.fromkeys(SPEC.budgets, fit)), ledger)

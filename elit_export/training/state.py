"""The state of a training run on disk: read, and checked whole before anything of it is used."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from elit_export.bundle.readers import check_saved_by_torch
from elit_export.checkpoints.weights import Weights, check_tensors
from elit_export.errors import CheckpointError, InputError, summary
from elit_export.spec import ModelSpec
from elit_export.spec.limits import TRAINING_STEPS

STATE_FORMAT = "elit_export training state/1"
MOMENTS = ("exp_avg", "exp_avg_sq")  # what Adam keeps of each parameter, beside the step
LENGTH = {"steps"}  # of what a state says of its run: not part of its identity
REMEDY = "delete it to begin again, or copy it again from where it was saved"
# What a state of an older version means by not saying it.
UNSAID = {field.name: field.default for field in fields(ModelSpec) if field.default is not MISSING}


@dataclass(frozen=True)
class TrainingState:
    """A checked state. `moments` has for each parameter, by its number, what the optimizer keeps of it."""

    step: int
    planned_steps: int  # of the run that saved it
    model: Weights
    ema: Weights
    learning_rate: float
    moments: dict[int, dict[str, Tensor]]


def read_state(path: Path, run: Mapping[str, Any], model: nn.Module, steps: int) -> TrainingState:
    """Raises CheckpointError if the file is damaged, of another run than `run`, or does not fit the run's model.

    How many steps the run has is not part of what it is; InputError if the state is past the last of `steps`.
    """
    state = _read(path)
    _check_run(path, state["run"], run)
    step, planned = state["step"], state["run"].get("steps")
    for name, number in (("step", step), ("number of steps", planned)):
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= TRAINING_STEPS.maximum:
            raise _damaged(
                path, f"its {name} is {number!r}, must be a whole number from 0 to {TRAINING_STEPS.maximum:g}"
            )
    if step > steps:
        raise InputError(
            f"{path}: already at step {step}, past the last of steps={steps}",
            f"give steps={step} or more, or train into another folder",
        )
    weights, ema = (_weights(path, part, state[part], model.state_dict()) for part in ("model", "ema"))
    rate, moments = _optimizer(path, state["optimizer"], dict(model.named_parameters()), step)
    return TrainingState(step, planned, weights, ema, rate, moments)


def _damaged(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(f"{path}: damaged: {problem}", REMEDY)


def _read(path: Path) -> dict[str, Any]:
    try:
        check_saved_by_torch(path, error=CheckpointError)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file can make the reader fail in any way
        raise CheckpointError(f"{path}: not a whole training state: {summary(error)}", REMEDY) from error
    if not isinstance(state, dict) or state.get("format") != STATE_FORMAT:
        raise CheckpointError(f"{path}: not a training state of this version", REMEDY)
    if missing := [part for part in ("run", "step", "model", "ema", "optimizer") if part not in state]:
        raise _damaged(path, f"it has no {', '.join(missing)}")
    return state


def _check_run(path: Path, stored: object, mine: Mapping[str, Any]) -> None:
    if not isinstance(stored, dict):
        raise _damaged(path, "it does not say of which run it is")
    theirs = UNSAID | stored
    other = [
        f"{name} (was {theirs.get(name)}, now {value})"
        for name, value in mine.items()
        if name not in LENGTH and _differ(value, theirs, name)
    ]
    if other:
        raise CheckpointError(f"{path}: belongs to another run: {', '.join(other)}", "train into another folder")


def _differ(value: object, theirs: Mapping[str, Any], name: str) -> bool:
    """A tensor in the place of a number is another value, whatever comparing with it would give."""
    previous = theirs.get(name)
    return isinstance(previous, Tensor) or previous != value


def _weights(path: Path, part: str, tensors: object, expected: Mapping[str, Tensor]) -> Weights:
    if not isinstance(tensors, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in tensors.items()
    ):
        raise _damaged(path, f"its {part} is not a table of tensors by name")
    weights = dict(tensors)
    check_tensors(path, weights, {name: tuple(value.shape) for name, value in expected.items()}, REMEDY)
    return weights


def _optimizer(
    path: Path, state: object, parameters: Mapping[str, Tensor], step: int
) -> tuple[float, dict[int, dict[str, Tensor]]]:
    """The learning rate of the last step, and the moments of every parameter, none before the first step."""
    groups, moments = (state.get("param_groups"), state.get("state")) if isinstance(state, dict) else (None, None)
    if not isinstance(groups, list) or len(groups) != 1 or not isinstance(groups[0], dict):
        raise _damaged(path, "its optimizer has no group of parameters, or several")
    rate = groups[0].get("lr")
    if not isinstance(rate, float) or not math.isfinite(rate):
        raise _damaged(path, f"the learning rate of its optimizer is {rate!r}")
    numbers = set(range(len(parameters))) if step else set()
    if not isinstance(moments, dict) or set(moments) != numbers:
        raise _damaged(path, f"its optimizer does not hold the {len(numbers)} parameters that it should")
    named = enumerate(parameters.items())
    return rate, {number: _moments(path, moments[number], name, value, step) for number, (name, value) in named if step}


def _moments(path: Path, tensors: object, name: str, parameter: Tensor, step: int) -> dict[str, Tensor]:
    if not isinstance(tensors, dict) or not all(isinstance(tensors.get(key), Tensor) for key in ("step", *MOMENTS)):
        raise _damaged(path, f"its optimizer has no step and moments of {name}")
    kept = {key: tensors[key] for key in ("step", *MOMENTS)}
    check_tensors(path, kept, {"step": (), **dict.fromkeys(MOMENTS, tuple(parameter.shape))}, REMEDY)
    if kept["step"].item() != step:
        raise _damaged(path, f"its optimizer is at step {kept['step'].item():g} of {name}, the run at step {step}")
    return kept

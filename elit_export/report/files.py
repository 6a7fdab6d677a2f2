"""What a file or folder is that is neither a bundle nor a checkpoint: a recipe, arrays, a graph, a training folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from elit_export.bundle.calibration_inputs import FACTS
from elit_export.bundle.readers import (
    TEXT_BYTES,
    PlainArraysError,
    array_headers,
    check_regular,
    parsed_json,
    plain_arrays,
    read_text,
    read_toml,
)
from elit_export.bundle.recipe import load_recipe
from elit_export.calibrate.inputs import load_sample_recipe
from elit_export.errors import InputError, summary

Facts = dict[str, Any]
ARCHIVE = "an archive of arrays"
LOG_BYTES = 64 << 20  # a line of some hundred bytes for each time that a training is saved
LOG, ERRORS = "train.jsonl", "held_out.json"
TRAINING = (LOG, "state.pt")
PROGRESS = ("step", "mean_loss", "learning_rate")
# What a .npz is that has all of these entries, asked in this order.
ARRAYS: Sequence[tuple[set[str], str]] = (
    ({"x", "t", "kept", "facts"}, "calibration inputs"),
    ({"text", "mask"}, "embedded prompts"),
    ({"latents"}, "samples"),
    ({"images"}, "samples"),  # of a model of pixels
)


def file_facts(path: Path) -> Facts | None:
    """Return what a file or folder is, None for none of these; raises the package's errors if it is damaged.

    What a file says of itself, in words of its own, stands under the key `about`: it can fake no other fact.
    """
    if path.is_dir():
        return training_facts(path) if any((path / name).is_file() for name in TRAINING) else None
    facts = READERS.get(path.suffix)
    return {**facts(path), "size_bytes": path.stat().st_size} if facts and path.is_file() else None


def recipe_facts(path: Path) -> Facts:
    """Return the facts of a recipe for `build` or for `calibrate samples`."""
    is_build = "targets" in read_toml(path, what="a recipe", error=InputError)
    if not is_build:
        return {"kind": "recipe of calibration inputs", "file": path.name, **load_sample_recipe(path).model_dump()}
    recipe = load_recipe(path)
    values = recipe.model_dump(mode="json", exclude={"targets", "profiles"})
    targets = [
        {"target": name, "backend": target.backend, "device": target.device, "precision": target.precision.value}
        for name, target in recipe.targets.items()
    ]
    profiles = [{"profile": table.name, "latents": str(table.latents)} for table in recipe.profiles]
    return {"kind": "recipe", "file": path.name, **_flat(values), "targets": targets, "profiles": profiles}


def _flat(values: Facts, before: str = "") -> Facts:
    """Flatten tables within tables to their names in TOML: `decoder.folder`."""
    flat: Facts = {}
    for name, value in values.items():
        flat |= _flat(value, f"{before}{name}.") if isinstance(value, dict) else {f"{before}{name}": value}
    return flat


def arrays_facts(path: Path) -> Facts:
    """Return the facts of a .npz; only its headers are read, whatever its arrays would take in memory."""
    try:
        headers = array_headers(path, what=ARCHIVE, error=InputError)
        about = plain_arrays(path, {FACTS}, what=ARCHIVE, error=InputError, limit_bytes=TEXT_BYTES).get(FACTS)
    except PlainArraysError as error:
        raise InputError(str(error), "write it again") from error
    entries = [
        {"array": name, "type": dtype, "dims": " × ".join(map(str, shape)) or "one value"}
        for name, (dtype, shape) in headers.items()
    ]
    kind = next((kind for needed, kind in ARRAYS if needed <= set(headers)), "arrays")
    return {"kind": kind, "file": path.name, "about": _about(about), "arrays": entries}


def _about(text: Any) -> Facts:
    """What calibration inputs say of where they come from."""
    try:
        facts = {} if text is None else parsed_json(str(text))
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def onnx_facts(path: Path) -> Facts:
    from elit_export.graphs.reading import graph_facts  # needs onnx

    check_regular(path, what="a graph", error=InputError)
    return {"kind": "ONNX graph", "file": path.name, **graph_facts(path)}


def training_facts(folder: Path) -> Facts:
    """How far a training has come, by its log, and what it said of held-out images at its end."""
    last, errors = _last_line(folder / LOG), _rows(folder / ERRORS)
    return {
        "kind": "training folder",
        "file": folder.name,
        **{name: last.get(name) for name in PROGRESS},
        "files": ", ".join(sorted(_visible(folder.iterdir()))),
        "held_out": errors,
    }


def _last_line(log: Path) -> Facts:
    """The last whole line of a log, empty where there is none; a line that is still being written has no end."""
    whole, _, _ = _text(log).rpartition("\n")
    lines = whole.splitlines()
    last = _parsed(lines[-1], log) if lines else {}
    if not _is_row(last):
        raise _damaged(log, "its last line is not one table of numbers and texts")
    return dict(last)


def _rows(path: Path) -> list[Facts]:
    """The rows of a table in a file; none where there is no such file."""
    rows = _parsed(_text(path) or "[]", path)
    if not isinstance(rows, list) or not all(map(_is_row, rows)) or len({tuple(row) for row in rows}) > 1:
        raise _damaged(path, "it is not a list of rows with the same columns")
    return rows


def _is_row(value: Any) -> bool:
    """Is it a table in which each value is one number, one text or nothing?"""
    return isinstance(value, dict) and not any(isinstance(cell, list | dict) for cell in value.values())


def _parsed(text: str, path: Path) -> Any:
    try:
        return parsed_json(text)
    except ValueError as error:
        raise _damaged(path, summary(error)) from error


def _damaged(path: Path, problem: str) -> InputError:
    return InputError(f"{path}: damaged: {problem}", f"delete {path.name}; `train` writes it again")


def _text(path: Path) -> str:
    """Return the text of a file, empty where there is no such file."""
    return read_text(path, what="a log", error=InputError, limit_bytes=LOG_BYTES) if path.exists() else ""


def _visible(paths: Iterable[Path]) -> list[str]:
    return [path.name for path in paths if not path.name.startswith(".")]


READERS: dict[str, Callable[[Path], Facts]] = {".toml": recipe_facts, ".npz": arrays_facts, ".onnx": onnx_facts}

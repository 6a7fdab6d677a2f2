"""A value of any dataclass of results, made of its type hints: each number another one, each text a long one."""

from __future__ import annotations

import dataclasses
import itertools
import types
import typing
from collections.abc import Iterator
from typing import Any, TypeVar

Result = TypeVar("Result")
LONG_NAME = "ab3 14, quarter then full, weak at sixteenth"


def example_of(kind: type[Result], **changes: Any) -> Result:
    """One of a dataclass; `changes` are its own fields."""
    numbers = itertools.count(1)
    return typing.cast(Result, dataclasses.replace(_value(kind, numbers), **changes))  # type: ignore[type-var]


def _value(kind: Any, numbers: Iterator[int]) -> Any:
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return kind(**{field.name: _value(hints[field.name], numbers) for field in dataclasses.fields(kind)})  # type: ignore[operator]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _value(arguments[0], numbers)
    if origin in (list, tuple):
        return origin(_value(arguments[0], numbers) for _ in range(2))
    if origin is dict:
        return {_value(arguments[0], numbers): _value(arguments[1], numbers)}
    plain = {str: lambda: LONG_NAME, bool: bool, int: lambda: 7_654_321 + next(numbers)}
    return plain[kind]() if kind in plain else 4321.5 + next(numbers)

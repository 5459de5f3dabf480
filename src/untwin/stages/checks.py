"""Checks of parameters: what a user gives is taken as what it should be, or refused with its name."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Iterable, Sequence
from typing import Any

from untwin.errors import ParameterError


def whole(name: str, value: Any, least: int = 1) -> int:
    """A whole number, NumPy's too, as a Python int.

    Raises:
        ParameterError: It is something else, or less than `least`.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise ParameterError(f"{name} is {value!r}; give a whole number, at least {least}")
    return int(value)


def number(name: str, value: Any) -> float:
    """A finite number as a Python float; ParameterError if it is something else."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ParameterError(f"{name} is {value!r}; give a number")
    return float(value)


def text(name: str, value: Any) -> str:
    """A name, as of a column; ParameterError if it is something else, or empty."""
    if not isinstance(value, str) or not value:
        raise ParameterError(f"{name} is {value!r}; give a name")
    return value


def texts(name: str, values: Any) -> tuple[str, ...]:
    """A list of names; None is none. ParameterError if it is something else, such as a single name."""
    if isinstance(values, str | bytes) or not isinstance(values, Iterable | None):
        raise ParameterError(f"{name} is {values!r}; give a list of names")
    return tuple(text(name, value) for value in values or ())


def one_of(name: str, value: Any, known: Sequence[str]) -> str:
    """One of some words; ParameterError if it is none of them."""
    if value not in known:
        raise ParameterError(f"{name} is {value!r}; it must be {' or '.join(map(repr, known))}")
    return str(value)


def paths(name: str, value: Any) -> list[str]:
    """A path, or a list of paths, as a list; ParameterError if it is something else, or empty."""
    given = [value] if isinstance(value, str | os.PathLike) else value
    if not isinstance(given, Iterable) or isinstance(given, bytes):
        raise ParameterError(f"{name} is {value!r}; give a path, or a list of paths")
    found = list(given)
    if not found or not all(isinstance(path, str | os.PathLike) for path in found):
        raise ParameterError(f"{name} is {value!r}; give a path, or a list of paths")
    return [os.fspath(path) for path in found]


def path(name: str, value: Any) -> str:
    """A path; ParameterError if it is something else."""
    if not isinstance(value, str | os.PathLike):
        raise ParameterError(f"{name} is {value!r}; give a path")
    return os.fspath(value)

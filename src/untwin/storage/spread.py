"""Work on many files in parts: one after the other in this process, or over the workers of a cluster."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")

_PART = 1024
"""Files of a part: some seconds of work where each takes a request."""

_map: contextvars.ContextVar[Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]] = contextvars.ContextVar(
    "untwin-spread", default=map
)


@contextlib.contextmanager
def spreading(over: Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]) -> Iterator[None]:
    """Let `in_parts` use this `map`; the function, the items and the results travel between processes."""
    token = _map.set(over)
    try:
        yield
    finally:
        _map.reset(token)


def in_parts(function: Callable[[Sequence[T]], R], files: Sequence[T]) -> Iterator[R]:
    """What `function` gives for each part of `files`, in order. It can be pickled, and what it gives is small."""
    parts = (files[low : low + _PART] for low in range(0, len(files), _PART))
    return (map if len(files) <= _PART else _map.get())(function, parts)

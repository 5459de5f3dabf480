"""Room in memory for what a stage leaves to the next one in the same process, so that it need not go through files."""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Iterator
from typing import Any


class Space:
    """Objects that are held under the paths of the files that they stand for, up to a number of bytes.

    Args:
        limit: Most bytes that may be held.
    """

    def __init__(self, limit: int = 0) -> None:
        self._limit = limit
        self._held: dict[str, tuple[Any, int]] = {}
        self._lock = threading.Lock()

    @property
    def used(self) -> int:
        """Bytes that are held."""
        with self._lock:
            return sum(size for _, size in self._held.values())

    def put(self, path: str, value: Any, size: int, *, instead_of: str = "") -> bool:
        """Hold `value` under `path`, in the room of what `instead_of` names, too.

        Returns:
            False if there is no room: then nothing is held under either path.
        """
        with self._lock:
            for old in (path, instead_of):
                self._held.pop(old, None)
            if sum(other for _, other in self._held.values()) + size > self._limit:
                return False
            self._held[path] = value, size
            return True

    def get(self, path: str) -> Any:
        """What is held under a path; None if nothing is."""
        with self._lock:
            return self._held.get(path, (None, 0))[0]

    def drop(self, path: str) -> None:
        """Let go of what is held under a path and below it."""
        with self._lock:
            for name in [name for name in self._held if name == path or name.startswith(path + "/")]:
                del self._held[name]

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Make this the space of what runs inside, in this thread."""
        token = _space.set(self)
        try:
            yield
        finally:
            _space.reset(token)


_space: contextvars.ContextVar[Space] = contextvars.ContextVar("untwin-space", default=Space())  # noqa: B039


def space() -> Space:
    """The space of this thread; one without room where none is active."""
    return _space.get()

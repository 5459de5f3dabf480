"""Room in memory for what a stage leaves to the next one in the same process, so that it need not go through files."""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Space:
    """Objects that are held under the paths of the files that they stand for, up to a number of bytes.

    Args:
        limit: Most bytes that may be held.
    """

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit
        self.used = 0
        """Bytes that are held."""
        self._held: dict[str, tuple[Any, int, bool]] = {}
        self._lock = threading.Lock()

    def put(self, path: str, value: Any, size: int, *, instead_of: str = "", only_copy: bool = False) -> bool:
        """Hold `value` under `path`, in the room of what `instead_of` names, too.

        Args:
            path: The name to get it by.
            value: Anything.
            size: Its bytes.
            instead_of: What to let go of first.
            only_copy: It is nowhere else.

        Returns:
            False if there is no room: then nothing is held under either path.
        """
        with self._lock:
            self._remove(path)
            self._remove(instead_of)
            if self.used + size > self.limit:
                return False
            self._held[path] = value, size, only_copy
            self.used += size
            return True

    def _remove(self, path: str) -> Any:
        value, size, _ = self._held.pop(path, (None, 0, False))
        self.used -= size
        return value

    def get(self, path: str) -> Any:
        """What is held under a path; None if nothing is."""
        with self._lock:
            return self._held.get(path, (None,))[0]

    def pop(self, path: str) -> Any:
        """Let go of what is held under a path, and return it; None if nothing is."""
        with self._lock:
            return self._remove(path)

    def drop(self, path: str) -> None:
        """Let go of what is held under a path and below it."""
        with self._lock:
            for name in [name for name in self._held if name == path or name.startswith(path + "/")]:
                self._remove(name)

    @property
    def has_only_copies(self) -> bool:
        """Whether something is held that is nowhere else."""
        with self._lock:
            return any(only_copy for _, _, only_copy in self._held.values())

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


def whole_bytes(array: NDArray[np.generic]) -> int:
    """Bytes that an array keeps in memory: those of the array that it is a view of, if it is one."""
    return int((array if array.base is None else array.base).nbytes)

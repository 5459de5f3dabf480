"""What a process that runs units can use, and how it uses its memory."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa
from threadpoolctl import threadpool_limits

_UNKNOWN_MEMORY = 8 << 30
_LIMIT_FILES = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where Linux tells how much memory a container may use, in its two versions."""
TIGHT_MEMORY = 512 << 20
"""With so little nothing is held in it between stages, and large blocks are given back one by one."""
_AMPLE_MEMORY = 2 << 30
"""With so much, what the C library holds on to does not count: it is used again for the next unit."""
_M_MMAP_THRESHOLD = -3
"""Of glibc's `mallopt`."""


def default_workers() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_memory() -> int:
    """Half of the machine's memory, or of what a container may use of it."""
    limits = [_UNKNOWN_MEMORY]
    with suppress(ValueError, OSError):
        limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in _LIMIT_FILES:
        with suppress(ValueError, OSError):
            limits.append(int(Path(path).read_text()))  # "max" where there is none
    return min(limits) // 2


@contextmanager
def working_process(memory: int) -> Iterator[Callable[[], None]]:
    """Make this process ready to run units.

    BLAS is held to one thread, so that threads do not fight, and so that a product's bits do not depend on their
    number.

    Args:
        memory: Bytes that all its units may use together.

    Yields:
        What to call after each unit.
    """
    if memory < TIGHT_MEMORY:
        _map_large_blocks()
    with _steady_allocator(), threadpool_limits(1, user_api="blas"):
        yield _memory_trimmer() if memory < _AMPLE_MEMORY else lambda: None


def _memory_trimmer() -> Callable[[], None]:
    """Gives memory that the C library holds on to back to the system, so that the budget is about what is in use."""
    trim: Callable[[int], int] | None = None
    if sys.platform.startswith("linux"):
        with suppress(OSError, AttributeError):
            trim = ctypes.CDLL(None).malloc_trim

    def give_back() -> None:
        if trim is not None:
            trim(0)

    return give_back


def _map_large_blocks() -> None:
    """Have glibc map large blocks one by one, so that each goes back to the system when it is freed.

    By itself it raises the size from which it does so, up to 32 MB, and the holes that arrays leave in its heaps
    then count beside a small budget. It costs page faults, so larger budgets do without.
    """
    if sys.platform.startswith("linux"):
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)


@contextmanager
def _steady_allocator() -> Iterator[None]:
    """Let Arrow take its memory from jemalloc, where it is built with it.

    It gives back what was not used for a second. The C library gives large blocks back at once, to fetch them again for
    the next batch, which costs a page fault for each page; mimalloc, Arrow's own choice, holds on to more.
    """
    before = pa.default_memory_pool()
    with suppress(NotImplementedError):
        pa.set_memory_pool(pa.jemalloc_memory_pool())
    try:
        yield
    finally:
        pa.set_memory_pool(before)

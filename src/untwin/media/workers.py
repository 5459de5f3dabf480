"""Work on hostile files, in processes that may crash, hang or run out of memory without harm to the caller."""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from typing import Any, Generic, TypeVar

from untwin.errors import MediaError, ParameterError, ResourceError

S = TypeVar("S")
T = TypeVar("T")

DEFAULT_MEMORY = 1 << 30
_STARTED_S = 120.0
"""In which a process has to be ready; the imports take a fraction of a second."""
_GRACE_S = 2
"""After the time for a file, before a process whose caller is gone ends itself."""
_AHEAD = 4
"""Items in flight for each process: results wait for the slowest one before them."""
_PROGRAM = "from untwin.media.workers import _serve; _serve()"


@dataclass(frozen=True)
class Result(Generic[T]):
    """What the function returned."""

    value: T


@dataclass(frozen=True)
class Problem:
    """Why there is no result, in words that fit behind a file's name."""

    reason: str


def map_media(
    function: Callable[[S], T],
    items: Iterable[S],
    *,
    workers: int | None = None,
    timeout: float = 20.0,
    memory: int = DEFAULT_MEMORY,
) -> Iterator[Result[T] | Problem]:
    """Call a function for each item in processes of their own.

    A process that crashes, takes too long or too much memory costs the item that it is at, and is replaced. At the end
    of the iteration, also by an error, an interrupt or `close()`, no process is left; one whose caller was killed ends
    itself when it is done, or when the time for its item is over.

    Args:
        function: Of a module that can be imported.
        items: Pickled one by one, not far ahead of what is yielded.
        workers: Processes; default: the cores that this process may use.
        timeout: Seconds for each item.
        memory: Bytes for the data of each process (Linux), its libraries' included.

    Yields:
        A result or a problem for each item, in their order. A function's exceptions are problems.

    Raises:
        ParameterError: A number makes no sense.
        ResourceError: No process can be started.
    """
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers < 1 or not timeout > 0 or memory < 1:
        raise ParameterError(f"workers={workers}, timeout={timeout}, memory={memory}: each must be more than 0")
    return _once(MediaWorkers(function, workers=workers, timeout=timeout, memory=memory), items)


def _once(workers: MediaWorkers[S, T], items: Iterable[S]) -> Iterator[Result[T] | Problem]:
    with contextlib.closing(workers):
        yield from workers.map(items)


class MediaWorkers(Generic[S, T]):
    """Processes that call a function for items; see `map_media`. They live until `close`."""

    def __init__(self, function: Callable[[S], T], *, workers: int, timeout: float, memory: int) -> None:
        self._processes = [_Process(function, timeout, memory) for _ in range(workers)]
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        for process in self._processes:
            self._idle.put(process)

    def map(self, items: Iterable[S]) -> Iterator[Result[T] | Problem]:
        """A result or a problem for each item, in their order."""
        workers = len(self._processes)
        pending: deque[Future[Result[T] | Problem]] = deque()
        pool = ThreadPoolExecutor(workers, "untwin-media")
        done = False
        try:
            for item in items:
                pending.append(pool.submit(self._do, item))
                if len(pending) >= _AHEAD * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
            done = True
        finally:
            if not done:
                self._end()
            pool.shutdown(cancel_futures=True)
            if not done:
                self.close()

    def _do(self, item: S) -> Result[T] | Problem:
        process = self._idle.get()
        try:
            result: Result[T] | Problem = process.do(item)
            return result
        finally:
            self._idle.put(process)

    def close(self) -> None:
        """End the processes, and let go of them."""
        self._end()
        for process in self._processes:
            process.close()

    def _end(self) -> None:
        for process in self._processes:
            process.end()


class _Process:
    """A process that is started when it is needed first, and again after it was lost."""

    def __init__(self, function: Callable[[Any], Any], timeout: float, memory: int) -> None:
        self._task = pickle.dumps((function, timeout, memory))
        self._timeout, self._memory = timeout, memory
        self._lock = threading.Lock()
        self._running: subprocess.Popen[bytes] | None = None
        self._connection: Connection[Any, Any] | None = None
        self._over = False

    def do(self, item: Any) -> Any:
        """A Result or a Problem; the process is gone if it was lost."""
        connection = self._connection or self._start()
        try:
            connection.send(item)
        except OSError:  # it was killed while it had nothing to do
            self.close()
            connection = self._start()
            connection.send(item)
        try:
            if connection.poll(self._timeout):
                return connection.recv()
            reason = f"takes longer than {self._timeout:g} s to decode"
        except (EOFError, OSError):
            reason = ""
        status = self.close()
        if self._over:  # it was ended in the middle, which says nothing about the item
            raise EOFError
        return Problem(reason or self._why(status))

    def _why(self, status: int) -> str:
        if status == -signal.SIGALRM:
            return f"takes longer than {self._timeout:g} s to decode"
        if status >= 0:
            return f"ended the decoder (exit status {status})"
        with contextlib.suppress(ValueError):
            return f"crashed the decoder ({signal.Signals(-status).name})"
        return f"crashed the decoder (signal {-status})"

    def _start(self) -> Connection[Any, Any]:
        ours, theirs = Pipe()
        paths = [path or os.getcwd() for path in sys.path]  # noqa: PTH109
        # a thread of BLAS takes memory of its own
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OPENBLAS_NUM_THREADS": "1"}
        with theirs, self._lock:
            if self._over:
                ours.close()
                raise EOFError
            self._connection = ours
            # a group of its own: Ctrl-C is the caller's affair
            self._running = subprocess.Popen(
                [sys.executable, "-P", "-c", _PROGRAM, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment,
                process_group=0,
            )
        try:
            ours.send_bytes(self._task)
            ready = ours.poll(_STARTED_S) and ours.recv()
        except (EOFError, OSError):
            ready = False
        if ready is not True:
            status = self.close()
            if isinstance(ready, BaseException):
                raise ready
            raise ResourceError(f"a process for decoding did not start (exit status {status}); is there memory for it?")
        return ours

    def end(self) -> None:
        """Stop for good, also in the middle of an item of another thread."""
        with self._lock:
            self._over = True
            if self._running is not None:
                self._running.kill()
                self._running.wait()

    def close(self) -> int:
        """Make sure that the process is gone; return its exit status."""
        with self._lock:
            status = 0
            if self._running is not None:
                self._running.kill()
                status = self._running.wait()
            if self._connection is not None:
                self._connection.close()
            self._running = self._connection = None
            return status


def _serve() -> None:
    """The process: does items until its caller closes the connection."""
    connection: Connection[Any, Any] = Connection(int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    try:
        function, timeout, memory = pickle.loads(connection.recv_bytes())
    except Exception as error:
        connection.send(error)
        return
    _limit_memory(memory)
    connection.send(True)
    while True:
        try:
            item = connection.recv()
        except EOFError:
            return
        signal.alarm(math.ceil(timeout) + _GRACE_S)
        result = _do(function, item, memory)
        connection.send(result)
        signal.alarm(0)


def _do(function: Callable[[Any], Any], item: Any, memory: int) -> Result[Any] | Problem:
    try:
        return Result(function(item))
    except MediaError as error:
        return Problem(error.reason)
    except MemoryError:
        return Problem(f"takes more than {memory >> 20} MiB of memory to decode")
    except Exception as error:
        return Problem(f"{type(error).__name__}: {error}")


def _limit_memory(memory: int) -> None:
    if sys.platform.startswith("linux"):
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        memory = memory if most == resource.RLIM_INFINITY else min(memory, most)
        resource.setrlimit(resource.RLIMIT_DATA, (memory, most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

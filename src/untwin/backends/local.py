"""The local backend: units on the threads of this process, within a memory budget."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager

from untwin.backends.base import Crew, Executor, Progress
from untwin.backends.chain import Chain, do_unit
from untwin.backends.process import TIGHT_MEMORY, default_memory, default_workers, working_process
from untwin.errors import ParameterError
from untwin.stages.base import Context, Stage, Task
from untwin.storage.memory import Space


class LocalExecutor(Executor):
    """Runs units in threads; NumPy and Arrow release the interpreter's lock where the time goes.

    A unit that needs more than its share of the memory, or that holds more than its share of the work and can be
    split, runs alone, with all threads inside it.

    Args:
        workers: Threads; default: the cores this process may use.
        memory: Budget in bytes for the data in work (the interpreter and libraries come on top).
    """

    name = "local"

    def __init__(self, workers: int | None = None, memory: int | None = None) -> None:
        self.workers = default_workers() if workers is None else check_workers(workers)
        self.memory = default_memory() if memory is None else check_memory(memory)
        self.space_bytes = max(0, self.memory - TIGHT_MEMORY) // 2
        """Half of what is beyond 512 MiB."""

    @contextmanager
    def at_work(self, stages: Sequence[Stage]) -> Iterator[Crew]:
        """The threads."""
        stopped = threading.Event()
        space = Space(self.space_bytes)
        with working_process(self.memory) as after_unit, space.active(), _threads(self.workers, stopped) as pool:
            yield _Threads(self.workers, self.memory, pool, space, stopped, after_unit)


class _Threads(Crew):
    def __init__(
        self,
        workers: int,
        memory: int,
        pool: ThreadPoolExecutor,
        space: Space,
        stopped: threading.Event,
        after_unit: Callable[[], None],
    ) -> None:
        self._workers, self._memory, self._pool = workers, memory, pool
        self._space, self._stopped, self._after_unit = space, stopped, after_unit

    @property
    def has_only_copies(self) -> bool:
        return self._space.has_only_copies

    def run(self, chain: Chain, units: Sequence[Task], progress: Progress) -> None:
        chain.check_memory(units, self._memory)
        memory = max(self._memory - self._space.used, max(map(chain.minimum_memory, units), default=0))
        share = memory // self._workers
        alone, together = chain.split(units, share, self._workers)
        inside = Context(memory, self._workers, self._pool.map)
        for unit in alone:
            self._do(chain, unit, inside)
            progress.advance(unit.n_rows)
        self._run_together(chain, together, Context(share, 1, map), progress)

    def _run_together(self, chain: Chain, units: Sequence[Task], context: Context, progress: Progress) -> None:
        pending: dict[Future[None], Task] = {self._pool.submit(self._do, chain, unit, context): unit for unit in units}
        try:
            while pending:
                done, _ = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    unit = pending.pop(future)
                    future.result()
                    progress.advance(unit.n_rows)
        except Exception:
            for future in pending:
                future.cancel()
            wait(pending)
            raise

    def _do(self, chain: Chain, unit: Task, context: Context) -> None:
        with self._space.active():
            done = do_unit(chain.stages, unit, context, recorded=chain.recorded, stopped=self._stopped)
        chain.add(unit, done)
        self._after_unit()


def check_workers(workers: int) -> int:
    """A number of workers; ParameterError if it is none."""
    if isinstance(workers, bool) or not isinstance(workers, int):
        raise ParameterError(f"workers is {workers!r}; give a whole number")
    if workers < 1:
        raise ParameterError(f"workers is {workers}; it must be at least 1")
    return workers


def check_memory(memory: int) -> int:
    """A budget in bytes; ParameterError if it is none."""
    if memory < 1 << 20:
        raise ParameterError(f"memory is {memory} bytes; give at least 64 MB, as in 4GB or 512MB")
    return memory


@contextmanager
def _threads(workers: int, stopped: threading.Event) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads. After an interrupt it is left alone: what still runs writes no file any more."""
    pool = ThreadPoolExecutor(workers, "untwin")
    try:
        yield pool
    except KeyboardInterrupt:
        stopped.set()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()

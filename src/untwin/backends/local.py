"""The local backend: units on the threads of this process, within a memory budget."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import pyarrow as pa
from threadpoolctl import threadpool_limits

from untwin.backends.base import Executor, NoProgress, Outcome, Progress, StageReport, segments
from untwin.backends.ledger import Ledger
from untwin.errors import ParameterError, ResourceError
from untwin.stages.base import Context, Stage, Task, Upstream
from untwin.storage.files import DISK_FULL, Recording, WrittenFile
from untwin.storage.memory import Space

_UNKNOWN_MEMORY = 8 << 30
_LIMIT_FILES = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where Linux tells how much memory a container may use, in its two versions."""
_TIGHT_MEMORY = 512 << 20
"""With so little nothing is held in it between stages, and large blocks are given back one by one."""
_AMPLE_MEMORY = 2 << 30
"""With so much, what the C library holds on to does not count: it is used again for the next unit."""
_M_MMAP_THRESHOLD = -3
"""Of glibc's `mallopt`."""
_log = logging.getLogger("untwin")


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


class LocalExecutor(Executor):
    """Runs units in threads; NumPy and Arrow release the interpreter's lock where the time goes.

    A unit that needs more than its share of the memory, or that holds more than its share of the work and can be
    split, runs alone, with all threads inside it. The BLAS library is held to one thread, so that threads do not
    fight, and so that a product's bits do not depend on their number.

    Args:
        workers: Threads; default: the cores this process may use.
        memory: Budget in bytes for the data in work (the interpreter and libraries come on top).
    """

    def __init__(self, workers: int | None = None, memory: int | None = None) -> None:
        self.workers = default_workers() if workers is None else workers
        self.memory = default_memory() if memory is None else memory
        if isinstance(self.workers, bool) or not isinstance(self.workers, int):
            raise ParameterError(f"workers is {workers!r}; give a whole number")
        if self.workers < 1:
            raise ParameterError(f"workers is {workers}; it must be at least 1")
        if self.memory < 1 << 20:
            raise ParameterError(f"memory is {memory} bytes; give at least 64 MB, as in 4GB or 512MB")

    @property
    def space_bytes(self) -> int:
        """Most bytes that are held in memory from one stage to another: half of what is beyond 512 MiB."""
        return max(0, self.memory - _TIGHT_MEMORY) // 2

    def execute(
        self, stages: Sequence[Stage], progress: Progress | None = None, ledger: Ledger | None = None
    ) -> Outcome:
        """Run all stages over all units, honouring barriers. An interrupt does not wait for the units in flight."""
        shown = progress or NoProgress()
        if self.memory < _TIGHT_MEMORY:
            _map_large_blocks()
        upstream = Upstream()
        results: dict[str, tuple[Task, ...]] = {}
        reports: list[StageReport] = []
        stopped = threading.Event()
        space = Space(self.space_bytes)
        trim = _memory_trimmer() if self.memory < _AMPLE_MEMORY else lambda: None
        waiting: list[_Chain] = []
        with (
            space.active(),
            _steady_allocator(),
            threadpool_limits(1, user_api="blas"),
            _threads(self.workers, stopped) as pool,
        ):
            for chain in segments(stages):
                started = time.perf_counter()
                run = _Chain(chain, ledger, stopped, space, trim)
                n_reused = self._run_chain(run, upstream, pool, shown, ledger)
                if not run.complete:
                    waiting.append(run)
                if not space.has_only_copies:
                    # what these have left in memory only is not needed any more
                    for chain_before in waiting:
                        chain_before.record()
                    waiting.clear()
                seconds = time.perf_counter() - started
                for index, stage in enumerate(chain):
                    done = run.results_of(index)
                    results[stage.name] = done
                    upstream = Upstream((*upstream.stages, done))
                    report = StageReport(stage.name, len(done), run.n_rows, seconds * run.share(index), n_reused)
                    reports.append(report)
                    if stage.verbose:
                        _log.info("%s: %d units, %d rows, %.2f s", stage.name, len(done), run.n_rows, report.seconds)
        return Outcome(results, tuple(reports))

    def _run_chain(
        self, run: _Chain, upstream: Upstream, pool: ThreadPoolExecutor, shown: Progress, ledger: Ledger | None
    ) -> int:
        """Do what is left of a chain; returns the number of units that were done already."""
        finished = ledger.finished(run.name) if ledger else None
        if finished is not None:
            run.results = [list(tasks) for tasks in finished.tasks]
            run.n_rows, n_reused = finished.n_rows, len(run.results[0])
        else:
            units = run.stages[0].units(upstream)
            run.n_rows = sum(unit.n_rows for unit in units)
            left = [unit for unit in units if not run.reuse(unit)]
            n_reused = len(units) - len(left)
            shown.start(" + ".join(stage.name for stage in run.stages), run.n_rows)
            try:
                if n_reused:
                    shown.advance(run.n_rows - sum(unit.n_rows for unit in left))
                self._run_units(run, left, pool, shown)
            finally:
                shown.finish()
            if run.complete:
                run.record()
        for stage in run.stages:
            stage.finish()
        return n_reused

    def _run_units(self, run: _Chain, units: Sequence[Task], pool: ThreadPoolExecutor, progress: Progress) -> None:
        largest = 0
        for unit in units:
            least = run.minimum_memory(unit)
            if least > self.memory:
                raise ResourceError(
                    f"the memory budget of {_megabytes(self.memory)} is too small: {run.stages[0].name} needs "
                    f"{_megabytes(least)} for its largest unit of work; raise --memory"
                )
            largest = max(largest, least)
        memory = max(self.memory - run.space.used, largest)
        share = memory // self.workers
        total = sum(map(run.cost, units))
        alone = [
            unit
            for unit in units
            if run.memory(unit) > share or (run.splittable and run.cost(unit) * 2 * self.workers > total)
        ]
        chosen = {id(unit) for unit in alone}
        together = sorted((u for u in units if id(u) not in chosen), key=run.cost, reverse=True)
        inside = Context(memory, self.workers, pool.map)
        for unit in alone:
            run.process(unit, inside)
            progress.advance(unit.n_rows)
        self._run_together(run, together, pool, Context(share, 1, map), progress)

    @staticmethod
    def _run_together(
        run: _Chain, units: Sequence[Task], pool: ThreadPoolExecutor, context: Context, progress: Progress
    ) -> None:
        pending: dict[Future[None], Task] = {pool.submit(run.process, unit, context): unit for unit in units}
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


class _Chain:
    """Stages that run one after the other on each unit."""

    def __init__(
        self,
        stages: list[Stage],
        ledger: Ledger | None,
        stopped: threading.Event,
        space: Space,
        after_unit: Callable[[], None],
    ) -> None:
        self.stages = stages
        self.space = space
        self.n_rows = 0
        """Rows that the stages go over."""
        self.complete = True
        """All that the units have left is in files."""
        self._files: list[WrittenFile] = []
        self.name = ".".join(stage.name.replace(" ", "-") for stage in stages)
        self._ledger = ledger
        self._stopped = stopped
        self.results: list[list[Task]] = [[] for _ in stages]
        self._seconds: list[list[float]] = [[] for _ in stages]
        self.splittable = all(stage.splittable for stage in stages)
        self._after_unit = after_unit

    def memory(self, unit: Task) -> int:
        return max(stage.memory(unit) for stage in self.stages)

    def minimum_memory(self, unit: Task) -> int:
        return max(stage.minimum_memory(unit) for stage in self.stages)

    def cost(self, unit: Task) -> float:
        return max(stage.cost(unit) for stage in self.stages)

    def share(self, index: int) -> float:
        """The share of the chain's time that one of its stages took."""
        total = sum(map(sum, self._seconds))
        return sum(self._seconds[index]) / total if total else 1.0 / len(self.stages)

    def results_of(self, index: int) -> tuple[Task, ...]:
        """What came out of one of the stages, in unit order."""
        return tuple(sorted(self.results[index], key=lambda task: task.unit))

    def reuse(self, unit: Task) -> bool:
        """Take over what is done of a unit; False if it has to be done."""
        known = self._ledger.reuse(self.name, unit) if self._ledger else None
        for results, task in zip(self.results, known or (), strict=False):
            results.append(task)
        return known is not None

    def process(self, unit: Task, context: Context) -> None:
        recording = Recording(self._stopped)
        with self.space.active(), recording.active() if self._ledger else nullcontext():
            tasks = self._process(unit, context)
        if self._ledger:
            recording.check()
            files = list(recording.files.values())
            if recording.complete:
                self._ledger.record(self.name, unit, tasks, files)
            else:
                self.complete = False
                self._files += files
        for results, task in zip(self.results, tasks, strict=True):
            results.append(task)
        self._after_unit()

    def record(self) -> None:
        """Note in the ledger that all units are done."""
        if self._ledger:
            tasks = [self.results_of(index) for index in range(len(self.stages))]
            scratch = [path for stage in self.stages for path in stage.scratch()]
            self._ledger.finish(self.name, tasks, self.n_rows, scratch, self._files)

    def _process(self, unit: Task, context: Context) -> list[Task]:
        task = unit
        tasks = []
        for index, stage in enumerate(self.stages):
            started = time.perf_counter()
            try:
                task = stage.process(task, context)
            except OSError as error:
                if error.errno not in DISK_FULL:
                    error.add_note(f"in stage {stage.name}, unit {unit.unit}")
                    raise
                raise ResourceError(
                    f"stage {stage.name}: no space left on the device; make room, then run again"
                ) from error
            except Exception as error:
                error.add_note(f"in stage {stage.name}, unit {unit.unit}")
                raise
            self._seconds[index].append(time.perf_counter() - started)
            tasks.append(task)
        return tasks


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


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"

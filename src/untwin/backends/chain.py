"""A chain: stages without a barrier between them, and what has become of their units."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from untwin.backends.ledger import Ledger
from untwin.errors import ResourceError
from untwin.stages.base import Context, Stage, Task
from untwin.storage.files import DISK_FULL, Recording, WrittenFile
from untwin.storage.partitions import holding


@dataclass(frozen=True)
class UnitDone:
    """What came of a unit.

    Attributes:
        tasks: What came out of each stage.
        seconds: Wall time of each stage.
        files: What it has written, if that was recorded.
        complete: All that it leaves is in files; none of it lies in memory only.
    """

    tasks: tuple[Task, ...]
    seconds: tuple[float, ...]
    files: tuple[WrittenFile, ...] = ()
    complete: bool = True


def do_unit(
    stages: Sequence[Stage],
    unit: Task,
    context: Context,
    *,
    recorded: bool,
    stopped: threading.Event | None = None,
) -> UnitDone:
    """Run the stages of a chain on a unit, one after the other.

    Args:
        stages: Of the chain.
        unit: The first stage's unit.
        context: What the unit may use.
        recorded: Note which files are written.
        stopped: Once it is set, no file gets its name any more, and KeyboardInterrupt is raised.
    """
    recording = Recording(stopped)
    with recording.active() if recorded else nullcontext(), holding():
        task, tasks, seconds = unit, [], []
        for stage in stages:
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
            seconds.append(time.perf_counter() - started)
            tasks.append(task)
    if recorded:
        recording.check()
    return UnitDone(tuple(tasks), tuple(seconds), tuple(recording.files.values()), recording.complete)


class Chain:
    """Stages that run one after the other on each unit.

    Args:
        stages: In order; only the first may have a barrier before it.
        ledger: What is done already, and where to note what is.
    """

    def __init__(self, stages: Sequence[Stage], ledger: Ledger | None) -> None:
        self.stages = stages
        self.name = ".".join(stage.name.replace(" ", "-") for stage in stages)
        self.splittable = all(stage.splittable for stage in stages)
        self.n_rows = 0
        """Rows that the stages go over."""
        self.complete = True
        """All that the units have left is in files."""
        self._ledger = ledger
        self._results: list[list[Task]] = [[] for _ in stages]
        self._seconds = [0.0 for _ in stages]
        self._files: list[WrittenFile] = []

    @property
    def recorded(self) -> bool:
        """Whether there is a ledger that wants to know what units write."""
        return self._ledger is not None

    def memory(self, unit: Task) -> int:
        """Bytes that a unit needs to work at full speed."""
        return max(stage.memory(unit) for stage in self.stages)

    def minimum_memory(self, unit: Task) -> int:
        """Bytes without which a unit cannot work."""
        return max(stage.minimum_memory(unit) for stage in self.stages)

    def cost(self, unit: Task) -> float:
        """Work in a unit."""
        return max(stage.cost(unit) for stage in self.stages)

    def check_memory(self, units: Sequence[Task], budget: int) -> None:
        """Raise ResourceError if a unit cannot work within so many bytes."""
        least = max(map(self.minimum_memory, units), default=0)
        if least > budget:
            raise ResourceError(
                f"the memory budget of {_megabytes(budget)} is too small: {self.stages[0].name} needs "
                f"{_megabytes(least)} for its largest unit of work; raise --memory"
            )

    def split(self, units: Sequence[Task], share: int, workers: int) -> tuple[list[Task], list[Task]]:
        """Units that run alone, with several threads inside, and those that run together, the dearest first.

        Args:
            units: What there is to do.
            share: Bytes for each worker.
            workers: Units that can run at a time.
        """
        total = sum(map(self.cost, units))
        alone: list[Task] = []
        together: list[Task] = []
        for unit in units:
            large = self.splittable and self.cost(unit) * 2 * workers > total
            (alone if self.memory(unit) > share or large else together).append(unit)
        return alone, sorted(together, key=self.cost, reverse=True)

    def share(self, index: int) -> float:
        """The share of the chain's time that one of its stages took."""
        total = sum(self._seconds)
        return self._seconds[index] / total if total else 1.0 / len(self.stages)

    def results_of(self, index: int) -> tuple[Task, ...]:
        """What came out of one of the stages, in unit order."""
        return tuple(sorted(self._results[index], key=lambda task: task.unit))

    def reuse_all(self) -> int | None:
        """Take over all units, if all are done; returns their number."""
        finished = self._ledger.finished(self.name) if self._ledger else None
        if finished is None:
            return None
        self._results = [list(tasks) for tasks in finished.tasks]
        self.n_rows = finished.n_rows
        return len(self._results[0])

    def reuse(self, unit: Task) -> bool:
        """Take over what is done of a unit; False if it has to be done."""
        known = self._ledger.reuse(self.name, unit) if self._ledger else None
        for results, task in zip(self._results, known or (), strict=False):
            results.append(task)
        return known is not None

    def add(self, unit: Task, done: UnitDone) -> None:
        """Note what came of a unit; called from many threads."""
        if self._ledger and done.complete:
            self._ledger.record(self.name, unit, done.tasks, done.files)
        elif self._ledger:
            self.complete = False
            self._files += done.files
        for index, task in enumerate(done.tasks):
            self._results[index].append(task)
            self._seconds[index] += done.seconds[index]

    def record(self) -> None:
        """Note in the ledger that all units are done."""
        if self._ledger:
            tasks = [self.results_of(index) for index in range(len(self.stages))]
            scratch = [path for stage in self.stages for path in stage.scratch()]
            self._ledger.finish(self.name, tasks, self.n_rows, scratch, self._files)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"

"""The contract of a backend, what all of them do alike, and what they report."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

from untwin.backends.chain import Chain
from untwin.backends.ledger import Ledger
from untwin.stages.base import Stage, Task, Upstream, near_data

_log = logging.getLogger("untwin")
T = TypeVar("T")


@dataclass(frozen=True)
class StageReport:
    """How a stage went: units and rows done, seconds of wall time, and units taken over from an interrupted run."""

    name: str
    n_units: int
    n_rows: int
    seconds: float
    n_reused: int = 0


@dataclass(frozen=True)
class Outcome:
    """What came out of a run: the tasks of each stage, in unit order, and a report for each stage."""

    tasks: dict[str, tuple[Task, ...]]
    reports: tuple[StageReport, ...]

    @property
    def last(self) -> tuple[Task, ...]:
        """The tasks of the last stage."""
        return next(reversed(self.tasks.values())) if self.tasks else ()


class Progress(Protocol):
    """Gets told how far the work is; called from the thread that runs the pipeline."""

    def start(self, name: str, n_rows: int) -> None:
        """A stage (or a chain of stages) begins."""
        ...

    def advance(self, n_rows: int) -> None:
        """A unit is done, with so many rows."""
        ...

    def finish(self) -> None:
        """The stage is done, or has failed."""
        ...


class NoProgress:
    """Says nothing."""

    def start(self, name: str, n_rows: int) -> None:
        """Say nothing."""

    def advance(self, n_rows: int) -> None:
        """Say nothing."""

    def finish(self) -> None:
        """Say nothing."""


class Crew(ABC):
    """Those who run units, from the first chain of an execution to the last."""

    @abstractmethod
    def run(self, chain: Chain, units: Sequence[Task], progress: Progress) -> None:
        """Run a chain on units, add what comes of each to the chain, and tell the progress.

        Raises:
            UntwinError: What a unit raised, unchanged.
        """

    @property
    def has_only_copies(self) -> bool:
        """Whether units have left something in memory that is nowhere else."""
        return False


class Executor(ABC):
    """Runs stages.

    Attributes:
        name: Of the backend.
        workers: Units that can run at a time.
        memory: Bytes that the units on one machine may use together.
        space_bytes: Most of them that are used to hold something from one stage to another.
        n_lost: Workers that were lost at work; each may have left a file half written.
    """

    name: ClassVar[str]
    workers: int
    memory: int
    space_bytes: int = 0
    n_lost: int = 0

    @abstractmethod
    def at_work(self, stages: Sequence[Stage]) -> AbstractContextManager[Crew]:
        """Those who run the units of these stages."""

    def call(self, function: Callable[..., T], *args: Any, **options: Any) -> T:
        """Call a function where the data can be read: here, or on a worker. All that it takes and gives is small."""
        return function(*args, **options)

    def execute(
        self, stages: Sequence[Stage], progress: Progress | None = None, ledger: Ledger | None = None
    ) -> Outcome:
        """Run all stages over all units, honouring barriers. An interrupt does not wait for the units in flight.

        Args:
            stages: In order.
            progress: Gets told how far the work is.
            ledger: What is done already and need not be done again, and where to note what is.

        Raises:
            UntwinError: What a unit raised, unchanged.
        """
        shown = progress or NoProgress()
        upstream = Upstream()
        results: dict[str, tuple[Task, ...]] = {}
        reports: list[StageReport] = []
        waiting: list[Chain] = []
        with near_data(self.call), self.at_work(stages) as crew:
            for segment in segments(stages):
                started = time.perf_counter()
                chain = Chain(segment, ledger)
                n_reused = _run_chain(chain, upstream, crew, shown)
                if not chain.complete:
                    waiting.append(chain)
                if not crew.has_only_copies:
                    # what these have left in memory only is not needed any more
                    for chain_before in waiting:
                        chain_before.record()
                    waiting.clear()
                seconds = time.perf_counter() - started
                for index, stage in enumerate(segment):
                    done = chain.results_of(index)
                    results[stage.name] = done
                    upstream = Upstream((*upstream.stages, done))
                    report = StageReport(stage.name, len(done), chain.n_rows, seconds * chain.share(index), n_reused)
                    reports.append(report)
                    if stage.verbose:
                        _log.info("%s: %d units, %d rows, %.2f s", stage.name, len(done), chain.n_rows, report.seconds)
        return Outcome(results, tuple(reports))


def _run_chain(chain: Chain, upstream: Upstream, crew: Crew, shown: Progress) -> int:
    """Do what is left of a chain; returns the number of units that were done already."""
    n_reused = chain.reuse_all()
    if n_reused is None:
        units = chain.stages[0].units(upstream)
        chain.n_rows = sum(unit.n_rows for unit in units)
        left = [unit for unit in units if not chain.reuse(unit)]
        n_reused = len(units) - len(left)
        shown.start(" + ".join(stage.name for stage in chain.stages), chain.n_rows)
        try:
            if n_reused:
                again = {unit.unit for unit in left}
                for unit in units:
                    if unit.unit not in again:
                        shown.advance(unit.n_rows)
            crew.run(chain, left, shown)
        finally:
            shown.finish()
        if chain.complete:
            chain.record()
    for stage in chain.stages:
        stage.finish()
    return n_reused


def segments(stages: Sequence[Stage]) -> list[list[Stage]]:
    """Cut a list of stages before each barrier."""
    cut: list[list[Stage]] = []
    for stage in stages:
        if stage.barrier or not cut:
            cut.append([stage])
        else:
            cut[-1].append(stage)
    return cut

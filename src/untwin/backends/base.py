"""The contract of a backend, and what it reports."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from untwin.backends.ledger import Ledger
from untwin.stages.base import Stage, Task


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
        """Rows are done."""
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


class Executor(ABC):
    """Runs stages."""

    @abstractmethod
    def execute(
        self, stages: Sequence[Stage], progress: Progress | None = None, ledger: Ledger | None = None
    ) -> Outcome:
        """Run all stages over all units, honouring barriers.

        Args:
            stages: In order.
            progress: Gets told how far the work is.
            ledger: What is done already and need not be done again, and where to note what is.

        Raises:
            UntwinError: What a unit raised, unchanged.
        """


def segments(stages: Sequence[Stage]) -> list[list[Stage]]:
    """Cut a list of stages before each barrier."""
    cut: list[list[Stage]] = []
    for stage in stages:
        if stage.barrier or not cut:
            cut.append([stage])
        else:
            cut[-1].append(stage)
    return cut

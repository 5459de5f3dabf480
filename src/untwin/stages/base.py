"""What all stages share: tasks, the stage contract, and what a backend gives to a unit of work."""

from __future__ import annotations

import contextlib
import contextvars
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

from untwin.errors import OutputExistsError, ParameterError
from untwin.storage.files import Storage, redact


@dataclass(frozen=True)
class Task:
    """A unit of work, or what came of it: small, and free of data.

    Attributes:
        unit: Number of the unit in its stage.
        n_rows: Rows that the unit deals with.
    """

    unit: int
    n_rows: int


T = TypeVar("T", bound=Task)
R = TypeVar("R")


@dataclass(frozen=True)
class Upstream:
    """What the stages before have made: the tasks of each, in order."""

    stages: tuple[tuple[Task, ...], ...] = ()

    @property
    def last(self) -> tuple[Task, ...]:
        """The tasks of the stage just before."""
        return self.stages[-1] if self.stages else ()

    def of(self, kind: type[T]) -> list[T]:
        """All tasks of a kind, whichever stage made them."""
        return [task for stage in self.stages for task in stage if isinstance(task, kind)]


class ParallelMap(Protocol):
    """`map` over the threads that a unit may use; results come in order."""

    def __call__(self, function: Callable[[Any], Any], items: Iterable[Any], /) -> Iterator[Any]:
        """Apply `function` to each item."""
        ...


@dataclass(frozen=True)
class Context:
    """What a backend gives to a unit while it runs.

    Attributes:
        memory: Bytes that the unit may use.
        threads: Threads that the unit may use.
        map: `map` over these threads.
        spread: `map` over the workers of a cluster, for a unit that is too large for one of them: the function, the
            items and the results travel between processes, and each call may use `memory` bytes and one thread. None
            where there is only this process.
    """

    memory: int
    threads: int
    map: ParallelMap
    spread: ParallelMap | None = None


class Stage(ABC):
    """One step: turns a task into a task. Stages without a barrier between them run unit by unit in a chain.

    A stage object is data (parameters and paths): backends may send it to other processes.
    """

    name: ClassVar[str]
    barrier: ClassVar[bool] = False
    """The stage must see all tasks of the stage before it: its `units` are made once these are done."""
    splittable: ClassVar[bool] = False
    """A unit can keep several threads busy by itself."""
    verbose: bool = False
    """Log the stage (logger `untwin`, level INFO)."""

    def check(self, before: Sequence[Stage]) -> None:
        """Refuse, before any work starts, what this stage cannot do after the stages `before` it.

        Raises:
            UntwinError: It does not fit them.
        """
        return

    def check_output(self) -> None:
        """Refuse to write where there is something already; not asked where a ledger knows what is there.

        Raises:
            OutputExistsError: There is something.
        """
        return

    def units(self, upstream: Upstream) -> Sequence[Task]:
        """Make this stage's units from what the stages before have made. Runs once, before the first unit."""
        return upstream.last

    @abstractmethod
    def process(self, task: Any, context: Context) -> Task:
        """Do one unit of work. Doing it again gives the same files."""

    @property
    def place(self) -> tuple[Storage, str] | None:
        """The folder that the stage writes to; None if it is one that a stage before it has written to."""
        return None

    @property
    def origin(self) -> tuple[Storage, str] | None:
        """A file of the input that the stage reads; None if it reads only what stages before it have written."""
        return None

    def scratch(self) -> tuple[str, ...]:
        """Folders that `finish` removes: nobody reads them once all units of the stage are done."""
        return ()

    def finish(self) -> None:
        """Clean up once all units are done. Doing it again does no harm."""
        return

    def memory(self, task: Any) -> int:
        """Bytes that the unit needs to work at full speed."""
        return 64 << 20

    def minimum_memory(self, task: Any) -> int:
        """Bytes without which the unit cannot work; a unit that can spill needs less than `memory`."""
        return self.memory(task)

    def cost(self, task: Task) -> float:
        """Work in the unit, in any unit of measure that is the same for all units of the stage."""
        return float(task.n_rows)


_call: contextvars.ContextVar[Callable[..., Any] | None] = contextvars.ContextVar("untwin-call", default=None)


@contextlib.contextmanager
def near_data(call: Callable[..., Any]) -> Iterator[None]:
    """Have `where_data_is` call functions by `call(function, *args, **options)`."""
    token = _call.set(call)
    try:
        yield
    finally:
        _call.reset(token)


def where_data_is(function: Callable[..., R], *args: Any, **options: Any) -> R:
    """Call a function that reads input, or a stage's vectors, for a stage's `units`: the driver of a cluster cannot."""
    call = _call.get()
    result: R = function(*args, **options) if call is None else call(function, *args, **options)
    return result


class CompositeStage(ABC):
    """A step that users see as one and that is several stages."""

    @abstractmethod
    def stages(self) -> list[Stage]:
        """The stages, in order. Called when the pipeline runs, not before."""


def storage_of(kwargs: dict[str, Any] | None) -> Storage:
    """The storage that `read_kwargs` or `write_kwargs` describe (`storage_options`; nothing else is known).

    Raises:
        ParameterError: An unknown key.
    """
    if not isinstance(kwargs, dict | None):
        raise ParameterError(f"read_kwargs/write_kwargs is {kwargs!r}; give a dictionary")
    known = dict(kwargs or {})
    options = known.pop("storage_options", None) or {}
    if not isinstance(options, dict):
        raise ParameterError("storage_options is no dictionary; give one such as {'anon': True}")
    if known:
        raise ParameterError(
            f"read_kwargs/write_kwargs: {', '.join(map(repr, known))} is not supported; known is 'storage_options'"
        )
    return Storage(options)


def require_empty(storage: Storage, folder: str) -> None:
    """Raise OutputExistsError if a folder holds something."""
    present = storage.names(folder)
    if present:
        raise OutputExistsError(
            f"{redact(folder)}: holds {present[0]!r} already; choose another output_path, or remove the folder"
        )

"""The Ray backend: units as Ray tasks on the machines of a cluster, which share the storage of input and output.

Rows never pass through Ray or through the driver: a task gets a unit's description, reads and writes files, and returns
what came of it. What travels once a chain are its stages, with the plan and the listing of the input.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import logging
import os
import pickle
import socket
import time
import traceback
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from untwin.backends.base import Crew, Executor, Progress
from untwin.backends.chain import Chain, UnitDone, do_unit
from untwin.backends.local import check_memory, check_workers
from untwin.backends.process import default_workers, working_process
from untwin.errors import InputNotFoundError, MissingExtraError, ParameterError, ResourceError, UntwinError
from untwin.stages.base import Context, ParallelMap, Stage, Task
from untwin.storage.files import Storage, join, redact
from untwin.storage.spread import spreading

try:
    import ray
    from ray._private import ray_constants, services
    from ray.exceptions import GetTimeoutError, RayError, RayTaskError, TaskCancelledError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
except ImportError as error:
    raise MissingExtraError(
        "the Ray backend needs a package that is not installed: pip install 'untwin[ray]'"
    ) from error

_OLDEST = (2, 40)
"""Older versions of Ray were never tried."""
_REACH_SECONDS = 10.0
"""How long to wait for a cluster to answer."""
_PROBE_SECONDS = 60.0
TRIES = 6
"""How often a unit is begun before it is given up; each lost worker or node costs one."""
_LOOK_SECONDS = 1.0
"""How often the nodes of the cluster are counted anew."""
_CANCEL_SECONDS = 10.0
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_SETTINGS = b"\0\0\0\4\0\0\0\0\0"
"""The frame with which both ends of an HTTP/2 connection begin."""
_PROCESS_BYTES = 256 << 20
"""A worker's interpreter and libraries."""
_MEMORY_STEP = 128 << 20
"""Tasks declare multiples of it: Ray keeps a queue for each kind of task, and each amount is a kind."""
_RECORDERS = 16
_log = logging.getLogger("untwin")
T = TypeVar("T")


@dataclass(frozen=True)
class _Nodes:
    """The nodes that can work: how many, their CPUs, and the CPUs and bytes of memory of the smallest."""

    count: int
    cpus: int
    node_cpus: int
    node_memory: int


class RayExecutor(Executor):
    """Runs each unit as a Ray task that declares its CPUs and its memory.

    A unit that fits a worker's share of the memory gets one CPU. One that needs more, or that holds more than its share
    of the work and can be split, gets all CPUs of a node; if that is still too little, its parts are spread over all
    nodes. Units whose worker or node dies are done again; nodes that join get work. Input and output have to be on
    storage that all nodes see: a shared folder or an object store.

    Args:
        address: Of a running cluster: `auto`, `host:port` or `ray://host:port`; `local` starts one on this machine,
            which ends with this process. None: that of the environment variable RAY_ADDRESS, else `local`. Where this
            process is connected to a cluster already, that one is used.
        workers: Most units at a time; default: the CPUs of the cluster.
        memory: Budget in bytes for the data in work on each node; default: half of what the smallest node has.

    Raises:
        MissingExtraError: Ray is not installed, or too old.
        ResourceError: The cluster cannot be reached.
    """

    name = "ray"

    def __init__(self, address: str | None = None, workers: int | None = None, memory: int | None = None) -> None:
        self._address = address
        self._workers = None if workers is None else check_workers(workers)
        budget = None if memory is None else check_memory(memory)
        _connect(address, self._workers)
        _nodes_at.cache_clear()
        nodes = cluster_nodes()
        self.workers = min(nodes.cpus, self._workers or nodes.cpus)
        self.memory = budget or nodes.node_memory // 2
        if nodes.count and self.memory > nodes.node_memory:
            _log.warning(
                "memory is %.1f GB, but the smallest node of the Ray cluster has %.1f GB, which is what is used",
                self.memory / 1e9,
                nodes.node_memory / 1e9,
            )
            self.memory = nodes.node_memory
        self.units_by_node: Counter[str] = Counter()
        """Units that each node has done, by its id."""
        self._seen: set[tuple[str, str]] = set()

    @contextmanager
    def at_work(self, stages: Sequence[Stage]) -> Iterator[Crew]:
        """The workers of the cluster, once it is known that they see the storage."""
        _connect(self._address, self._workers)  # an interrupt may have ended what was there
        self._check_storage(stages)
        with ThreadPoolExecutor(_RECORDERS, "untwin-record") as recorders:
            crew = _Tasks(self.memory, self._workers, self.units_by_node, recorders)
            try:
                yield crew
            finally:
                self.n_lost += crew.n_lost

    def call(self, function: Callable[..., T], *args: Any, **options: Any) -> T:
        """Call a function on a worker."""
        _connect(self._address, self._workers)
        held = [ray.put((function, args, options))]
        task = _remote(_call, num_cpus=1, max_retries=TRIES - 1, name=function.__name__)
        reference = task.remote(held, self.memory)
        try:
            outcome = ray.get(reference)
        except KeyboardInterrupt:
            _cancel([reference], interrupted=True)
            raise
        except RayError as error:
            raise _lost(function.__name__, error) from error
        try:
            result: T = result_of(outcome)
        except InputNotFoundError as error:
            raise InputNotFoundError(f"{error} (on a node of the Ray cluster; all of them have to see it)") from None
        return result

    def _check_storage(self, stages: Sequence[Stage]) -> None:
        """Raise ResourceError if a node does not see what the driver writes, or has another version of untwin.

        The input is looked for, too. The driver itself need not see it.
        """
        place = next(filter(None, (stage.place for stage in stages)), None)
        if place is None:
            return
        storage, folder = place
        new = [node for node in _working_nodes() if (node["NodeID"], folder) not in self._seen]
        if not new:
            return
        token = uuid.uuid4().hex
        path = join(folder, f"_tmp-{token}")
        origins = [origin for origin in (stage.origin for stage in stages) if origin is not None][:1]
        storage.write_bytes(path, token.encode())
        try:
            strategies = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in new]
            asked = [
                _remote(_probe, num_cpus=0, scheduling_strategy=strategy, max_retries=TRIES - 1).remote(
                    storage, path, token, where, origins
                )
                for strategy, where in zip(strategies, map(_where, new), strict=True)
            ]
            for node, reference in zip(new, asked, strict=True):
                version = _answer_of(reference, node, folder)
                if version not in (None, _version()):
                    raise ResourceError(
                        f"{_where(node)} has untwin {version}, this process {_version()}; install the same version "
                        "on all nodes"
                    )
                self._seen.add((node["NodeID"], folder))
        finally:
            storage.remove(path)


class _Tasks(Crew):
    """Units as Ray tasks. Few are in flight at a time, and what comes of them is recorded by a few threads."""

    def __init__(
        self, memory: int, workers: int | None, units_by_node: Counter[str], recorders: ThreadPoolExecutor
    ) -> None:
        self._memory, self._workers = memory, workers
        self._units_by_node, self._recorders = units_by_node, recorders
        self.n_lost = 0

    def run(self, chain: Chain, units: Sequence[Task], progress: Progress) -> None:
        chain.check_memory(units, self._memory)
        nodes = cluster_nodes()
        share = self._memory // nodes.node_cpus
        alone, together = chain.split(units, share, nodes.cpus)
        total = sum(map(chain.cost, units))
        spread: list[Task] = []
        inside: list[Task] = []
        for unit in alone:
            large = chain.memory(unit) > self._memory or (
                chain.splittable and chain.cost(unit) * 2 * nodes.count > total
            )
            (spread if large and nodes.count > 1 else inside).append(unit)
        stages = ray.put(list(chain.stages))
        whole = functools.partial(self._submit, chain, stages, nodes.node_cpus, self._memory)
        one = functools.partial(self._submit, chain, stages, 1, share)
        # one at a time: the parts of two could wait for memory that both hold
        self._run(chain, spread, progress, lambda: 1, functools.partial(whole, spread_memory=share))
        self._run(chain, inside, progress, functools.partial(self._in_flight, nodes.node_cpus), whole)
        self._run(chain, together, progress, functools.partial(self._in_flight, 1), one)

    def _submit(
        self,
        chain: Chain,
        stages: Any,
        n_cpus: int,
        memory: int,
        unit: Task,
        spread_memory: int = 0,
    ) -> Any:
        nodes = cluster_nodes()
        n_cpus = min(n_cpus, nodes.node_cpus)
        declared = -(-min(chain.memory(unit), memory) // _MEMORY_STEP) * _MEMORY_STEP + _PROCESS_BYTES
        each = nodes.node_memory // nodes.node_cpus
        # if all other nodes are lost, a part of a unit still finds room beside it; its CPUs are lent while it waits
        spread_memory = min(spread_memory, each)
        room = each * n_cpus - spread_memory
        task = _remote(
            work_on,
            num_cpus=n_cpus,
            memory=min(declared, room),
            name=f"{chain.name} {unit.unit}",
            scheduling_strategy="SPREAD",
        )
        # the reference lies in a list, so that a worker fetches the stages once, and not for every unit
        return task.remote([stages], unit, n_cpus, memory, spread_memory, chain.recorded)

    def _run(
        self,
        chain: Chain,
        units: Sequence[Task],
        progress: Progress,
        in_flight: Callable[[], int],
        submit: Callable[[Task], Any],
    ) -> None:
        left = deque((unit, 1) for unit in units)
        pending: dict[Any, tuple[Task, int]] = {}
        recording: dict[Future[None], Task] = {}
        try:
            while left or pending or recording:
                most = in_flight()
                while left and len(pending) < most:
                    unit, number = left.popleft()
                    pending[submit(unit)] = unit, number
                done, _ = ray.wait(list(pending), timeout=_LOOK_SECONDS) if pending else ([], [])
                for reference in done:
                    unit, number = pending.pop(reference)
                    outcome = _outcome(reference)
                    if isinstance(outcome, RayError):
                        self._again(chain, unit, number, outcome)
                        left.appendleft((unit, number + 1))
                        continue
                    node, result = result_of(outcome)
                    self._units_by_node[node] += 1
                    recording[self._recorders.submit(chain.add, unit, result)] = unit
                for future in [future for future in recording if future.done() or not pending]:
                    future.result()
                    progress.advance(recording.pop(future).n_rows)
        except BaseException as error:
            _cancel(list(pending), interrupted=isinstance(error, KeyboardInterrupt))
            raise

    def _in_flight(self, n_cpus: int) -> int:
        """Enough that no worker waits for the next unit, and few enough that a node that joins finds some left."""
        slots = max(1, cluster_nodes().cpus // n_cpus)
        most = slots + max(1, slots // 2)
        return most if self._workers is None else max(1, min(most, self._workers // n_cpus))

    def _again(self, chain: Chain, unit: Task, number: int, error: RayError) -> None:
        self.n_lost += 1
        what = f"stage {' + '.join(stage.name for stage in chain.stages)}, unit {unit.unit}"
        if number >= TRIES:
            raise _lost(f"{what} (begun {number} times)", error) from error
        _log.warning("%s: its worker was lost (%s); it is done again", what, type(error).__name__)


class _Spread:
    """`map` over the workers of the cluster, from inside a unit."""

    def __init__(self, memory: int, declared: int | None = None) -> None:
        self._memory = memory
        self._declared = memory if declared is None else declared

    def __call__(self, function: Callable[[Any], Any], items: Iterable[Any], /) -> Iterator[Any]:
        held = [ray.put(function)]
        task = _remote(_apply, num_cpus=1, memory=self._declared, max_retries=TRIES - 1, scheduling_strategy="SPREAD")
        left, pending = iter(items), deque[Any]()
        try:
            while True:
                most = 2 * cluster_nodes().cpus
                for item in left:
                    pending.append(task.remote(held, item, self._memory))
                    if len(pending) >= most:
                        break
                if not pending:
                    return
                outcome = _outcome(pending[0])
                if isinstance(outcome, RayError):
                    raise _lost("a part of it", outcome) from outcome
                yield result_of(outcome)
                pending.popleft()
        finally:
            for reference in pending:
                ray.cancel(reference, recursive=True)


# What follows runs on workers.


@dataclass(frozen=True)
class _Answer:
    """What comes back from a worker: a value or an error, and what was logged there, with its level."""

    value: Any
    error: Exception | None
    said: tuple[tuple[int, str], ...]


class _Listener(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.said: list[tuple[int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append((record.levelno, record.getMessage()))


def _answered(function: Callable[[], Any]) -> _Answer:
    """Call a function; what it logs is told on the driver, once, and not here."""
    listener = _Listener()
    _log.propagate = False
    _log.addHandler(listener)
    value, failure = None, None
    try:
        value = function()
    except Exception as error:
        failure = _portable(error)
    finally:
        _log.removeHandler(listener)
    return _Answer(value, failure, tuple(listener.said))


def work_on(held: list[Any], unit: Task, n_threads: int, memory: int, spread_memory: int, recorded: bool) -> _Answer:
    """Run a chain on a unit; gives the node and what came of the unit."""
    after_unit = _worker(memory)

    def work() -> tuple[str, UnitDone]:
        stages = _fetched(held[0])
        spread: ParallelMap | None = _Spread(spread_memory) if spread_memory else None
        if n_threads == 1 and spread is None:
            done = do_unit(stages, unit, Context(memory, 1, map), recorded=recorded)
        else:
            with ThreadPoolExecutor(n_threads, "untwin") as pool:
                done = do_unit(stages, unit, Context(memory, n_threads, pool.map, spread), recorded=recorded)
        after_unit()
        return ray.get_runtime_context().get_node_id(), done

    return _answered(work)


def _call(held: list[Any], memory: int) -> _Answer:
    """Call a function."""
    _worker(memory)
    function, args, options = ray.get(held[0])
    with spreading(_Spread(memory, _PROCESS_BYTES)):
        return _answered(lambda: function(*args, **options))


def _apply(held: list[Any], item: Any, memory: int) -> _Answer:
    """Apply a function to an item."""
    after_unit = _worker(memory)
    answer = _answered(lambda: _fetched(held[0])(item))
    after_unit()
    return answer


def _probe(storage: Storage, path: str, token: str, where: str, origins: Sequence[tuple[Storage, str]]) -> _Answer:
    """Look for what the driver wrote and for the input; gives the version of untwin."""

    def look() -> str:
        shared = "give input and output on storage that all nodes share, such as a mounted network folder or s3://…"
        if not storage.exists(path) or storage.read_bytes(path).decode() != token:
            raise ResourceError(f"{redact(path.rpartition('/')[0])}: {where} does not see this folder; {shared}")
        for source, origin in origins:
            if not source.exists(origin):
                raise ResourceError(f"{redact(origin)}: {where} does not see this file of the input; {shared}")
        return _version()

    return _answered(look)


@functools.cache
def _worker(memory: int) -> Callable[[], None]:
    """Make this process a worker, for as long as it lives."""
    return _stack().enter_context(working_process(memory))


@functools.lru_cache(maxsize=1)
def _stack() -> contextlib.ExitStack:
    return contextlib.ExitStack()


_latest: dict[str, Any] = {}


def _fetched(reference: Any) -> Any:
    """An object that many tasks share; a worker keeps the latest, with what it has prepared for its next use."""
    key = reference.hex()
    if key not in _latest:
        value = ray.get(reference)
        _latest.clear()
        _latest[key] = value
    return _latest[key]


def _portable(error: Exception) -> Exception:
    """An error as it arrives on the driver: itself if it can travel, with where it came from."""
    if not isinstance(error, UntwinError):
        error.add_note(f"on host {socket.gethostname()}:\n{''.join(traceback.format_exception(error))}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        told = RuntimeError(f"{type(error).__name__}: {error}")
        for note in getattr(error, "__notes__", ()):
            told.add_note(note)
        return told
    return error


# What follows runs on the driver.


def _connect(address: str | None, workers: int | None) -> None:
    """Connect to Ray, unless this process is connected.

    Raises:
        MissingExtraError: Ray is too old.
        ResourceError: The cluster cannot be reached.
    """
    found = tuple(int(part) for part in ray.__version__.split(".")[:2])
    if found < _OLDEST:
        raise MissingExtraError(
            f"Ray {ray.__version__} is too old for untwin, which needs {_OLDEST[0]}.{_OLDEST[1]} or newer: "
            "pip install --upgrade 'untwin[ray]'"
        )
    if ray.is_initialized():
        return
    _exported.cache_clear()  # for a client of a cluster it is another thing than for a member
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    # what workers log comes with their answers
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address == "local":
        n_cpus = workers or default_workers()
        with _on_loopback():  # nobody else is to use it
            ray.init(address="local", num_cpus=n_cpus, include_dashboard=False, **quiet)
        _started.add(ray.get_runtime_context().gcs_address)
        return
    started = time.monotonic()
    hint = "start one with 'ray start --head', or leave --ray-address out for one on this machine"
    try:
        place = services.get_ray_address_from_environment("auto", None) if address == "auto" else address
        with contextlib.nullcontext() if _reaches(place) else _on_loopback():
            ray.init(address=place, **quiet)
    except ImportError as error:
        raise MissingExtraError(
            f"{address} needs a package that is not installed: pip install 'ray[client]' ({error})"
        ) from error
    except (OSError, RuntimeError, ValueError, RayError) as error:
        if isinstance(error, ParameterError):
            raise
        raise ResourceError(
            f"no Ray cluster at {address} (waited {time.monotonic() - started:.0f} s: {first_line(error)}); {hint}"
        ) from error


def _reaches(address: str) -> bool:
    """Whether a cluster listens where Ray will look for it, and not on the loopback address only.

    Ray takes this machine's own address for `localhost`, and waits for minutes where nobody listens.

    Raises:
        OSError: Nobody listens, or not a Ray cluster.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or "/" in host or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise ParameterError(f"ray_address is {address!r}; give auto, local, HOST:PORT or ray://HOST:PORT")
    host, end = host.strip("[]"), time.monotonic() + _REACH_SECONDS
    hosts = [host]
    if host in _LOOPBACK and not address.startswith("ray://"):
        hosts.insert(0, services.get_node_ip_address())  # type: ignore[no-untyped-call]
    while True:
        for place in hosts:
            try:
                _greet(place, int(port))
            except OSError as error:
                failure = error
            else:
                return place == hosts[0]
        if time.monotonic() > end:
            raise failure
        time.sleep(0.5)


def _greet(host: str, port: int) -> None:
    """Raise OSError unless somebody listens who speaks gRPC, which a Ray cluster does."""
    with socket.create_connection((host, port), timeout=_REACH_SECONDS) as connection:
        if os.environ.get("RAY_USE_TLS", "0") in ("0", ""):
            connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _SETTINGS)
            if connection.recv(9)[3:4] != _SETTINGS[3:4]:
                raise ConnectionError("what listens there is no Ray cluster")


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """Have Ray use the loopback address, for itself and for what it starts: by itself it does so on macOS only."""
    before = getattr(ray_constants, "ENABLE_RAY_CLUSTER", True)
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def cluster_nodes() -> _Nodes:
    """The nodes that can work now, as of a second ago at most."""
    return _nodes_at(int(time.monotonic() / _LOOK_SECONDS))


@functools.lru_cache(maxsize=1)
def _nodes_at(_: int) -> _Nodes:
    found = [node["Resources"] for node in _working_nodes()]
    cpus = [int(node["CPU"]) for node in found]
    memory = [int(node.get("memory", 1 << 30)) for node in found]
    if not found:
        _warn_of_no_nodes(int(time.monotonic() / 60))
    return _Nodes(len(found), max(1, sum(cpus)), min(cpus, default=1), min(memory, default=1 << 30))


@functools.lru_cache(maxsize=1)
def _warn_of_no_nodes(_: int) -> None:
    _log.warning("the Ray cluster has no node with a CPU; the work waits until one joins")


def _working_nodes() -> list[dict[str, Any]]:
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node for node in nodes if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]


def _version() -> str:
    return importlib.metadata.version("untwin")


def _remote(function: Callable[..., Any], **options: Any) -> Any:
    return _exported(function).options(**{"max_retries": 0, **options})


@functools.cache
def _exported(function: Callable[..., Any]) -> Any:
    """A function for Ray, which sends it to its workers once."""
    return ray.remote(function)


def _outcome(reference: Any) -> Any:
    """What a task returned; the RayError if it was lost."""
    try:
        return ray.get(reference)
    except (RayTaskError, TaskCancelledError):
        raise
    except RayError as error:
        return error


def result_of(answer: _Answer) -> Any:
    """What came back from a worker, with what it warned of; raises what it raised."""
    for level, text in answer.said:
        _log.log(level, "%s", text)
    if answer.error is not None:
        raise answer.error
    return answer.value


def _where(node: dict[str, Any]) -> str:
    return f"node {node['NodeManagerHostname']} ({node['NodeManagerAddress']}) of the Ray cluster"


def _answer_of(reference: Any, node: dict[str, Any], folder: str) -> str | None:
    """What a node's probe says: the version of untwin; None if the node is gone."""
    try:
        return str(result_of(ray.get(reference, timeout=_PROBE_SECONDS)))
    except GetTimeoutError:
        raise ResourceError(
            f"{_where(node)} did not answer within {_PROBE_SECONDS:.0f} s whether it sees {redact(folder)}"
        ) from None
    except RayError as error:
        if "No module named" in str(error):
            raise ResourceError(
                f"{_where(node)} cannot run untwin ({first_line(error)}); install untwin {_version()} there, with "
                "the same extras as here"
            ) from error
        if node["NodeID"] not in {other["NodeID"] for other in _working_nodes()}:
            return None
        raise _lost(f"the look from {_where(node)} at {redact(folder)}", error) from error


def _lost(what: str, error: RayError) -> ResourceError:
    return ResourceError(f"{what}: failed on the Ray cluster ({type(error).__name__}: {first_line(error)})")


def first_line(error: BaseException) -> str:
    """The line of a long message that says most."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "No module named" in line), lines[0] if lines else type(error).__name__)


def _cancel(references: Sequence[Any], *, interrupted: bool) -> None:
    """Interrupt tasks, so that they leave no half-written file; those that do not stop are killed.

    A Ray that was started here is ended on an interrupt: a terminal sends that to its workers, too, and where a task is
    cancelled that just goes to a worker, Ray 2.60 ends this process with a failed check of its own.
    """
    if interrupted and _is_own():
        ray.shutdown()
        return
    for reference in references:
        with contextlib.suppress(Exception):
            ray.cancel(reference, recursive=True)
    with contextlib.suppress(Exception):
        _, running = ray.wait(list(references), num_returns=len(references), timeout=_CANCEL_SECONDS)
        for reference in running:
            ray.cancel(reference, force=True, recursive=True)


_started: set[str] = set()
"""Where the clusters listen that this process has started."""


def _is_own() -> bool:
    return bool(_started) and ray.get_runtime_context().gcs_address in _started

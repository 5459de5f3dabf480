"""The Xenna backend, for those who come from NeMo Curator: chains of stages as pipelines of cosmos-xenna, on Ray.

A chain is one Xenna stage, whose workers take a unit through all stages of ours. As stages of Xenna they would be in
processes of their own: what a unit hands over in memory (`storage.partitions`) would not arrive, and each would want
CPUs at the same time as the others.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from untwin.backends.base import Crew, Progress
from untwin.backends.chain import Chain
from untwin.errors import MissingExtraError, ParameterError, ResourceError
from untwin.stages.base import Stage, Task

os.environ.setdefault("PYTHON_LOG", "error")  # Xenna's log is about its actors, and is set up when it is imported
try:
    import ray
    from cosmos_xenna.pipelines import v1
    from cosmos_xenna.pipelines.private import monitoring
except ImportError as error:
    raise MissingExtraError(
        "the Xenna backend needs packages that are not installed: pip install 'untwin[xenna]'"
    ) from error

from untwin.backends.ray import TRIES, RayExecutor, cluster_nodes, first_line, result_of, work_on

_log = logging.getLogger("untwin")
_ray_log = logging.getLogger("ray._private")


class XennaExecutor(RayExecutor):
    """Runs the stages between two barriers as one or two Xenna pipelines: units with a worker's share, and larger ones.

    What is said of `RayExecutor` holds, with three exceptions: units declare CPUs, but no memory; a unit is never
    spread over several nodes; nodes that join get work from the next chain on.

    Args:
        address: Of a running Ray cluster, as for `RayExecutor`, but not through its client server (`ray://…`).
        workers: Most units at a time; default: the CPUs of the cluster.
        memory: Budget in bytes for the data in work on each node; default: half of what the smallest node has.

    Raises:
        MissingExtraError: cosmos-xenna or Ray is not installed, or too old.
        ParameterError: An address of a client server.
        ResourceError: The cluster cannot be reached.
    """

    name = "xenna"
    n_lost = 1
    """Xenna 0.5 does not tell of workers that it lost; each may have left a file half written."""

    def __init__(self, address: str | None = None, workers: int | None = None, memory: int | None = None) -> None:
        address = address or os.environ.get("RAY_ADDRESS") or None
        if address is not None and address.startswith("ray://"):
            raise ParameterError(
                f"ray_address is {address!r}, but Xenna cannot work through Ray's client server; start the job on a "
                "machine of the cluster with the address 'auto', or take the backend 'ray'"
            )
        super().__init__(address, workers, memory)

    @contextmanager
    def at_work(self, stages: Sequence[Stage]) -> Iterator[Crew]:
        """The workers of the cluster, once it is known that they see the storage."""
        _check_nodes()
        self._check_storage(stages)
        yield _Pipelines(self.memory, self._workers, self.units_by_node)


def _check_nodes() -> None:
    """Raise ResourceError if there is a node without CPUs: Xenna asks every node what it has, by a task with one."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    for node in nodes:
        if node["Alive"] and node["Resources"].get("CPU", 0) < 1:
            raise ResourceError(
                f"node {node['NodeManagerHostname']} ({node['NodeManagerAddress']}) of the Ray cluster has no CPUs, "
                "which Xenna cannot do with; start it with --num-cpus=1 or more, or take the backend 'ray'"
            )


class _Pipelines(Crew):
    def __init__(self, memory: int, workers: int | None, units_by_node: Counter[str]) -> None:
        self._memory, self._workers, self._units_by_node = memory, workers, units_by_node

    def run(self, chain: Chain, units: Sequence[Task], progress: Progress) -> None:
        chain.check_memory(units, self._memory)
        nodes = cluster_nodes()
        share = self._memory // nodes.node_cpus
        alone, together = chain.split(units, share, nodes.cpus)
        held = [ray.put(list(chain.stages))]
        for part, n_cpus, memory in ((alone, nodes.node_cpus, self._memory), (together, 1, share)):
            results = _Results(chain, part, progress, self._units_by_node)
            self._run(results, _Units(held, n_cpus, memory, chain.recorded), n_cpus)

    def _run(self, results: _Results, stage: _Units, n_cpus: int) -> None:
        lost: Exception | None = None
        for number in range(TRIES):
            if not results.left:
                return
            if number:
                _log.warning("%s: workers were lost (%s); what they were at is done again", results.name, _told(lost))
            nodes = cluster_nodes()
            slots = nodes.cpus if n_cpus == 1 else nodes.count
            if self._workers is not None:
                slots = max(1, min(slots, self._workers // n_cpus))
            lost = _run_pipeline(stage, results, min(slots, len(results.left)))
        if results.left:
            what = f"{results.name}: the last of {TRIES} pipelines of Xenna failed with units left"
            raise ResourceError(f"{what} ({len(results.left)}; {_told(lost)})") from lost


def _told(lost: Exception | None) -> str:
    return f"{type(lost).__name__}: {first_line(lost)}" if lost else "it has given them up"


class _Results:
    """Where Xenna puts what comes of the units, on the thread that runs the pipeline."""

    def __init__(self, chain: Chain, units: Sequence[Task], progress: Progress, units_by_node: Counter[str]) -> None:
        self.name = f"stage {chain.stages[0].name}"
        self.left = {unit.unit: unit for unit in units}
        self.failure: Exception | None = None
        self._chain, self._progress, self._units_by_node = chain, progress, units_by_node

    def put(self, result: tuple[int, Any], block: bool = True, timeout: float | None = None) -> None:
        """Take what came of a unit."""
        number, outcome = result
        try:
            node, done = result_of(outcome)
            unit = self.left.pop(number)
            self._chain.add(unit, done)
            self._progress.advance(unit.n_rows)
        except Exception as error:
            self.failure = error
            raise
        self._units_by_node[node] += 1


def _run_pipeline(stage: _Units, results: _Results, n_workers: int) -> Exception | None:
    """Do what is left as a pipeline of Xenna; gives the error that ended it early, if it was none of a unit."""
    config = v1.PipelineConfig(
        slots_per_actor=1,
        cpu_allocation_percentage=1.0,  # of two CPUs, the default would leave one
        actor_pool_verbosity_level=v1.VerbosityLevel.NONE,
        monitoring_verbosity_level=v1.VerbosityLevel.NONE,
        mode_specific=v1.StreamingSpecificSpec(executor_verbosity_level=v1.VerbosityLevel.NONE),
    )
    spec = v1.PipelineSpec(
        list(results.left.values()),
        [v1.StageSpec(stage, num_workers=n_workers)],
        config,
        serving_queues=v1.ServingQueues(None, results),
    )
    try:
        with _xenna_at_work():
            v1.run_pipeline(spec)
    except Exception as error:
        if results.failure is not None:
            raise results.failure from None
        return error
    return None


@contextmanager
def _xenna_at_work() -> Iterator[None]:
    monitor, level = monitoring.PipelineMonitor, _ray_log.level
    monitoring.PipelineMonitor = _Monitor
    _ray_log.setLevel(logging.ERROR)  # Xenna initialises Ray for each pipeline, and Ray says that it is already
    try:
        yield
    finally:
        monitoring.PipelineMonitor = monitor
        _ray_log.setLevel(level)


class _Monitor:
    """In the place of Xenna's own, which starts an actor on each node and needs Ray's dashboard, in order to log.

    It stops the workers at the end, also of a pipeline that failed: Xenna 0.3 leaves them running.
    """

    def __init__(self, interval: float, n_units: int, pools: Sequence[Any], verbosity: Any) -> None:
        self._pools = pools

    def __enter__(self) -> _Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        for pool in self._pools:
            pool.stop()

    def update(self, *_: object) -> bool:
        """Log nothing."""
        return False


def _end_with_main_thread() -> None:
    threading.main_thread().join()
    os._exit(0)


class _Units(v1.Stage):  # type: ignore[misc]
    """A chain, as Xenna sees it.

    Args:
        held: A reference to the stages.
        n_cpus: CPUs and threads of a worker.
        memory: Bytes that a worker's unit may use.
        recorded: Note which files are written.
    """

    def __init__(self, held: list[Any], n_cpus: int, memory: int, recorded: bool) -> None:
        self._held, self._n_cpus, self._memory, self._recorded = held, n_cpus, memory, recorded

    def __deepcopy__(self, _: dict[int, Any]) -> _Units:
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Arrive in a worker. In Xenna 0.3 it has threads that would keep its process alive for ever."""
        self.__dict__.update(state)
        threading.Thread(target=_end_with_main_thread, daemon=True).start()

    @property
    def required_resources(self) -> Any:
        return v1.Resources(cpus=self._n_cpus)

    @property
    def env_info(self) -> Any:
        return v1.RuntimeEnv(extra_env_vars={"PYTHON_LOG": os.environ["PYTHON_LOG"]})

    def setup(self, worker_metadata: Any) -> None:
        """Keep Ray from telling the user how Xenna might call it better."""
        _ray_log.setLevel(logging.ERROR)

    def process_data(self, in_data: list[Task]) -> list[tuple[int, Any]]:
        """Do units. Failures are values: Xenna would end the pipeline with an error of its own."""
        return [
            (unit.unit, work_on(self._held, unit, self._n_cpus, self._memory, 0, self._recorded)) for unit in in_data
        ]

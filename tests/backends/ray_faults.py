"""A Ray cluster on the loopback address, and units that get killed or stuck on it. No tests here.

Run as a program it is `untwin` with a victim in one chain: `ray_faults.py MARKS HOW CHAIN ARGUMENT...`.
"""

import contextlib
import functools
import json
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import untwin.plan
from untwin.stages.base import Stage, Task

os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import ray
from ray.cluster_utils import Cluster

from untwin.backends import ray as backend

NODE = {"num_cpus": 1, "memory": 2 << 30, "object_store_memory": 80 << 20, "node_ip_address": "127.0.0.1"}
FILE_OPERATIONS = ("open", "os.rename", "os.mkdir")
STUCK_SECONDS = 90


def environment():
    """The variables with which other processes find the modules of these tests."""
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, folders))}


@contextlib.contextmanager
def cluster_of(n_nodes):
    """A head without CPUs and so many nodes with one each."""
    head = {**NODE, "num_cpus": 0, "include_dashboard": False}
    with mock.patch.dict(os.environ, environment()):
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            for _ in range(n_nodes):
                cluster.add_node(**NODE)
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


_keeper = ThreadPoolExecutor(1)


def add_node(cluster):
    """Add a node from any thread.

    It ends with the thread that has started it, and Ray's own handlers of signals can be set by the main thread only.
    """
    with mock.patch("ray._private.utils.set_sigterm_handler"):
        return _keeper.submit(cluster.add_node, **NODE).result()


def make_units_small(patch=setattr):
    """A small input has many units."""
    patch(untwin.plan, "_MIN_UNIT_BYTES", 1 << 14)
    patch(untwin.plan, "_MAX_UNIT_BYTES", 1 << 14)
    patch(untwin.plan, "_ROWS_PER_PARTITION", 256)


def with_victims(marks, how, chains=None, operation=3):
    """The function that runs a unit on a worker; the first unit of each chain (or of these) meets its fate.

    Args:
        marks: Folder for a file about each victim: its process and node.
        how: `kill`: by SIGKILL; `stuck`: it does not go on, and leaves a heartbeat.
        chains: Names; None for all.
        operation: It happens before this file operation of the unit, or at its end if there are fewer.
    """
    marks, real = str(marks), backend.work_on

    def work_on(held, unit, n_threads, memory, spread_memory, recorded):
        name = ray.get_runtime_context().get_task_name().split()[0]
        path = f"{marks}/{name}.json"

        def run():
            return real(held, unit, n_threads, memory, spread_memory, recorded)

        if chains is not None and name not in chains:
            return run()
        try:
            mark = open(path, "x")  # noqa: PTH123, SIM115
        except FileExistsError:
            return run()
        import ray_faults

        with mark:
            json.dump({"pid": os.getpid(), "node": ray.get_runtime_context().get_node_id()}, mark)
        meet = functools.partial(getattr(ray_faults, f"meet_{how}"), f"{path}.met")
        ray_faults.at_operation(operation, meet)
        result = run()
        meet()
        return result

    return work_on


def at_operation(number, function):
    """Call a function in the midst of this thread's so many-th file operation, once."""
    left = number

    def hook(event, arguments):
        nonlocal left
        if event in FILE_OPERATIONS and isinstance(arguments[0], str | Path) and "/out" in str(arguments[0]):
            left -= 1
            if left == 0:
                function()

    sys.addaudithook(hook)


def meet_kill(path):
    Path(path).touch()
    os.kill(os.getpid(), signal.SIGKILL)


def meet_stuck(path):
    for _ in range(10 * STUCK_SECONDS):
        Path(path).write_text(str(time.time()))
        time.sleep(0.1)


class Pieces(Stage):
    """Units that do something; data, so that it can be sent."""

    name = "pieces"

    def __init__(self, n_units, action, *arguments):
        self.n_units, self.action, self.arguments = n_units, action, arguments

    def units(self, upstream):
        return [Task(unit, 1) for unit in range(self.n_units)]

    def memory(self, task):
        return 1 << 20

    def process(self, task, context):
        self.action(task, context, *self.arguments)
        return task


def main():
    from untwin.cli import main as command

    marks, how, chain, *arguments = sys.argv[1:]
    # a shell that starts its commands in the background has them ignore interrupts, and children inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)
    make_units_small()
    backend.work_on = with_victims(marks, how, [chain])
    command(arguments)


if __name__ == "__main__":
    main()

"""Measures `untwin run` on a Ray cluster of this machine against the threads of one process, on the same files.

    python benchmarks/backends.py --rows 1000000 --tile --repeat 3

The cluster is started before, and a first run on each backend is not counted. Then both run in alternating order, each
in a process of its own, with as many workers: the ratio is the median of those of the pairs. The overhead of a unit of
work is that of units that do nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import generate
from end_to_end import paired, summary, work_folders
from measure import UNTWIN, cores, environment, introduce, print_table, save, show_bytes
from untwin.backends.ray import RayExecutor
from untwin.stages.base import Context, Stage, Task, Upstream

_EMPTY_UNITS = 2000


class Nothing(Stage):
    """Units that do nothing."""

    name = "nothing"

    def units(self, upstream: Upstream) -> list[Task]:
        return [Task(unit, 1) for unit in range(_EMPTY_UNITS)]

    def process(self, task: Task, context: Context) -> Task:
        return task


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextlib.contextmanager
def cluster(n_cpus: int) -> Iterator[str]:
    """A Ray cluster on this machine; its address."""
    port = free_port()
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--node-ip-address=127.0.0.1"]
    command += [f"--port={port}", f"--num-cpus={n_cpus}", "--include-dashboard=false", "--disable-usage-stats"]
    # `ray stop` would stop the clusters of others, too; with --block it is one process to end
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def unit_seconds(address: str) -> float:
    """What a unit costs that does nothing."""
    executor = RayExecutor(address)
    executor.execute([Nothing()])  # the workers' first imports
    started = time.perf_counter()
    executor.execute([Nothing()])
    return (time.perf_counter() - started) / _EMPTY_UNITS


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    generate.add_arguments(parser, 1_000_000)
    parser.add_argument("--layout", choices=generate.LAYOUTS, default="zstd", help="(%(default)s)")
    parser.add_argument("--eps", type=float, default=0.05, help="(%(default)s)")
    parser.add_argument("--workers", type=int, default=cores(), help="threads, and CPUs of the cluster (%(default)s)")
    parser.add_argument("--repeat", type=int, default=3, help="pairs (%(default)s)")
    parser.add_argument("--workdir", type=Path, help="folder for data, kept (default: temporary, removed)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save all figures here")
    arguments = parser.parse_args()
    introduce()
    with work_folders(arguments.workdir) as (workdir, outputs), cluster(arguments.workers) as address:
        source = generate.prepare(workdir, arguments.layout, arguments)
        every = {}
        for name, options in (("local", []), ("ray", ["--ray-address", address])):
            target = outputs / name
            command = [*UNTWIN, "run", str(source), str(target), "--eps", str(arguments.eps), "--json"]
            command += ["--backend", name, "--workers", str(arguments.workers), *options]
            every[name] = (command, target)
        paired(every, 1, "not counted:")
        runs, _ = paired(every, arguments.repeat, "")
        each = unit_seconds(address)
    # what reports say is without the start of Python, and without connecting to the cluster
    times = {name: [run.report["seconds"] for run in measured] for name, measured in runs.items()}
    ratios = [ray / local for local, ray in zip(times["local"], times["ray"], strict=True)]
    lines = [
        [name, f"{statistics.median(times[name]):.2f}", show_bytes(max(run.peak_bytes for run in measured))]
        for name, measured in runs.items()
    ]
    print_table(["backend", "seconds", "memory of the driver"], lines)
    print(f"ray / local: {statistics.median(ratios):.2f}")
    units = sum(stage["units"] for stage in runs["ray"][0].report["stages"])
    print(f"a unit that does nothing: {1e3 * each:.2f} ms; the run had {units} units in its stages")
    figures = {name: summary(measured) for name, measured in runs.items()}
    save(arguments.json, vars(arguments), {**figures, "times": times, "unit_seconds": each})


if __name__ == "__main__":
    main()

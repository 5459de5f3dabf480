"""Measures how a group of clusters is read out of many shards: requests, bytes, time; on the disk and on S3.

    python benchmarks/shuffle.py --shards 48 --groups 64 --slice 256 --latency 30

Makes shards of as many slices as there are groups, --slice KiB each, on the local disk and on an S3 server on
loopback (moto) behind a proxy that counts requests and answers each --latency milliseconds late. Some groups are then
read out of all of them in two ways: with `Slices`, as the stages do, and, as the baseline, out of the same rows as
Arrow files with a record batch for each group, each opened for its batch. Proxy, server and client share the machine,
so times say how much of the latency adds up, and no more.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from measure import introduce, print_table, save
from untwin.storage.columns import vector_array
from untwin.storage.files import Storage, join
from untwin.storage.shards import Slices, make_shard, shard_schema, write_shard

DIM = 512
KEYS = {"key": "shuffle", "secret": "shuffle"}


def serve(connection: Connection, latency: float) -> None:
    """Run server and proxy; answers "reset" with nothing, and anything else with (kind, range) of each request."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests/s3"))
    import logging

    from moto.server import ThreadedMotoServer
    from proxy import Proxy

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with Proxy(f"http://{host}:{port}", delay=latency) as proxy:
        connection.send((proxy.url, f"http://{host}:{port}"))
        while (wanted := connection.recv()) != "end":
            if wanted == "reset":
                proxy.reset(lambda _: "delay")
            connection.send([(entry.request.kind, entry.request.query) for entry in proxy.log])
    server.stop()


def write(storage: Storage, folder: str, n_shards: int, n_groups: int, rows: int) -> list[str]:
    """Write shards both ways."""
    rng = np.random.default_rng(0)
    group_of = np.arange(n_groups, dtype=np.int32)
    for number in range(n_shards):
        labels = rng.permutation(np.repeat(group_of, rows))
        vectors = rng.normal(size=(len(labels), DIM)).astype(np.float32)
        side = pa.table({"id": [f"{number}-{at}" for at in range(len(labels))]})
        shard = make_shard(side, vectors, labels, group_of, n_groups)
        write_shard(storage, join(folder, f"{number:06d}.arrow"), shard)
        schema = shard_schema(side.schema, DIM)
        path = join(folder, "plain", f"{number:06d}.arrow")
        with storage.writing(path) as sink, pa.ipc.new_file(sink, schema) as writer:
            for group in range(n_groups):
                part = shard.group(group)
                arrays = [*part.columns.columns, pa.array(part.labels), vector_array(vectors[part.at])]
                writer.write_batch(pa.record_batch(arrays, schema=schema))
    return [f"{number:06d}.arrow" for number in range(n_shards)]


def readers(storage: Storage, folder: str, names: list[str], n_groups: int) -> dict[str, Callable[[int], int]]:
    """Both ways to read a group; each gives the number of its rows."""
    slices = Slices(tuple(join(folder, name) for name in names), n_groups, join(folder, "_index.starts"))
    slices.collect(storage)

    def plainly(group: int) -> Iterator[int]:
        for name in names:
            with storage.open(join(folder, "plain", name)) as source, pa.ipc.open_file(source) as reader:
                yield reader.get_batch(group).num_rows

    return {
        "slices": lambda group: sum(len(part) for part in slices.rows(storage, group)),
        "batches": lambda group: sum(plainly(group)),
    }


def measured(read: Callable[[int], int], groups: range, repeat: int, expected: int) -> tuple[float, float]:
    """Least wall time and CPU time of this process for a group."""
    best = [float("inf")] * 2
    for _ in range(repeat):
        wall, cpu = time.perf_counter(), time.process_time()
        for group in groups:
            assert read(group) == expected
        best = [
            min(best[0], time.perf_counter() - wall),
            min(best[1], time.process_time() - cpu),
        ]
    return best[0] / len(groups), best[1] / len(groups)


def requested(log: list[tuple[str, str]], size: int) -> int:
    """Bytes that the ranges of GET requests asked for, of objects of a size."""
    total = 0
    for kind, query in log:
        found = re.search(r"bytes=(\d+)-(\d+)", query)
        if kind == "GET" and found:
            total += min(size, int(found[2]) + 1) - int(found[1])
    return total


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=48)
    parser.add_argument("--groups", type=int, default=64)
    parser.add_argument("--slice", type=int, default=256, help="KiB of vectors")
    parser.add_argument("--latency", type=float, default=30, help="milliseconds")
    parser.add_argument("--read", type=int, default=3, help="groups that are read")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()
    introduce()
    rows = max(1, (arguments.slice << 10) // (4 * DIM))
    groups = range(1, 1 + arguments.read)
    expected = rows * arguments.shards
    found: list[dict[str, Any]] = []

    folder = tempfile.mkdtemp()
    try:
        names = write(Storage(), folder, arguments.shards, arguments.groups, rows)
        size = (Path(folder) / names[0]).stat().st_size
        for way, read in readers(Storage(), folder, names, arguments.groups).items():
            wall, cpu = measured(read, groups, arguments.repeat, expected)
            found.append({"where": "disk", "way": way, "seconds": wall, "cpu_seconds": cpu})
    finally:
        shutil.rmtree(folder)

    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs, arguments.latency / 1000))
    server.start()
    try:
        proxy_url, direct_url = ours.recv()
        bucket = f"shuffle-{uuid.uuid4().hex[:8]}"
        direct = Storage({**KEYS, "endpoint_url": direct_url})
        direct._fs(f"s3://{bucket}").mkdir(bucket)
        write(direct, f"s3://{bucket}/x", arguments.shards, arguments.groups, rows)
        storage = Storage({**KEYS, "endpoint_url": proxy_url})
        for way, read in readers(storage, f"s3://{bucket}/x", names, arguments.groups).items():
            ours.send("reset")
            ours.recv()
            repeat = arguments.repeat if way == "slices" else 1
            wall, cpu = measured(read, groups, repeat, expected)
            ours.send("log")
            log = ours.recv()
            reads = len(groups) * repeat * len(names)
            found.append(
                {
                    "where": f"S3, {arguments.latency:g} ms",
                    "way": way,
                    "seconds": wall,
                    "cpu_seconds": cpu,
                    "requests": len(log) / reads,
                    "bytes": requested(log, size) / reads,
                }
            )
        ours.send("end")
    finally:
        server.join(10)
        server.terminate()
    print_table(
        ["where", "way", "seconds a group", "CPU ms a slice", "requests a slice", "KiB a slice"],
        [
            [
                row["where"],
                row["way"],
                f"{row['seconds']:.3f}",
                f"{1000 * row['cpu_seconds'] / arguments.shards:.2f}",
                f"{row['requests']:.2f}" if "requests" in row else "",
                f"{row['bytes'] / 1024:,.0f}" if "bytes" in row else "",
            ]
            for row in found
        ],
    )
    save(arguments.json, vars(arguments), found)


if __name__ == "__main__":
    main()

"""The shuffle: rows of an input unit sorted by cluster in one file, with a record batch for each group of clusters.

A reader of a group of clusters takes that group's batch out of every shard, so the number of files grows with the
units of input and not with the number of clusters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
from numpy.typing import NDArray

from untwin.storage.columns import matrix_of, vector_array
from untwin.storage.files import Storage, note_held
from untwin.storage.inputs import naming_file
from untwin.storage.memory import space, whole_bytes

_COPIED_ROWS = 256
"""So that what lies between two copies stays in a core's own cache."""


@dataclass(frozen=True)
class GroupRows:
    """Rows of a group of clusters from one shard, in the order of the clusters.

    Attributes:
        columns: n rows: everything but the vectors and the cluster.
        labels: (n,) int32, the cluster of each row.
        vectors: (m, D) float32, vectors of these rows and others.
        at: (n,) which of the vectors are theirs.
    """

    columns: pa.RecordBatch
    labels: NDArray[np.int32]
    vectors: NDArray[np.float32]
    at: NDArray[np.int64]

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.at)

    def take(self, chosen: NDArray[np.int64]) -> GroupRows:
        """Some of the rows."""
        return GroupRows(self.columns.take(pa.array(chosen)), self.labels[chosen], self.vectors, self.at[chosen])

    def copy_vectors(self, out: NDArray[np.float32], places: NDArray[np.int64]) -> None:
        """Copy each vector to its place in (k, D) `out`."""
        for low in range(0, len(self), _COPIED_ROWS):
            rows = slice(low, low + _COPIED_ROWS)
            out[places[rows]] = self.vectors[self.at[rows]]


@dataclass(frozen=True)
class Shard:
    """The rows of a shard in memory: n rows with what belongs to each.

    Attributes:
        columns: Everything but the vectors and the cluster.
        vectors: (n, D) float32.
        labels: (n,) int32, the cluster of each row.
        order: (n,) the rows sorted by cluster.
        bounds: (g + 1,) where each group of clusters begins in `order`.
    """

    columns: pa.Table
    vectors: NDArray[np.float32]
    labels: NDArray[np.int32]
    order: NDArray[np.int64]
    bounds: NDArray[np.int64]

    @property
    def n_bytes(self) -> int:
        """Bytes in memory."""
        return whole_bytes(self.vectors) + int(self.labels.nbytes + self.order.nbytes + self.columns.nbytes)

    def group(self, number: int) -> GroupRows:
        """The rows of a group of clusters."""
        chosen = self.order[self.bounds[number] : self.bounds[number + 1]]
        (columns,) = self.columns.take(pa.array(chosen)).combine_chunks().to_batches() or [
            pa.RecordBatch.from_pylist([], self.columns.schema)
        ]
        return GroupRows(columns, self.labels[chosen], self.vectors, chosen)


def make_shard(
    columns: pa.Table,
    vectors: NDArray[np.float32],
    labels: NDArray[np.int32],
    group_of_cluster: NDArray[np.int32],
    n_groups: int,
) -> Shard:
    """Sort rows by cluster.

    Args:
        columns: n rows: everything but the vectors and the cluster.
        vectors: (n, D) float32.
        labels: (n,) cluster of each row.
        group_of_cluster: (K,) group of each cluster, not decreasing.
        n_groups: Number of groups.
    """
    order = np.argsort(labels, kind="stable")
    bounds = np.searchsorted(group_of_cluster[labels[order]], np.arange(n_groups + 1))
    return Shard(columns.combine_chunks(), vectors, labels, order, bounds)


def write_shard(storage: Storage, path: str, shard: Shard) -> None:
    """Write a shard, a record batch for each group."""
    schema = shard_schema(shard.columns.schema, shard.vectors.shape[1])
    with (
        storage.writing(path) as sink,
        pa.ipc.new_file(sink, schema, options=pa.ipc.IpcWriteOptions(use_threads=False)) as writer,
    ):
        for number in range(len(shard.bounds) - 1):
            rows = shard.group(number)
            arrays = [*rows.columns.columns, pa.array(rows.labels), vector_array(shard.vectors[rows.at])]
            writer.write_batch(pa.record_batch(arrays, schema=schema))


def leave_shard(storage: Storage, path: str, shard: Shard, *, instead_of: str = "") -> None:
    """Hold a shard in memory if there is room, else write it."""
    if space().put(path, shard, shard.n_bytes, instead_of=instead_of, only_copy=True):
        note_held()
    else:
        write_shard(storage, path, shard)


def read_group(storage: Storage, path: str, number: int) -> GroupRows:
    """The rows of a group of clusters out of a shard."""
    held = space().get(path)
    if held is not None:
        rows: GroupRows = held.group(number)
        return rows
    batch = read_batch(storage, path, number)
    columns = batch.drop_columns(["_centroid", "_vector"])
    return GroupRows(
        columns, batch.column("_centroid").to_numpy(), matrix_of(batch.column("_vector")), np.arange(len(batch))
    )


def shard_schema(columns: pa.Schema, dim: int) -> pa.Schema:
    """The schema of a shard: other columns, then the cluster, then the vector."""
    return columns.append(pa.field("_centroid", pa.int32())).append(pa.field("_vector", pa.list_(pa.float32(), dim)))


def read_batch(storage: Storage, path: str, number: int) -> pa.RecordBatch:
    """One record batch of an Arrow file."""
    with open_batches(storage, path) as reader:
        return reader.get_batch(number)


@contextlib.contextmanager
def open_batches(storage: Storage, path: str, columns: Sequence[int] | None = None) -> Iterator[Any]:
    """An Arrow file to read record batches from, or only columns with certain numbers of them."""
    options = pa.ipc.IpcReadOptions(included_fields=columns)
    with naming_file(path), storage.open(path) as source, pa.ipc.open_file(source, options=options) as reader:
        yield reader


def write_batches(storage: Storage, path: str, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """Write record batches that can be read one by one."""
    with storage.writing(path) as sink, pa.ipc.new_file(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)

"""The shuffle: rows of an input unit sorted by group in one file, with a slice for each group of clusters.

A shard is a row of slices, each an Arrow stream of its own or nothing, and beside it lies a small file that says where
they begin. A reader of a group takes that group's slice out of every shard, so the number of files grows with the
units of input and not with the number of clusters. It knows from one index, put together of these small files, where
all its slices are: each costs one ranged read, and those without rows cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.ipc
from numpy.typing import NDArray

from untwin.storage.columns import matrix_of, vector_array
from untwin.storage.files import Storage, note_held
from untwin.storage.inputs import naming_file
from untwin.storage.memory import space, whole_bytes

_COPIED_ROWS = 512
"""So that what lies between two copies stays in a core's own cache."""


class Vectors(Protocol):
    """(n, D) vectors of rows: a NumPy array, or what gives one for some of the rows."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, D)."""

    @property
    def nbytes(self) -> int:
        """Bytes that it holds itself."""

    def take(self, at: NDArray[np.int64], axis: Literal[0], /) -> NDArray[np.float32]:
        """The vectors of some rows, (m, D) float32."""


@dataclass(frozen=True)
class GroupRows:
    """Rows of a group of clusters from one shard, in the order of the clusters.

    Attributes:
        columns: n rows: everything but the vectors and the cluster.
        labels: (n,) int32, the cluster of each row.
        vectors: (m, D), vectors of these rows and others.
        at: (n,) which of the vectors are theirs.
    """

    columns: pa.RecordBatch
    labels: NDArray[np.int32]
    vectors: Vectors
    at: NDArray[np.int64]

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.at)

    def take(self, chosen: NDArray[np.int64]) -> GroupRows:
        """Some of the rows."""
        return GroupRows(self.columns.take(pa.array(chosen)), self.labels[chosen], self.vectors, self.at[chosen])

    def copy_vectors(self, out: NDArray[np.float32], places: NDArray[np.int64]) -> None:
        """Copy each vector to its place in (k, D) `out`."""
        order = np.argsort(self.at)  # ascending, `take` finds them fastest
        for low in range(0, len(self), _COPIED_ROWS):
            rows = order[low : low + _COPIED_ROWS]
            out[places[rows]] = self.vectors.take(self.at[rows], 0)


@dataclass(frozen=True)
class Shard:
    """The rows of a shard in memory: n rows with what belongs to each.

    Attributes:
        columns: Everything but the vectors and the cluster.
        vectors: (n, D).
        labels: (n,) int32, the cluster of each row.
        order: (n,) the rows sorted by cluster.
        bounds: (g + 1,) where each group of clusters begins in `order`.
    """

    columns: pa.Table
    vectors: Vectors
    labels: NDArray[np.int32]
    order: NDArray[np.int64]
    bounds: NDArray[np.int64]

    @property
    def n_bytes(self) -> int:
        """Bytes in memory."""
        vectors = whole_bytes(self.vectors) if isinstance(self.vectors, np.ndarray) else self.vectors.nbytes
        return vectors + int(self.labels.nbytes + self.order.nbytes + self.columns.nbytes)

    def group(self, number: int) -> GroupRows:
        """The rows of a group of clusters."""
        chosen = self.order[self.bounds[number] : self.bounds[number + 1]]
        (columns,) = self.columns.take(pa.array(chosen)).combine_chunks().to_batches() or [
            pa.RecordBatch.from_pylist([], self.columns.schema)
        ]
        return GroupRows(columns, self.labels[chosen], self.vectors, chosen)


def make_shard(
    columns: pa.Table,
    vectors: Vectors,
    labels: NDArray[np.int32],
    group_of_cluster: NDArray[np.int32],
    n_groups: int,
) -> Shard:
    """Sort rows by cluster.

    Args:
        columns: n rows: everything but the vectors and the cluster.
        vectors: (n, D).
        labels: (n,) cluster of each row.
        group_of_cluster: (K,) group of each cluster, not decreasing.
        n_groups: Number of groups.
    """
    order = np.argsort(labels, kind="stable")
    bounds = np.searchsorted(group_of_cluster[labels[order]], np.arange(n_groups + 1))
    return Shard(columns.combine_chunks(), vectors, labels, order, bounds)


def write_shard(storage: Storage, path: str, shard: Shard) -> None:
    """Write a shard, a slice for each group."""
    schema = shard_schema(shard.columns.schema, shard.vectors.shape[1])

    def batches() -> Iterator[pa.RecordBatch]:
        for number in range(len(shard.bounds) - 1):
            rows = shard.group(number)
            arrays = [*rows.columns.columns, pa.array(rows.labels), vector_array(shard.vectors.take(rows.at, 0))]
            yield pa.record_batch(arrays, schema=schema)

    write_slices(storage, path, batches())


def leave_shard(storage: Storage, path: str, shard: Shard, *, instead_of: str = "") -> None:
    """Hold a shard in memory if there is room, else write it."""
    if space().put(path, shard, shard.n_bytes, instead_of=instead_of, only_copy=True):
        note_held()
    else:
        write_shard(storage, path, shard)


def shard_schema(columns: pa.Schema, dim: int) -> pa.Schema:
    """The schema of a shard: other columns, then the cluster, then the vector."""
    return columns.append(pa.field("_centroid", pa.int32())).append(pa.field("_vector", pa.list_(pa.float32(), dim)))


def write_slices(storage: Storage, path: str, batches: Iterable[pa.RecordBatch]) -> None:
    """Write a slice for each batch, and beside the file where they begin."""
    starts, rows = [0], [0]
    with storage.writing(path) as sink:
        for batch in batches:
            if batch.num_rows:
                with pa.ipc.new_stream(sink, batch.schema, options=pa.ipc.IpcWriteOptions(use_threads=False)) as writer:
                    writer.write_batch(batch)
            starts.append(sink.tell())
            rows.append(rows[-1] + batch.num_rows)
    storage.write_bytes(_starts_path(path), np.array([starts, rows], np.int64).tobytes())


@dataclass(frozen=True)
class Slices:
    """The slices of many shards.

    Attributes:
        paths: The shards, in order; each is a file or held in memory.
        n_groups: Slices of each.
        index_path: (n_groups + 1, shards) int64, where the slices of all shards begin, slice by slice.
    """

    paths: tuple[str, ...]
    n_groups: int
    index_path: str

    def collect(self, storage: Storage) -> NDArray[np.int64]:
        """Write the index; returns the rows of each group, shape (n_groups,)."""
        index = np.zeros((self.n_groups + 1, len(self.paths)), np.int64)
        rows = np.zeros(self.n_groups, np.int64)
        held = [space().get(path) for path in self.paths]
        size = 2 * index.itemsize * len(index)
        places = [number for number, shard in enumerate(held) if shard is None]
        buffers = storage.read_ranges([(_starts_path(self.paths[number]), 0, size) for number in places])
        for number, buffer in zip(places, buffers, strict=True):
            starts, before = np.frombuffer(buffer, np.int64).reshape(2, -1)
            index[:, number] = starts
            rows += np.diff(before)
        for shard in held:
            if shard is not None:
                rows += np.diff(shard.bounds)
        if places:
            with storage.writing(self.index_path) as sink:
                sink.write(index.data)
        return rows

    def read(self, storage: Storage, group: int) -> Iterator[tuple[str, pa.Buffer | Shard]]:
        """For each shard that has rows of a group, in order: its path, and the slice or the shard that is held."""
        held = [space().get(path) for path in self.paths]
        starts, ends = self._bounds(storage, group) if None in held else np.zeros((2, len(held)), np.int64)
        in_files = [shard is None and end > start for shard, start, end in zip(held, starts, ends, strict=True)]
        buffers = storage.read_ranges(
            [
                (path, int(start), int(end - start))
                for path, start, end, wanted in zip(self.paths, starts, ends, in_files, strict=True)
                if wanted
            ]
        )
        for path, shard, wanted in zip(self.paths, held, in_files, strict=True):
            if wanted:
                yield path, next(buffers)
            elif shard is not None and shard.bounds[group] < shard.bounds[group + 1]:
                yield path, shard

    def _bounds(self, storage: Storage, group: int) -> NDArray[np.int64]:
        """Where the group's slice of each shard begins and ends, (2, shards)."""
        width = 8 * len(self.paths)
        (buffer,) = storage.read_ranges([(self.index_path, width * group, 2 * width)])
        return np.frombuffer(buffer, np.int64).reshape(2, -1)

    def batches(self, storage: Storage, group: int) -> Iterator[pa.RecordBatch]:
        """The rows of a group out of each shard in a file that has some, in order."""
        for path, part in self.read(storage, group):
            yield _batch(path, part)

    def rows(self, storage: Storage, group: int) -> Iterator[GroupRows]:
        """The rows of a group of clusters out of each shard that has some, in order."""
        for path, part in self.read(storage, group):
            if isinstance(part, Shard):
                yield part.group(group)
                continue
            batch = _batch(path, part)
            # copied: they outlive the vectors, which would stay in memory with them
            columns = batch.drop_columns(["_centroid", "_vector"]).take(pa.array(np.arange(len(batch))))
            labels = batch.column("_centroid").to_numpy().copy()
            yield GroupRows(columns, labels, matrix_of(batch.column("_vector")), np.arange(len(batch)))


def _starts_path(path: str) -> str:
    return path.removesuffix(".arrow") + ".starts"


def _batch(path: str, part: pa.Buffer) -> pa.RecordBatch:
    with naming_file(path), pa.ipc.open_stream(part) as reader:
        return reader.read_next_batch()

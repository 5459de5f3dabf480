"""The shuffle: rows of an input unit sorted by cluster in one file, with a record batch for each group of clusters.

A reader of a group of clusters takes that group's batch out of every shard, so the number of files grows with the
units of input and not with the number of clusters.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.ipc
from numpy.typing import NDArray

from untwin.storage.columns import vector_array
from untwin.storage.files import Storage
from untwin.storage.inputs import naming_file


def write_shard(
    storage: Storage,
    path: str,
    columns: pa.Table,
    vectors: NDArray[np.float32],
    labels: NDArray[np.int32],
    group_of_cluster: NDArray[np.int32],
    n_groups: int,
) -> NDArray[np.int64]:
    """Write one shard.

    Args:
        storage: Where to.
        path: Final name.
        columns: n rows: everything but the vectors and the cluster.
        vectors: (n, D) float32.
        labels: (n,) cluster of each row.
        group_of_cluster: (K,) group of each cluster, not decreasing.
        n_groups: Number of groups.

    Returns:
        (K,) rows of each cluster.
    """
    order = np.argsort(labels, kind="stable")
    bounds = np.searchsorted(group_of_cluster[labels[order]], np.arange(n_groups + 1))
    schema = shard_schema(columns.schema, vectors.shape[1])
    columns = columns.combine_chunks()
    with (
        storage.writing(path) as sink,
        pa.ipc.new_file(sink, schema, options=pa.ipc.IpcWriteOptions(use_threads=False)) as writer,
    ):
        for group in range(n_groups):
            chosen = order[bounds[group] : bounds[group + 1]]
            part = columns.take(pa.array(chosen)).combine_chunks().to_batches()
            arrays = [column for batch in part for column in batch.columns] or [
                pa.array([], field.type) for field in columns.schema
            ]
            arrays += [pa.array(labels[chosen], pa.int32()), vector_array(vectors[chosen])]
            writer.write_batch(pa.record_batch(arrays, schema=schema))
    return np.bincount(labels, minlength=len(group_of_cluster)).astype(np.int64)


def shard_schema(columns: pa.Schema, dim: int) -> pa.Schema:
    """The schema of a shard: other columns, then the cluster, then the vector."""
    return columns.append(pa.field("_centroid", pa.int32())).append(pa.field("_vector", pa.list_(pa.float32(), dim)))


def read_batch(storage: Storage, path: str, number: int) -> pa.RecordBatch:
    """One record batch of an Arrow file."""
    with naming_file(path), storage.open(path) as source, pa.ipc.open_file(source) as reader:
        return reader.get_batch(number)


def write_batches(storage: Storage, path: str, schema: pa.Schema, batches: Sequence[pa.RecordBatch]) -> None:
    """Write record batches that can be read one by one."""
    with storage.writing(path) as sink, pa.ipc.new_file(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)

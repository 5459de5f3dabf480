"""Putting the rows of each cluster together: `centroid=K/*.parquet` out of the shards."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from untwin.stages.base import Context, Stage, Upstream
from untwin.stages.clustering import Clustering
from untwin.stages.judging import RejectedRows
from untwin.stages.tasks import CentroidsTask, Cluster, ClustersTask, RepeatsTask, ShardsTask
from untwin.storage.bitmap import byte_range, empty_bitmap, get_bits, set_bits
from untwin.storage.columns import Reason, vector_array
from untwin.storage.files import Writes, join, read_many
from untwin.storage.partitions import ROW, hold, partition_path, read_array, write_partition
from untwin.storage.shards import GroupRows, read_group


class GatherStage(Stage):
    """Reads one group of clusters out of all shards, drops repeated rows, and writes each cluster's rows."""

    name = "gather"
    barrier = True
    splittable = True

    def __init__(self, clustering: Clustering) -> None:
        self.clustering = clustering
        self._shards: tuple[tuple[str, int, int], ...] = ()
        self._repeated: dict[Reason, str] = {}

    def units(self, upstream: Upstream) -> Sequence[ClustersTask]:
        """One unit for each group of clusters; a unit's number is the group's."""
        job = self.clustering
        (model,) = upstream.of(CentroidsTask)
        assigned = upstream.of(ShardsTask)
        self._shards = tuple(shard for task in assigned for shard in task.shards)
        self._collect_repeats([task.path for task in upstream.of(RepeatsTask) if task.n_repeated])
        rows = np.zeros(job.plan.n_clusters, np.int64)
        for task in assigned:
            for cluster, count in task.cluster_rows.items():
                rows[cluster] += count
        units = []
        for group, (low, high) in enumerate(zip(model.group_starts[:-1], model.group_starts[1:], strict=True)):
            clusters = tuple(Cluster(k, int(rows[k]), ()) for k in range(low, high) if rows[k])
            if clusters:
                units.append(ClustersTask(group, sum(c.n_rows for c in clusters), model.dim, clusters))
        return units

    def _collect_repeats(self, paths: Sequence[str]) -> None:
        """Make one bitmap of all repeated rows, and one of those that have another vector."""
        if not paths:
            return
        job = self.clustering
        for reason in (Reason.REPEATED_ROW, Reason.REPEATED_ID):
            bitmap = empty_bitmap(job.plan.n_rows)
            for found in read_many(functools.partial(read_array, job.target), paths):
                rows, codes = np.asarray(found, np.int64)
                set_bits(bitmap, rows[codes == reason])
            if bitmap.any():
                self._repeated[reason] = job.work_file("repeats", f"_{reason.name.lower()}.bits")
                job.target.write_bytes(self._repeated[reason], bitmap.tobytes())

    def scratch(self) -> tuple[str, ...]:
        """The sample, the shards and the hashes of ids."""
        return (self.clustering.work_path,)

    def finish(self) -> None:
        """Remove the shards."""
        self.clustering.target.remove(self.clustering.work_path)

    def memory(self, task: ClustersTask) -> int:
        """The group's rows: as read, in the order of clusters, and on their way into a file."""
        return int(2.5 * 4 * task.dim * task.n_rows) + (32 << 20)

    def minimum_memory(self, task: ClustersTask) -> int:
        """A single cluster can be written shard by shard."""
        if len(task.clusters) == 1:
            return min(self.memory(task), 2 * self.clustering.plan.unit_bytes + (32 << 20))
        return self.memory(task)

    def process(self, task: ClustersTask, context: Context) -> ClustersTask:
        """Write the clusters of a group."""
        job = self.clustering
        rejected = RejectedRows(job.listing.id_type)
        if self.memory(task) <= context.memory or len(task.clusters) > 1:
            clusters = self._write_together(task, rejected)
        else:
            clusters = self._write_one(task, rejected)
        path = join(job.rejected_path, f"repeated-{task.unit:06d}.parquet")
        rejected_path = rejected.write(job.target, path, job.listing)
        return ClustersTask(task.unit, task.n_rows, task.dim, clusters, rejected_path=rejected_path)

    def _write_together(self, task: ClustersTask, rejected: RejectedRows) -> tuple[Cluster, ...]:
        job = self.clustering
        parts = list(self._parts(task.unit, rejected))
        labels = np.concatenate([part.labels for part in parts])
        order = np.argsort(labels, kind="stable")
        labels = labels[order]
        place = np.empty(len(order), np.int64)
        place[order] = np.arange(len(order))
        vectors = np.empty((len(order), task.dim), np.float32)
        filled = 0
        for part in parts:
            part.copy_vectors(vectors, place[filled : filled + len(part)])
            filled += len(part)
        side = pa.Table.from_batches([part.columns for part in parts]).take(pa.array(order)).combine_chunks()
        del parts
        clusters: list[Cluster] = []
        held: dict[str, pa.Table] = {}
        schema = job.partition_schema(task.dim)
        with Writes(job.output_path) as writes:
            for cluster in task.clusters:
                low, high = np.searchsorted(labels, [cluster.centroid, cluster.centroid + 1])
                if low == high:
                    continue
                table = self._partition(side.slice(low, high - low), vectors[low:high], schema)
                path = partition_path(job.output_path, cluster.centroid)
                writes.add(table.nbytes, write_partition, job.target, path, schema, [table])
                held[path] = table
                clusters.append(Cluster(cluster.centroid, int(high - low), (path,)))
        hold(held)
        return tuple(clusters)

    def _write_one(self, task: ClustersTask, rejected: RejectedRows) -> tuple[Cluster, ...]:
        job = self.clustering
        (cluster,) = task.clusters
        path = partition_path(job.output_path, cluster.centroid)
        schema = job.partition_schema(task.dim)
        parts = (
            self._partition(pa.Table.from_batches([part.columns]), part.vectors[part.at], schema)
            for part in self._parts(task.unit, rejected)
            if len(part)
        )
        n_rows = write_partition(job.target, path, schema, parts)
        return (Cluster(cluster.centroid, n_rows, (path,)),)

    def _partition(self, side: pa.Table, vectors: NDArray[np.float32], schema: pa.Schema) -> pa.Table:
        return side.append_column(self.clustering.fields.embedding_field, vector_array(vectors)).select(schema.names)

    def _parts(self, group: int, rejected: RejectedRows) -> Iterator[GroupRows]:
        job = self.clustering
        for path, first_row, end_row in self._shards:
            rows = read_group(job.target, path, group)
            if len(rows) and self._repeated:
                rows = self._without_repeats(rows, first_row, end_row, rejected)
            yield rows

    def _without_repeats(self, rows: GroupRows, first_row: int, end_row: int, rejected: RejectedRows) -> GroupRows:
        numbers = rows.columns.column(ROW).to_numpy()
        reasons = np.zeros(len(numbers), np.uint8)
        for reason, path in self._repeated.items():
            reasons[self._bits(path, first_row, end_row)[numbers - first_row]] = reason
        if not reasons.any():
            return rows
        repeated = np.flatnonzero(reasons)
        ids = rows.columns.column(self.clustering.fields.id_field).take(pa.array(repeated))
        rejected.add(ids, numbers[repeated], reasons[repeated])
        return rows.take(np.flatnonzero(reasons == 0))

    def _bits(self, path: str, first_row: int, end_row: int) -> NDArray[np.bool_]:
        start, length = byte_range(first_row, end_row - first_row)
        part = np.frombuffer(self.clustering.target.read_range(path, start, length), np.uint8)
        return get_bits(part, first_row, end_row - first_row)

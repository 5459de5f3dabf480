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
from untwin.storage.bitmap import bits_of, empty_bitmap, set_bits
from untwin.storage.columns import Reason, vector_array
from untwin.storage.files import Writes, join, read_many
from untwin.storage.partitions import ROW, hold, partition_path, read_array, write_partition
from untwin.storage.shards import GroupRows, Slices


class GatherStage(Stage):
    """Reads one group of clusters out of all shards, drops repeated rows, and writes each cluster's rows."""

    name = "gather"
    barrier = True
    splittable = True

    def __init__(self, clustering: Clustering) -> None:
        self.clustering = clustering
        self._shards = Slices((), 0, "")
        self._repeated: dict[Reason, str] = {}

    def units(self, upstream: Upstream) -> Sequence[ClustersTask]:
        """One unit for each group of clusters; a unit's number is the group's."""
        job = self.clustering
        (model,) = upstream.of(CentroidsTask)
        assigned = upstream.of(ShardsTask)
        paths = tuple(shard for task in assigned for shard in task.shards)
        self._shards = Slices(paths, len(model.group_starts) - 1, job.work_file("shards", "_index.starts"))
        self._shards.collect(job.target)
        self._collect_repeats([task.path for task in upstream.of(RepeatsTask) if task.n_repeated])
        rows = np.zeros(job.plan.n_clusters, np.int64)
        for counts in job.target.read_ranges([(task.counts_path, 0, rows.nbytes) for task in assigned]):
            rows += np.frombuffer(counts, np.int64)
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
        """The group's rows in the order of clusters, slices of shards on their way there, and a cluster into a file."""
        largest = min(task.n_rows, max(cluster.n_rows for cluster in task.clusters))  # an estimate can be larger
        return int(1.2 * 4 * task.dim * (task.n_rows + largest)) + self._bitmap_bytes + (32 << 20)

    @property
    def _bitmap_bytes(self) -> int:
        """Of the rows that repeat an id: a bit for each row, if there are any."""
        return len(self._repeated) * self.clustering.plan.n_rows // 8

    def minimum_memory(self, task: ClustersTask) -> int:
        """A single cluster can be written shard by shard."""
        if len(task.clusters) == 1:
            return min(self.memory(task), 2 * self.clustering.plan.unit_bytes + self._bitmap_bytes + (32 << 20))
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
        n_rows = sum(cluster.n_rows for cluster in clusters)
        return ClustersTask(task.unit, n_rows, task.dim, clusters, rejected_path=rejected_path)

    def _write_together(self, task: ClustersTask, rejected: RejectedRows) -> tuple[Cluster, ...]:
        job = self.clustering
        # where each cluster begins; rows that are set aside leave a gap at its end
        first = task.clusters[0].centroid
        sizes = np.zeros(task.clusters[-1].centroid - first + 1, np.int64)
        for cluster in task.clusters:
            sizes[cluster.centroid - first] = cluster.n_rows
        begin = np.cumsum(sizes) - sizes
        free = begin.copy()
        vectors = np.empty((int(sizes.sum()), task.dim), np.float32)
        sides, places = [], [np.empty(0, np.int64)]
        for part in self._parts(task.unit, rejected):
            at = part.labels - first  # not decreasing
            counts = np.bincount(at, minlength=len(sizes))
            places.append((free - np.cumsum(counts) + counts)[at] + np.arange(len(at)))
            part.copy_vectors(vectors, places[-1])
            free += counts
            sides.append(part.columns)
        order = np.argsort(np.concatenate(places))
        side = pa.Table.from_batches(sides).take(pa.array(order)).combine_chunks()
        del sides, places
        n_rows = free - begin
        clusters: list[Cluster] = []
        held: dict[str, pa.Table] = {}
        schema = job.partition_schema(task.dim)
        with Writes(job.output_path) as writes:
            for cluster in task.clusters:
                number = cluster.centroid - first
                count = int(n_rows[number])
                if not count:
                    continue
                table = self._partition(
                    side.slice(int(n_rows[:number].sum()), count), vectors[begin[number] :][:count], schema
                )
                path = partition_path(job.output_path, cluster.centroid)
                writes.add(table.nbytes, write_partition, job.target, path, schema, [table])
                held[path] = table
                clusters.append(Cluster(cluster.centroid, count, (path,)))
        hold(held)
        return tuple(clusters)

    def _write_one(self, task: ClustersTask, rejected: RejectedRows) -> tuple[Cluster, ...]:
        job = self.clustering
        (cluster,) = task.clusters
        path = partition_path(job.output_path, cluster.centroid)
        schema = job.partition_schema(task.dim)
        parts = (
            self._partition(pa.Table.from_batches([part.columns]), part.vectors.take(part.at, 0), schema)
            for part in self._parts(task.unit, rejected)
            if len(part)
        )
        n_rows = write_partition(job.target, path, schema, parts)
        return (Cluster(cluster.centroid, n_rows, (path,)),)

    def _partition(self, side: pa.Table, vectors: NDArray[np.float32], schema: pa.Schema) -> pa.Table:
        return side.append_column(self.clustering.fields.embedding_field, vector_array(vectors)).select(schema.names)

    def _parts(self, group: int, rejected: RejectedRows) -> Iterator[GroupRows]:
        target = self.clustering.target
        repeated = {reason: np.frombuffer(target.read_bytes(path), np.uint8) for reason, path in self._repeated.items()}
        for rows in self._shards.rows(target, group):
            numbers = rows.columns.column(ROW).to_numpy()
            reasons = np.zeros(len(numbers), np.uint8)
            for reason, bitmap in repeated.items():
                reasons[bits_of(bitmap, numbers)] = reason
            if not reasons.any():
                yield rows
                continue
            aside = np.flatnonzero(reasons)
            ids = rows.columns.column(self.clustering.fields.id_field).take(pa.array(aside))
            rejected.add(ids, numbers[aside], reasons[aside])
            yield rows.take(np.flatnonzero(reasons == 0))

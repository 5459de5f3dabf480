"""Assigning every row to its nearest centroid, and writing the rows sorted by cluster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from untwin.core import NearestCentroid, blocks, hash_rows
from untwin.stages.base import Context, Stage, Task, Upstream
from untwin.stages.clustering import (
    IDS_SEED_1,
    IDS_SEED_2,
    VECTORS_SEED,
    Clustering,
    add_counts,
)
from untwin.stages.ids import hash_ids
from untwin.stages.judging import JudgedRows, JudgedUnit
from untwin.stages.tasks import CentroidsTask, InputTask, ShardsTask
from untwin.storage.files import join
from untwin.storage.memory import space
from untwin.storage.partitions import ROW, read_array
from untwin.storage.shards import leave_shard, make_shard, write_slices

IDS_SCHEMA = pa.schema([("h1", pa.uint64()), ("h2", pa.uint64()), ("vector", pa.uint64()), ("row", pa.int64())])


class AssignStage(Stage):
    """Reads an input unit in bounded batches, and writes its rows as shards sorted by cluster."""

    name = "assign"
    barrier = True

    def __init__(self, clustering: Clustering) -> None:
        self._clustering = clustering
        self._centroids: CentroidsTask | None = None
        self._nearest: NearestCentroid | None = None

    def units(self, upstream: Upstream) -> Sequence[Task]:
        """The plan's input units."""
        (self._centroids,) = upstream.of(CentroidsTask)
        return self._clustering.input_units()

    def memory(self, task: InputTask) -> int:
        """A shard's rows, the part of them that is being written, and batches in flight."""
        job = self._clustering
        dim = self._centroids.dim if self._centroids else job.plan.dim
        shard = 4 * dim * min(task.n_rows, job.plan.unit_rows + job.batch_rows(dim))
        return int(1.3 * shard) + (40 << 20)

    def process(self, task: InputTask, context: Context) -> ShardsTask:
        """Assign a unit."""
        job, model = self._clustering, self._centroids
        assert model is not None
        if self._nearest is None:
            self._nearest = NearestCentroid(np.asarray(read_array(job.target, model.path), np.float32))
        return _Assignment(job, model, self._nearest, task).run()


class _Assignment:
    """One unit: its rows with their clusters, as shards, and what else is known of it."""

    def __init__(self, job: Clustering, facts: CentroidsTask, nearest: NearestCentroid, task: InputTask) -> None:
        self._job, self._facts, self._nearest, self._task = job, facts, nearest, task
        self._group_of = np.repeat(
            np.arange(len(facts.group_starts) - 1, dtype=np.int32), np.diff(np.array(facts.group_starts))
        )
        self._shards: list[str] = []
        self._id_files: list[str] = []
        self._cluster_rows = np.zeros(job.plan.n_clusters, np.int64)
        self._sums = np.zeros(2)

    def run(self) -> ShardsTask:
        job, task = self._job, self._task
        held = job.rows_held(task.unit)
        unit = space().get(held)
        if unit is None or unit.dim != self._facts.dim:
            unit = JudgedUnit(job, task, self._facts.dim)
        for part in unit.parts():
            self._assign(part, held)
        space().drop(held)
        path = join(job.rejected_path, f"invalid-{task.unit:06d}.parquet")
        rejected_path = unit.rejected.write(job.target, path, job.listing)
        counts_path = job.work_file("counts", f"{task.unit:06d}.counts")
        job.target.write_bytes(counts_path, self._cluster_rows.tobytes())
        return ShardsTask(
            unit=task.unit,
            n_rows=task.n_rows,
            shards=tuple(self._shards),
            id_files=tuple(self._id_files),
            counts_path=counts_path,
            n_judged=int(self._cluster_rows.sum()),
            rejected=add_counts(unit.reasons),
            sum_sq_dist=float(self._sums[0]),
            sum_cosine=float(self._sums[1]),
            rejected_path=rejected_path,
        )

    def _assign(self, part: JudgedRows, held: str) -> None:
        """Make a shard of some rows."""
        job = self._job
        name = f"{self._task.unit:06d}-{len(self._shards):04d}.arrow"
        n_rows = len(part.vectors)
        labels = np.empty(n_rows, np.int32)
        distances = np.empty((2, n_rows), np.float32)
        keys = np.empty((4, n_rows), np.uint64)
        ids = part.columns[job.fields.id_field].combine_chunks()
        keys[3] = part.columns[ROW].to_numpy()
        for rows in blocks(n_rows, job.batch_rows(self._facts.dim)):
            vectors = part.vectors[rows]
            labels[rows] = self._nearest.labels(vectors)
            sq_dist, cosine = self._nearest.distances(vectors, labels[rows])
            distances[0, rows], distances[1, rows] = np.sqrt(sq_dist), 1.0 - cosine
            self._sums += sq_dist.sum(), cosine.sum()
            some = ids.slice(rows.start, rows.stop - rows.start)
            keys[0, rows], keys[1, rows] = hash_ids(some, IDS_SEED_1), hash_ids(some, IDS_SEED_2)
            keys[2, rows] = hash_rows(vectors, VECTORS_SEED)
        first, *others = part.columns.columns
        columns = pa.table([first, *distances, *others], schema=pa.schema(job.side_fields))
        path = job.work_file("shards", name)
        stay = part.vectors if part.as_read is None else part.as_read
        shard = make_shard(columns, stay, labels, self._group_of, len(self._facts.group_starts) - 1)
        leave_shard(job.target, path, shard, instead_of=held)
        self._write_keys(job.work_file("ids", name), keys)
        self._cluster_rows += np.bincount(labels, minlength=job.plan.n_clusters)
        self._shards.append(path)

    def _write_keys(self, path: str, keys: NDArray[np.uint64]) -> None:
        parts = self._job.plan.id_partitions
        shift = np.uint64(64 - (parts.bit_length() - 1))
        part = np.zeros(keys.shape[1], np.uint64) if parts == 1 else keys[0] >> shift
        order = np.argsort(part, kind="stable")
        bounds = np.searchsorted(part[order], np.arange(parts + 1))

        def batches() -> Iterator[pa.RecordBatch]:
            for number in range(parts):
                h1, h2, vector, row = keys[:, order[bounds[number] : bounds[number + 1]]]
                yield pa.record_batch([h1, h2, vector, row.view(np.int64)], schema=IDS_SCHEMA)

        write_slices(self._job.target, path, batches())
        self._id_files.append(path)

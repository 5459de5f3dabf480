"""Assigning every row to its nearest centroid, and writing the rows sorted by cluster."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from untwin.core import NearestCentroid, hash_rows, rowwise_dot
from untwin.errors import SchemaError
from untwin.stages.base import Context, Stage, Task, Upstream
from untwin.stages.clustering import (
    IDS_SEED_1,
    IDS_SEED_2,
    VECTORS_SEED,
    Clustering,
    RejectedRows,
    add_counts,
    count_reasons,
    unit_vectors,
)
from untwin.stages.ids import hash_ids
from untwin.stages.tasks import CentroidsTask, InputTask, ShardsTask
from untwin.storage.columns import Reason, decode_vectors
from untwin.storage.files import join
from untwin.storage.partitions import read_array
from untwin.storage.rows import RowBatch, read_rows
from untwin.storage.shards import write_batches, write_shard

IDS_SCHEMA = pa.schema([("h1", pa.uint64()), ("h2", pa.uint64()), ("vector", pa.uint64()), ("row", pa.int64())])


class AssignStage(Stage):
    """Reads an input unit in bounded batches, and writes its rows as shards sorted by cluster."""

    name = "assign"
    barrier = True

    def __init__(self, clustering: Clustering) -> None:
        self._clustering = clustering
        self._centroids: CentroidsTask | None = None
        self._model: _Model | None = None

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
        if self._model is None:
            self._model = _Model(np.asarray(read_array(job.target, model.path), np.float32))
        writer = _ShardWriter(job, model, self._model, task)
        spans = job.listing.spans(task.first_group, task.end_group, job.groups)
        size = job.batch_rows(model.dim)
        for rows in read_rows(job.source, job.listing.format, spans, job.fields.names, size):
            for low in range(0, rows.columns.num_rows, size):
                writer.add(RowBatch(rows.first_row + low, rows.columns.slice(low, size)))
        return writer.finish()


class _Model:
    """The centroids, prepared for assigning."""

    def __init__(self, centroids: NDArray[np.float32]) -> None:
        self.centroids = centroids
        self.norms = np.sqrt(rowwise_dot(centroids, centroids))
        self.nearest = NearestCentroid(centroids)

    def cosine(self, vectors: NDArray[np.float32], labels: NDArray[np.int32]) -> NDArray[np.float64]:
        """Cosine of each row to its centroid, in fixed order; 0 where the centroid is the origin."""
        dots = rowwise_dot(vectors, self.centroids[labels])
        scale = self.norms[labels] * np.sqrt(rowwise_dot(vectors, vectors))
        return np.asarray(np.divide(dots, scale, out=np.zeros_like(dots), where=scale > 0))


class _ShardWriter:
    """Collects judged rows of one unit and writes a shard whenever the buffer is full."""

    def __init__(self, job: Clustering, facts: CentroidsTask, model: _Model, task: InputTask) -> None:
        self._job, self._facts, self._model, self._task = job, facts, model, task
        n_clusters = job.plan.n_clusters
        self._group_of = np.repeat(
            np.arange(len(facts.group_starts) - 1, dtype=np.int32), np.diff(np.array(facts.group_starts))
        )
        capacity = max(1, min(task.n_rows, max(job.plan.unit_rows, job.batch_rows(facts.dim))))
        self._vectors = np.empty((capacity, facts.dim), np.float32)
        self._filled = 0
        self._labels: list[NDArray[np.int32]] = []
        self._sides: list[pa.RecordBatch] = []
        self._keys: list[NDArray[np.uint64]] = []
        self._shards: list[tuple[str, int, int]] = []
        self._id_files: list[str] = []
        self._cluster_rows = np.zeros(n_clusters, np.int64)
        self._rejected = RejectedRows(job.listing.id_type)
        self._reasons: list[dict[str, int]] = []
        self._sums = np.zeros(2)

    def add(self, rows: RowBatch) -> None:
        job = self._job
        fields = job.fields
        ids = job.ids(rows)
        bad_ids = ids.is_null().to_numpy(zero_copy_only=False) if ids.null_count else None
        judged = unit_vectors(decode_vectors(job.embeddings(rows), self._facts.dim), bad_ids)
        wrong = np.flatnonzero(judged.reasons != Reason.OK)
        if len(wrong):
            self._rejected.add(ids.take(pa.array(wrong)), rows.first_row + wrong, judged.reasons[wrong])
            self._reasons.append(count_reasons(judged.reasons))
        count = len(judged.positions)
        if count == 0:
            return
        if self._filled + count > len(self._vectors):
            self._flush()
        vectors = judged.vectors
        labels, sq_dist = self._model.nearest.assign(vectors)
        cosine = self._model.cosine(vectors, labels)
        everything = count == rows.columns.num_rows
        chosen = pa.array(judged.positions)
        kept_ids = ids if everything else ids.take(chosen)
        arrays: list[pa.Array] = []
        for field in job.side_fields:
            match field.name:
                case fields.id_field:
                    arrays.append(kept_ids)
                case "l2_dist_to_cent":
                    arrays.append(pa.array(np.sqrt(sq_dist).astype(np.float32)))
                case "cosine_dist_to_cent":
                    arrays.append(pa.array((1.0 - cosine).astype(np.float32)))
                case "_row":
                    arrays.append(pa.array(rows.first_row + judged.positions))
                case _:
                    column = self._cast(rows, field)
                    arrays.append(column if everything else column.take(chosen))
        self._sides.append(pa.record_batch(arrays, schema=pa.schema(job.side_fields)))
        self._keys.append(
            np.stack(
                (
                    hash_ids(kept_ids, IDS_SEED_1),
                    hash_ids(kept_ids, IDS_SEED_2),
                    hash_rows(vectors, VECTORS_SEED),
                    (rows.first_row + judged.positions).astype(np.uint64),
                )
            )
        )
        self._vectors[self._filled : self._filled + count] = vectors
        self._filled += count
        self._labels.append(labels)
        self._sums += sq_dist.sum(), cosine.sum()

    def _cast(self, rows: RowBatch, field: pa.Field) -> pa.Array:
        column = rows.columns.column(field.name)
        if column.type.equals(field.type):
            return column
        try:
            return column.cast(field.type)
        except pa.ArrowException as error:
            raise SchemaError(
                f"{self._job.place(rows)}: column {field.name!r} is {column.type} where it was {field.type} ({error}); "
                "bring it to one type"
            ) from error

    def _flush(self) -> None:
        if not self._filled:
            return
        job, unit = self._job, self._task.unit
        name = f"{unit:06d}-{len(self._shards):04d}.arrow"
        labels = np.concatenate(self._labels)
        columns = pa.Table.from_batches(self._sides)
        path = job.work_file("shards", name)
        self._cluster_rows += write_shard(
            job.target,
            path,
            columns,
            self._vectors[: self._filled],
            labels,
            self._group_of,
            len(self._facts.group_starts) - 1,
        )
        keys = np.concatenate(self._keys, axis=1)
        self._write_keys(job.work_file("ids", name), keys)
        self._shards.append((path, int(keys[3, 0]), int(keys[3, -1]) + 1))
        self._filled = 0
        self._labels, self._sides, self._keys = [], [], []

    def _write_keys(self, path: str, keys: NDArray[np.uint64]) -> None:
        parts = self._job.plan.id_partitions
        shift = np.uint64(64 - (parts.bit_length() - 1))
        part = np.zeros(keys.shape[1], np.uint64) if parts == 1 else keys[0] >> shift
        order = np.argsort(part, kind="stable")
        bounds = np.searchsorted(part[order], np.arange(parts + 1))
        batches = []
        for number in range(parts):
            chosen = order[bounds[number] : bounds[number + 1]]
            h1, h2, vector, row = (pa.array(column[chosen]) for column in keys)
            batches.append(pa.record_batch([h1, h2, vector, row.cast(pa.int64())], schema=IDS_SCHEMA))
        write_batches(self._job.target, path, IDS_SCHEMA, batches)
        self._id_files.append(path)

    def finish(self) -> ShardsTask:
        self._flush()
        job, task = self._job, self._task
        path = join(job.rejected_path, f"invalid-{task.unit:06d}.parquet")
        rejected_path = self._rejected.write(job.target, path, job.listing)
        present = np.flatnonzero(self._cluster_rows)
        return ShardsTask(
            unit=task.unit,
            n_rows=task.n_rows,
            shards=tuple(self._shards),
            id_files=tuple(self._id_files),
            cluster_rows=dict(zip(present.tolist(), self._cluster_rows[present].tolist(), strict=True)),
            rejected=add_counts(self._reasons),
            sum_sq_dist=float(self._sums[0]),
            sum_cosine=float(self._sums[1]),
            rejected_path=rejected_path,
        )

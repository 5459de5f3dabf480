"""The row sample: the rows with the smallest seeded hash of their id, whichever files they are in."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from untwin.core import normalize
from untwin.stages.base import Context, Stage, Task, Upstream
from untwin.stages.clustering import SAMPLE_SEED, Clustering
from untwin.stages.ids import hash_ids
from untwin.stages.tasks import InputTask, SampleTask
from untwin.storage.columns import decode_vectors, list_lengths
from untwin.storage.rows import read_rows
from untwin.storage.sample import sample_batch, write_sample


class SampleStage(Stage):
    """Takes the sampled rows out of each input unit.

    Rows are taken whose hash is below a bound that the wanted number of rows passes almost surely; the fit then takes
    the smallest of them. So no pass over the ids is needed first, and the sample depends on the rows alone.
    """

    name = "sample"

    def __init__(self, clustering: Clustering) -> None:
        self._clustering = clustering

    def units(self, upstream: Upstream) -> Sequence[Task]:
        """The plan's input units."""
        return self._clustering.input_units()

    def memory(self, task: InputTask) -> int:
        """The sampled part of a unit, and batches in flight."""
        return (48 << 20) + int(4 * task.n_rows * self._clustering.plan.dim * self._share())

    def _share(self) -> float:
        plan = self._clustering.plan
        wanted = plan.sample_rows + 6 * math.sqrt(plan.sample_rows) + 10
        return min(1.0, wanted / plan.n_rows)

    def process(self, task: InputTask, context: Context) -> SampleTask:
        """Write the unit's part of the sample."""
        job = self._clustering
        share = self._share()
        bound = np.uint64(min(2**64 - 1, int(share * 2.0**64)))
        batches: list[pa.RecordBatch] = []
        n_sampled = 0
        spans = job.listing.spans(task.first_group, task.end_group, job.groups)
        names = [job.fields.id_field, job.fields.embedding_field]
        size = job.batch_rows(job.plan.dim)
        for rows in read_rows(job.source, job.listing.format, spans, names, size):
            ids = job.ids(rows)
            hashes = hash_ids(ids, job.seed + SAMPLE_SEED)
            chosen = np.ones(len(ids), np.bool_) if share >= 1 else hashes <= bound
            if ids.null_count:
                chosen &= ids.is_valid().to_numpy(zero_copy_only=False)
            picked = np.flatnonzero(chosen)
            if not len(picked):
                continue
            column = job.embeddings(rows)
            lengths = list_lengths(column)
            for dim in {job.dim} if job.dim else set(np.unique(lengths[picked]).tolist()) - {0}:
                here = picked[lengths[picked] == dim]
                part = column if len(here) == len(column) else column.take(pa.array(here))
                raw = decode_vectors(part, dim)
                vectors, invalid = normalize(raw.values)
                positions = np.arange(len(here)) if raw.positions is None else raw.positions
                good = np.flatnonzero(invalid == 0)
                for low in range(0, len(good), size):
                    some = good[low : low + size]
                    batches.append(sample_batch(hashes[here[positions[some]]], vectors[some]))
                    n_sampled += len(some)
        path = job.work_file("sample", f"part-{task.unit:06d}.arrow")
        write_sample(job.target, path, batches)
        return SampleTask(task.unit, task.n_rows, path, len(batches), n_sampled)

"""Fitting the centroids on the row sample."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from untwin.core import ArrayBlocks, fit
from untwin.errors import ParameterError, TooManyRejectedError
from untwin.plan import split_evenly
from untwin.stages.base import Context, ParallelMap, Stage, Task, Upstream
from untwin.stages.clustering import Clustering
from untwin.stages.tasks import CentroidsTask, SampleTask
from untwin.storage.files import is_remote, join, map_ahead
from untwin.storage.partitions import CENTROIDS, write_array
from untwin.storage.rows import batch_rows
from untwin.storage.sample import SampleBlocks, read_hashes


class FitStage(Stage):
    """Fits k-means on the sample.

    In memory if it fits the budget; else reading it from the storage in every iteration, in this process, or in those
    that the unit may be spread over.
    """

    name = "fit"
    barrier = True
    splittable = True

    def __init__(self, clustering: Clustering, **fit_options: Any) -> None:
        self._clustering = clustering
        self._options = fit_options
        self._parts: tuple[SampleTask, ...] = ()

    def units(self, upstream: Upstream) -> Sequence[Task]:
        """One unit: the whole fit."""
        self._parts = tuple(upstream.of(SampleTask))
        return [Task(0, sum(part.n_sampled for part in self._parts))]

    def memory(self, task: Task) -> int:
        """The sample, and what is needed without it."""
        return 4 * self._clustering.plan.dim * task.n_rows + self.minimum_memory(task) + (32 << 20)

    def minimum_memory(self, task: Task) -> int:
        """Arrays of centroids or the candidates for these, and numbers for each sampled row (tests measure them)."""
        plan = self._clustering.plan
        vectors = 10 * plan.n_clusters
        if isinstance(self._options["init"], str) and self._options["init"] == "k-means||":
            factor = self._options["oversampling_factor"]
            vectors = max(vectors, 2 * min(task.n_rows, int(5 * factor * plan.n_clusters)) + plan.n_clusters)
        return 4 * plan.dim * vectors + 56 * task.n_rows + (32 << 20)

    def process(self, task: Task, context: Context) -> CentroidsTask:
        """Fit, and write the centroids."""
        job = self._clustering
        in_memory = self.memory(task) <= context.memory
        spread = None if in_memory else context.spread
        paths = [part.path for part in self._parts if part.n_sampled]
        # so many wait for a remote storage; for a disk each would only hold one more batch in memory
        read_map = map_ahead if is_remote(job.output_path) else context.map
        batches = list((spread or read_map)(partial(read_hashes, job.target), paths))
        every = [hashes for part in batches for _, hashes in part]
        distinct = np.sort(np.concatenate([np.empty(0, np.uint64), *every]))
        distinct = distinct[np.diff(distinct, prepend=~distinct[:1]) != 0]
        if not len(distinct):
            raise TooManyRejectedError(
                "not one row of the sample can be judged: every embedding is null, empty, zero, not finite or of "
                f"another length than embedding_dim ({job.dim}); check the embedding column and embedding_dim"
                if job.dim
                else "not one row of the sample can be judged: every embedding is null, empty, zero or not finite; "
                "check the embedding column"
            )
        highest = distinct[min(len(distinct), job.plan.sample_rows) - 1]
        del every, distinct
        counts = [
            [(dim, int(np.searchsorted(hashes, highest, side="right"))) for dim, hashes in part] for part in batches
        ]
        del batches
        by_length: Counter[int] = Counter()
        for dim, count in itertools.chain.from_iterable(counts):
            by_length[dim] += count
        dim = job.dim or max(by_length, key=lambda length: (by_length[length], length))
        n_rows = [[count if length == dim else 0 for length, count in part] for part in counts]
        on_disk = SampleBlocks(job.target, paths, n_rows, dim, batch_rows(dim))
        n_sampled = on_disk.n_rows
        if n_sampled < job.plan.n_clusters:
            raise ParameterError(
                f"n_clusters is {job.plan.n_clusters}, but only {n_sampled} of the rows to fit on can be judged; "
                "lower n_clusters"
            )
        blocks = _loaded(on_disk, read_map) if in_memory else on_disk
        result = fit(
            blocks, job.plan.n_clusters, seed=job.seed, executor_map=context.map, spread=spread, **self._options
        )
        path = join(job.output_path, CENTROIDS)
        write_array(job.target, path, result.centroids)
        weights = (result.counts * (job.plan.vector_bytes / max(1, n_sampled))).astype(np.int64)
        return CentroidsTask(
            unit=0,
            n_rows=task.n_rows,
            path=path,
            dim=dim,
            group_starts=split_evenly(np.maximum(weights, 1), job.plan.unit_bytes),
            n_input_rows=job.plan.n_rows,
            listing_digest=job.listing.digest(),
            n_sampled=n_sampled,
            n_iter=result.n_iter,
            inertia=result.inertia,
            mean_cosine=result.mean_cosine,
        )


def _loaded(blocks: SampleBlocks, read_map: ParallelMap) -> ArrayBlocks:
    vectors = np.empty((blocks.n_rows, blocks.dim), np.float32)
    hashes = np.empty(blocks.n_rows, np.uint64)
    ends = np.cumsum([0] + [blocks.count(index) for index in range(len(blocks))])

    def read(index: int) -> None:
        rows = slice(ends[index], ends[index + 1])
        blocks.read(index, 0, vectors[rows], hashes[rows])

    list(read_map(read, range(len(blocks))))
    return ArrayBlocks(vectors, hashes, batch_rows(blocks.dim))

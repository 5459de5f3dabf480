"""Fitting the centroids on the row sample."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from untwin.core import ArrayBlocks, fit
from untwin.errors import ParameterError, TooManyRejectedError
from untwin.plan import split_evenly
from untwin.stages.base import Context, Stage, Task, Upstream
from untwin.stages.clustering import Clustering
from untwin.stages.tasks import CentroidsTask, SampleTask
from untwin.storage.files import join
from untwin.storage.partitions import CENTROIDS, write_array
from untwin.storage.rows import batch_rows
from untwin.storage.sample import SampleBlocks, read_hashes


class FitStage(Stage):
    """Fits k-means on the sample, in memory if it fits the budget, else reading it from the disk in every iteration."""

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
        """The sample, numbers for each row and the centroids."""
        plan = self._clustering.plan
        return 4 * plan.dim * (task.n_rows + 10 * plan.n_clusters) + 56 * task.n_rows + (64 << 20)

    def minimum_memory(self, task: Task) -> int:
        """Centroids, and numbers for each sampled row."""
        plan = self._clustering.plan
        return 40 * plan.dim * plan.n_clusters + 56 * task.n_rows + (32 << 20)

    def process(self, task: Task, context: Context) -> CentroidsTask:
        """Fit, and write the centroids."""
        job = self._clustering
        with ThreadPoolExecutor(16) as readers:
            hashes_and_lengths = list(
                readers.map(lambda part: read_hashes(job.target, part.path, part.n_batches), self._parts)
            )
        hashes = np.concatenate([hashes for hashes, _ in hashes_and_lengths])
        lengths = np.concatenate([lengths for _, lengths in hashes_and_lengths])
        distinct = np.unique(hashes)
        if not len(distinct):
            raise TooManyRejectedError(
                "not one row of the sample can be judged: every embedding is null, empty, zero, not finite or of "
                f"another length than embedding_dim ({job.dim}); check the embedding column and embedding_dim"
                if job.dim
                else "not one row of the sample can be judged: every embedding is null, empty, zero or not finite; "
                "check the embedding column"
            )
        highest = int(distinct[min(len(distinct), job.plan.sample_rows) - 1])
        chosen = hashes <= np.uint64(highest)
        values, counts = np.unique(lengths[chosen], return_counts=True)
        dim = job.dim or int(values[len(counts) - 1 - np.argmax(counts[::-1])])
        n_sampled = int((chosen & (lengths == dim)).sum())
        if n_sampled < job.plan.n_clusters:
            raise ParameterError(
                f"n_clusters is {job.plan.n_clusters}, but only {n_sampled} of the rows to fit on can be judged; "
                "lower n_clusters"
            )
        del hashes, lengths, distinct, chosen, hashes_and_lengths
        parts = [(part.path, part.n_batches) for part in self._parts if part.n_batches]
        on_disk = SampleBlocks(job.target, parts, dim, highest, n_sampled)
        in_memory = self.memory(task) <= context.memory
        blocks = _loaded(on_disk, n_sampled) if in_memory else on_disk
        result = fit(blocks, job.plan.n_clusters, seed=job.seed, executor_map=context.map, **self._options)
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


def _loaded(blocks: SampleBlocks, n_rows: int) -> ArrayBlocks:
    vectors = np.empty((n_rows, blocks.dim), np.float32)
    hashes = np.empty(n_rows, np.uint64)
    filled = 0
    for index in range(len(blocks)):
        block, block_hashes = blocks.block(index)
        vectors[filled : filled + len(block)] = block
        hashes[filled : filled + len(block)] = block_hashes
        filled += len(block)
    return ArrayBlocks(vectors, hashes, batch_rows(blocks.dim))

"""Measuring what clustering missed: sampled rows are compared with all rows of all clusters.

Three stages: take the sampled rows out of the clusters, compare them with each group of clusters, count.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from untwin.core import BestNeighbours, LabelledRows, NearestCentroid, is_duplicate, mix_seed, threshold
from untwin.stages.base import Context, Stage, Task, Upstream
from untwin.stages.clustering import AUDIT_SEED
from untwin.stages.ids import hash_ids
from untwin.stages.tasks import ClustersTask
from untwin.storage.bitmap import bits_of
from untwin.storage.columns import matrix_of
from untwin.storage.files import Storage, join, read_many
from untwin.storage.partitions import ROW, iterate_partition, read_array, write_array, write_vectors
from untwin.storage.rows import batch_rows

_BLOCK_BYTES = 8 << 20
_SCRATCH = 32 << 20
_SIDE_BYTES = 128
"""Of a sampled row: its numbers and what was found for it."""
_LEVEL_BYTES = 64
"""Of a sampled row, for each level beyond the first: a place of its order, and what was found for it."""
_FOUND = np.dtype([("at", np.int64), ("score", np.float32)])
_loading = threading.Lock()


@dataclass(frozen=True)
class Audit:
    """One pass of an audit.

    Attributes:
        storage: Storage of the run.
        work_path: Folder for what is removed at the end.
        id_field: Column of ids in the clusters.
        embedding_field: Column of vectors.
        clusters: All clusters, in groups.
        hashes: Rows are sampled whose 64-bit hash is at least the first and less than the second number.
        seed: Seed of the hash.
        eps: For which recall is counted.
        kept_bitmap: Bits of the rows that stay; empty where nothing is decided.
        n_sampled: Rows in the sample, about.
        n_levels: Levels at which pairs are told apart; see `untwin.core.recall`.
        centroids_path: `_centroids.npy`; needed for more than one level.
        n_centroids: How many they are.
    """

    storage: Storage
    work_path: str
    id_field: str
    embedding_field: str
    clusters: tuple[ClustersTask, ...]
    hashes: tuple[int, int]
    seed: int
    eps: tuple[float, ...]
    kept_bitmap: str
    n_sampled: int
    n_levels: int = 1
    centroids_path: str = ""
    n_centroids: int = 0

    @property
    def dim(self) -> int:
        """Elements of a vector."""
        return self.clusters[0].dim


def sample_bytes(dim: int, n_rows: int, n_levels: int = 1) -> int:
    """Memory that a sample takes."""
    return n_rows * (4 * dim + _SIDE_BYTES + _LEVEL_BYTES * (n_levels - 1))


@dataclass(frozen=True)
class SampledTask(Task):
    """Rows sampled from a group of clusters: paths of their vectors (m, D), and of their cluster and number (2, m)."""

    vectors_path: str
    facts_path: str


@dataclass(frozen=True)
class ComparedTask(Task):
    """The most similar rows that a group of clusters has for the sampled rows at each level, within the largest eps."""

    path: str


@dataclass(frozen=True)
class RecallTask(Task):
    """What a pass found; `n_rows` is the number of sampled rows.

    Attributes:
        near: For each eps, sampled rows that have a neighbour.
        compared: For each level, and then each eps: those that have one at this level or a lower one.
        n_kept: Sampled rows that stay.
        near_kept: For each eps, sampled rows that stay and have a neighbour that stays.
    """

    near: tuple[int, ...]
    compared: tuple[tuple[int, ...], ...]
    n_kept: int
    near_kept: tuple[int, ...]


class _Sample:
    """The sampled rows in the order of clusters and row numbers."""

    def __init__(self, audit: Audit, parts: Sequence[SampledTask]) -> None:
        read = partial(read_array, audit.storage)
        facts = list(read_many(read, [part.facts_path for part in parts]))
        labels, numbers = np.concatenate(facts, axis=1) if facts else np.empty((2, 0), np.int64)
        order = np.lexsort((numbers, labels))
        place = np.empty(len(order), np.int64)
        place[order] = np.arange(len(order))
        X = np.empty((len(order), audit.dim), np.float32)
        done = 0
        for vectors in read_many(read, [part.vectors_path for part in parts]):
            X[place[done : done + len(vectors)]] = vectors
            done += len(vectors)
        self.centroids: NearestCentroid | None = None
        if audit.n_levels > 1:
            self.centroids = NearestCentroid(np.asarray(read_array(audit.storage, audit.centroids_path), np.float32))
        self.rows = LabelledRows(X, labels[order], numbers[order], self.centroids, audit.n_levels)


class AuditSampleStage(Stage):
    """Takes the sampled rows out of a group of clusters."""

    name = "audit: sample"

    def __init__(self, audit: Audit) -> None:
        self.audit = audit

    @property
    def place(self) -> tuple[Storage, str]:
        """The folder that the stage writes to."""
        return self.audit.storage, self.audit.work_path

    def units(self, upstream: Upstream) -> Sequence[ClustersTask]:
        """The groups of clusters."""
        return self.audit.clusters

    def memory(self, task: ClustersTask) -> int:
        """A batch, and the rows taken, of which one batch is on its way into a file."""
        mean = self.audit.n_sampled * task.n_rows / sum(cluster.n_rows for cluster in self.audit.clusters)
        return 2 * sample_bytes(task.dim, int(mean + 6 * mean**0.5 + 10)) + _SCRATCH

    def process(self, task: ClustersTask, context: Context) -> SampledTask:
        """Take the sampled rows of a group of clusters."""
        audit = self.audit
        seed = mix_seed(audit.seed, AUDIT_SEED)
        low, high = audit.hashes
        vectors: list[NDArray[np.float32]] = []
        facts = [np.empty((2, 0), np.int64)]
        names = [audit.id_field, audit.embedding_field, ROW]
        for cluster in task.clusters:
            for batch in iterate_partition(audit.storage, cluster.files, names, batch_rows(task.dim)):
                hashes = hash_ids(batch.column(0), seed)
                chosen = np.flatnonzero((hashes >= np.uint64(low)) & (hashes <= np.uint64(high - 1)))
                vectors.append(matrix_of(batch.column(1))[chosen])
                numbers = batch.column(2).to_numpy()[chosen]
                facts.append(np.stack((np.full(len(chosen), cluster.centroid, np.int64), numbers)))
        paths = [join(audit.work_path, f"{name}-{task.unit:06d}.npy") for name in ("vectors", "facts")]
        write_vectors(audit.storage, paths[0], vectors, task.dim)
        write_array(audit.storage, paths[1], np.concatenate(facts, axis=1))
        return SampledTask(task.unit, sum(map(len, vectors)), *paths)


class AuditCompareStage(Stage):
    """Compares the sample with the rows of a group of clusters."""

    name = "audit: compare"
    barrier = True
    splittable = True

    def __init__(self, audit: Audit) -> None:
        self.audit = audit
        self._parts: tuple[SampledTask, ...] = ()
        self._kept: NDArray[np.uint8] | None = None
        self._sample: _Sample | None = None

    def units(self, upstream: Upstream) -> Sequence[ClustersTask]:
        """The groups of clusters."""
        self._parts = tuple(upstream.of(SampledTask))
        return self.audit.clusters

    def memory(self, task: ClustersTask) -> int:
        """The sample, a block of rows as read and in the order of clusters, the products, and the centroids."""
        audit = self.audit
        memory = sample_bytes(task.dim, audit.n_sampled, audit.n_levels) + 4 * _BLOCK_BYTES + _SCRATCH
        if audit.n_levels > 1:
            orders = 4 * audit.n_levels * self._block_rows(task.dim)
            memory += 3 * 4 * task.dim * audit.n_centroids + orders + _SCRATCH
        return memory

    def finish(self) -> None:
        """Let go of the sample."""
        self._sample = self._kept = None

    def process(self, task: ClustersTask, context: Context) -> ComparedTask:
        """Compare the sample with a group of clusters."""
        held = self._load()
        sample = held.rows
        floor = threshold(max(self.audit.eps))
        best = {stays: BestNeighbours(sample, floor) for stays in (True, False)}
        for X, labels, numbers in self._blocks(task):
            stays = np.ones(len(X), np.bool_) if self._kept is None else bits_of(self._kept, numbers)
            for kept, found in best.items():
                chosen = np.flatnonzero(stays == kept)
                if len(chosen):
                    block = LabelledRows(
                        X[chosen], labels[chosen], numbers[chosen], held.centroids, self.audit.n_levels
                    )
                    list(context.map(_Compare(found, block), found.slices))
        scores = np.stack([best[kept].scores() for kept in (True, False)])
        # a level that has nothing better than the one before says nothing
        at = np.flatnonzero(np.diff(scores, axis=1, prepend=np.float32(0)))
        entries = np.empty(len(at), _FOUND)
        entries["at"], entries["score"] = at, scores.reshape(-1)[at]
        path = join(self.audit.work_path, f"found-{task.unit:06d}.npy")
        write_array(self.audit.storage, path, entries)
        return ComparedTask(task.unit, task.n_rows, path)

    def _load(self) -> _Sample:
        with _loading:
            if self._sample is None:
                audit = self.audit
                if audit.kept_bitmap:
                    self._kept = np.frombuffer(audit.storage.read_bytes(audit.kept_bitmap), np.uint8)
                self._sample = _Sample(audit, self._parts)
            return self._sample

    @staticmethod
    def _block_rows(dim: int) -> int:
        return max(64, _BLOCK_BYTES // (4 * dim))

    def _blocks(self, task: ClustersTask) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]]:
        """Rows of some clusters, a few MB at a time: vectors, clusters, row numbers."""
        audit = self.audit
        most = self._block_rows(task.dim)
        held: list[tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]] = []
        n_held = 0
        for cluster in task.clusters:
            for batch in iterate_partition(audit.storage, cluster.files, [audit.embedding_field, ROW], most):
                if n_held and n_held + batch.num_rows > most:
                    yield _joined(held)
                    held, n_held = [], 0
                labels = np.full(batch.num_rows, cluster.centroid, np.int64)
                held.append((matrix_of(batch.column(0)), labels, batch.column(1).to_numpy()))
                n_held += batch.num_rows
        if held:
            yield _joined(held)


@dataclass(frozen=True)
class _Compare:
    found: BestNeighbours
    block: LabelledRows

    def __call__(self, part: slice) -> None:
        self.found.compare(part, self.block)


def _joined(
    parts: list[tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]],
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
    vectors, labels, numbers = zip(*parts, strict=True)
    return np.concatenate(vectors), np.concatenate(labels), np.concatenate(numbers)


class AuditCountStage(Stage):
    """Puts what all groups of clusters have for a sampled row together, and counts."""

    name = "audit: count"
    barrier = True

    def __init__(self, audit: Audit) -> None:
        self.audit = audit
        self._sampled: tuple[SampledTask, ...] = ()
        self._compared: tuple[ComparedTask, ...] = ()

    def units(self, upstream: Upstream) -> Sequence[Task]:
        """One unit."""
        self._sampled, self._compared = tuple(upstream.of(SampledTask)), tuple(upstream.of(ComparedTask))
        return [Task(0, sum(task.n_rows for task in self._sampled))]

    def memory(self, task: Task) -> int:
        """What was found for the sample."""
        return sample_bytes(self.audit.dim, task.n_rows, self.audit.n_levels) + _SCRATCH

    def process(self, task: Task, context: Context) -> RecallTask:
        """Count."""
        audit = self.audit
        shape = (2, audit.n_levels + 1, task.n_rows)
        scores = np.zeros(np.prod(shape), np.float32)
        read = partial(read_array, audit.storage)
        for found in read_many(read, [part.path for part in self._compared]):
            entries: NDArray[np.void] = np.asarray(found, _FOUND)
            scores[entries["at"]] = np.maximum(scores[entries["at"]], entries["score"])
        over_kept, over_removed = np.maximum.accumulate(scores.reshape(shape), axis=1)
        best = np.maximum(over_kept, over_removed)
        stays = np.zeros(task.n_rows, np.bool_)
        if audit.kept_bitmap:
            facts = np.concatenate(list(read_many(read, [part.facts_path for part in self._sampled])), axis=1)
            numbers = facts[1, np.lexsort((facts[1], facts[0]))]
            bitmap = np.frombuffer(audit.storage.read_bytes(audit.kept_bitmap), np.uint8)
            stays = bits_of(bitmap, numbers)
        return RecallTask(
            unit=0,
            n_rows=task.n_rows,
            near=_counts(best[-1], audit.eps),
            compared=tuple(_counts(level, audit.eps) for level in best[:-1]),
            n_kept=int(stays.sum()),
            near_kept=_counts(over_kept[-1][stays], audit.eps),
        )


def _counts(scores: NDArray[np.float32], eps: Sequence[float]) -> tuple[int, ...]:
    return tuple(int(is_duplicate(scores, value).sum()) for value in eps)

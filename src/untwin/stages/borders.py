"""Comparing rows across the borders of clusters: each row also with the members of the clusters next nearest to it.

Five stages. Rows visit the other clusters; these compare them with their own rows and write down the pairs within
eps; each cluster then finds out which of its answers hold and which are open; one global resolve decides the open
rows; and the answers are written.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from untwin.core import (
    EPS_GRID,
    NearestCentroid,
    Pairs,
    UnitRows,
    all_plane_distances,
    pairs_within,
    plane_distances,
    principal_axes,
    reach,
    reopen,
    score_counts,
    threshold,
)
from untwin.stages.base import CompositeStage, Context, Stage, Task, Upstream, require_empty
from untwin.stages.pairwise import Examples, PairwiseStage, removed_rows
from untwin.stages.tasks import (
    Cluster,
    ClustersTask,
    CrossedTask,
    HostsTask,
    PairsTask,
    ReopenedTask,
    ResolvedTask,
    VisitsTask,
)
from untwin.storage.bitmap import bits_of, clear_bits, empty_bitmap, set_bits
from untwin.storage.columns import matrix_of
from untwin.storage.files import Storage, Writes, join, read_many
from untwin.storage.partitions import ROW, iterate_partition, read_array, read_table, result_path, write_array
from untwin.storage.rows import batch_rows
from untwin.storage.shards import Slices, make_shard, write_shard, write_slices

_SHARD_BYTES, _SLICE_BYTES = 32 << 20, 128 << 10
"""Of a shard of visitors, at least, and for each group of clusters that it can have a slice for."""
_BLOCK_BYTES = 8 << 20
_SCRATCH = 32 << 20
_SIDE_BYTES = 300
"""Of a row's id, metadata and numbers."""
_PAIR_BYTES = 400
_MANY_PAIRS = 1 << 18
"""Rows times visitors from which on it pays to look for the directions in which they differ most."""
_MOST_AXES, _AXES_ROWS = 32, 128
_MOST_PAIRS = 1 << 16
"""Pairs that are collected before they are written."""


@dataclass(frozen=True)
class Borders:
    """One comparison across borders.

    Attributes:
        pairwise: The stage that compared the rows inside the clusters.
        output_path: Folder for the results.
        centroids_path: `_centroids.npy`, (K, D) float32.
        n_clusters: K.
        probes: Nearest clusters whose members a row is compared with, its own included.
        n_input_rows: Rows that row numbers can refer to.
    """

    pairwise: PairwiseStage
    output_path: str
    centroids_path: str
    n_clusters: int
    probes: int
    n_input_rows: int

    @property
    def limit(self) -> np.float32:
        """The least score of a duplicate."""
        assert self.pairwise.eps is not None
        return threshold(self.pairwise.eps)

    @property
    def target(self) -> Storage:
        """Where everything is written."""
        return self.pairwise.target

    def work_file(self, *names: str) -> str:
        """A path in the folder for what is removed at the end."""
        return join(self.output_path, "_borders", *names)

    def groups(self, upstream: Upstream) -> list[ClustersTask]:
        """The clusters, in the groups in which they were compared inside."""
        found = [task for task in upstream.of(ClustersTask) if task.clusters]
        return found or list(self.pairwise.clusters or self.pairwise.units(Upstream()))

    @property
    def keys(self) -> list[str]:
        """The columns that rank rows, the id first."""
        return list(dict.fromkeys([self.pairwise.id_field, *self.pairwise.ranking.metadata_cols]))

    def read_centroids(self) -> NDArray[np.float32]:
        """The centroids, (K, D)."""
        return np.asarray(read_array(self.pairwise.source, self.centroids_path), np.float32)


class BordersStage(CompositeStage):
    """Compares the rows of a `PairwiseStage` also across the borders of their clusters, and resolves all together.

    Rows of different clusters are ranked as rows of one cluster are: by the ranking's columns, then by id. Under
    `compare_to="kept"` the rows that stay are the lexicographically first independent set in this order over all
    pairs that were compared, inside clusters and across.

    Args:
        borders: What to compare.
    """

    def __init__(self, borders: Borders) -> None:
        self.borders = borders

    def stages(self) -> list[Stage]:
        """Visit, compare, reopen, resolve, answer."""
        kinds = (VisitStage, CrossStage, ReopenStage, ResolveStage, AnswerStage)
        return [kind(self.borders) for kind in kinds]


class _BordersStage(Stage):
    def __init__(self, borders: Borders) -> None:
        self.borders = borders


class VisitStage(_BordersStage):
    """Sends the rows of some clusters to the clusters next nearest to them, where they can have a pair within eps."""

    name = "visit"
    barrier = True

    def __init__(self, borders: Borders) -> None:
        super().__init__(borders)
        self._group_of = np.empty(0, np.int32)
        self._n_groups = 0
        self._has_rows = np.empty(0, np.bool_)
        self._centroids = np.empty((0, 0), np.float32)
        self._nearest: NearestCentroid | None = None

    def check_output(self) -> None:
        """Refuse an output that is there."""
        require_empty(self.borders.target, self.borders.output_path)

    def units(self, upstream: Upstream) -> Sequence[ClustersTask]:
        """The groups of clusters."""
        groups = self.borders.groups(upstream)
        self._centroids = self.borders.read_centroids()
        self._nearest = NearestCentroid(self._centroids)
        self._n_groups = len(groups)
        numbers = np.arange(len(self._centroids))
        starts = [group.clusters[0].centroid for group in groups]
        self._group_of = np.maximum(np.searchsorted(starts, numbers, side="right") - 1, 0).astype(np.int32)
        self._has_rows = np.zeros(len(numbers), np.bool_)
        self._has_rows[[cluster.centroid for group in groups for cluster in group.clusters]] = True
        return groups

    def memory(self, task: ClustersTask) -> int:
        """A batch with its products, a shard as collected and as written, and the centroids."""
        return 2 * self._shard_bytes + self.minimum_memory(task)

    @property
    def _shard_bytes(self) -> int:
        return max(_SHARD_BYTES, _SLICE_BYTES * self._n_groups)

    def minimum_memory(self, task: ClustersTask) -> int:
        """Shards can be smaller."""
        return 4 * _BLOCK_BYTES + 12 * self.borders.n_clusters * task.dim + _SCRATCH

    def process(self, task: ClustersTask, context: Context) -> VisitsTask:
        """Send the rows of a group of clusters."""
        job = self.borders
        pairwise = job.pairwise
        assert self._nearest is not None
        far = reach(job.limit, task.dim)
        free = (context.memory - self.minimum_memory(task)) // 2
        out = _Visitors(job, task, self._group_of, self._n_groups, min(self._shard_bytes, max(_BLOCK_BYTES, free)))
        probes: list[NDArray[np.int32]] = []
        names = pairwise.columns(task)
        for cluster in task.clusters:
            for batch in iterate_partition(pairwise.source, cluster.files, names, batch_rows(task.dim)):
                X = matrix_of(batch.column(names.index(pairwise.embedding_field)))
                others = self._nearest.order(X, job.probes)[:, 1:]
                probes.append(others)
                side = batch.select([*job.keys, ROW])
                for column in others.T:
                    at = np.flatnonzero((column >= 0) & self._has_rows[column])
                    targets, which = np.unique(column[at], return_inverse=True)
                    rows = X if len(at) == len(X) else X[at]
                    distance = plane_distances(rows, self._centroids[cluster.centroid], self._centroids[targets], which)
                    near = np.flatnonzero(distance <= far)
                    at = at[near]
                    out.add(rows[near], side.take(pa.array(at)), cluster.centroid, column[at], distance[near])
        path = job.work_file("probes", f"{task.unit:06d}.npy")
        write_array(job.target, path, np.concatenate(probes))
        return out.finish(path)


class _Visitors:
    """Collects rows that visit other clusters, and writes a shard whenever there are many."""

    def __init__(
        self, job: Borders, task: ClustersTask, group_of: NDArray[np.int32], n_groups: int, shard_bytes: int
    ) -> None:
        self._job, self._task, self._group_of, self._n_groups = job, task, group_of, n_groups
        self._shard_bytes = shard_bytes
        self._vectors: list[NDArray[np.float32]] = []
        self._sides: list[pa.RecordBatch] = []
        self._targets: list[NDArray[np.int32]] = []
        self._held = 0
        self._shards: list[str] = []

    def add(
        self,
        vectors: NDArray[np.float32],
        side: pa.RecordBatch,
        home: int,
        targets: NDArray[np.int32],
        distance: NDArray[np.float32],
    ) -> None:
        homes = pa.array(np.full(len(targets), home, np.int32))
        self._sides.append(side.append_column("_home", homes).append_column("_plane", pa.array(distance)))
        self._vectors.append(vectors)
        self._targets.append(targets)
        self._held += vectors.nbytes
        if self._held >= self._shard_bytes:
            self._flush()

    def _flush(self) -> None:
        if not self._held:
            return
        path = self._job.work_file("visitors", f"{self._task.unit:06d}-{len(self._shards):04d}.arrow")
        targets = np.concatenate(self._targets)
        vectors = np.concatenate(self._vectors)
        self._vectors = []
        sides = pa.Table.from_batches(self._sides)
        write_shard(self._job.target, path, make_shard(sides, vectors, targets, self._group_of, self._n_groups))
        self._shards.append(path)
        self._sides, self._targets, self._held = [], [], 0

    def finish(self, probes_path: str) -> VisitsTask:
        self._flush()
        return VisitsTask(self._task.unit, self._task.n_rows, tuple(self._shards), probes_path)


@dataclass(frozen=True)
class _Side:
    """Rows on one side of a border: what ranks them and their numbers, their clusters, and the first copy of each."""

    table: pa.Table
    clusters: NDArray[np.int32]
    first: NDArray[np.int64]

    def copies_of(self, chosen: NDArray[np.int64]) -> NDArray[np.int64]:
        """All rows that are copies of some first copies."""
        wanted = np.zeros(len(self.first), np.bool_)
        wanted[chosen] = True
        return np.flatnonzero(wanted[self.first])


class CrossStage(_BordersStage):
    """Compares the rows that visit some clusters with the rows of these clusters."""

    name = "compare across"
    barrier = True
    splittable = True

    def __init__(self, borders: Borders) -> None:
        super().__init__(borders)
        self._shards = Slices((), 0, "")
        self._probes: dict[int, str] = {}
        self._group_of: dict[int, int] = {}
        self._n_groups = 0
        self._centroids = np.empty((0, 0), np.float32)

    def units(self, upstream: Upstream) -> Sequence[HostsTask]:
        """The groups of clusters that are visited."""
        visits = upstream.of(VisitsTask)
        groups = self.borders.groups(upstream)
        paths = tuple(shard for task in visits for shard in task.shards)
        self._shards = Slices(paths, len(groups), self.borders.work_file("visitors", "_index.starts"))
        counts = self._shards.collect(self.borders.target).tolist()
        self._probes = {task.unit: task.probes_path for task in visits}
        self._group_of = {cluster.centroid: at for at, group in enumerate(groups) for cluster in group.clusters}
        self._n_groups = len(groups)
        self._centroids = self.borders.read_centroids()
        return [
            HostsTask(group.unit, group.n_rows, at, group.dim, group.clusters, count)
            for at, (group, count) in enumerate(zip(groups, counts, strict=True))
            if count
        ]

    def scratch(self) -> tuple[str, ...]:
        """The visiting rows."""
        return (self.borders.work_file("visitors"), self.borders.work_file("probes"))

    def finish(self) -> None:
        """Remove the visiting rows."""
        for path in self.scratch():
            self.borders.target.remove(path)

    def memory(self, task: HostsTask) -> int:
        """Visitors and the rows of a cluster, both as read and in order, and the products."""
        largest = max(cluster.n_rows for cluster in task.clusters)
        rows = (8 * task.dim + _SIDE_BYTES) * (task.n_visitors + largest)
        return rows + 8 * self.borders.n_clusters * task.dim + 2 * _BLOCK_BYTES + _SCRATCH

    def minimum_memory(self, task: HostsTask) -> int:
        """Blocks of visitors and of rows."""
        return min(
            self.memory(task), 8 * self.borders.n_clusters * task.dim + 8 * _BLOCK_BYTES + _SCRATCH + _MOST_PAIRS * 200
        )

    def cost(self, task: HostsTask) -> float:  # type: ignore[override]
        """Pairs, if there were no bound."""
        return float(task.n_visitors) * task.n_rows / len(task.clusters)

    def process(self, task: HostsTask, context: Context) -> CrossedTask:
        """Compare across the borders of a group of clusters."""
        job = self.borders
        free = context.memory - 8 * self.borders.n_clusters * task.dim - 2 * _BLOCK_BYTES - _SCRATCH
        most_rows = max(_BLOCK_BYTES, free // 2) // (8 * task.dim + _SIDE_BYTES)
        probes = np.asarray(read_array(job.target, self._probes[task.unit]), np.int32)
        out = _CrossPairs(job, task, self._group_of, self._n_groups)
        names = job.pairwise.columns(ClustersTask(0, 0, task.dim, ()))
        for visitors in self._visitors(task.group, most_rows):
            first_row = 0
            for cluster in task.clusters:
                guests = _guests(visitors, cluster.centroid)
                at = first_row
                first_row += cluster.n_rows
                if guests is None:
                    continue
                files = cluster.files
                for batch in iterate_partition(job.pairwise.source, files, names, min(most_rows, cluster.n_rows)):
                    own = pa.Table.from_batches([batch])
                    out.add(*self._compare(cluster.centroid, guests, own, probes[at : at + len(own)], context))
                    at += len(own)
        return out.finish()

    def _visitors(self, group: int, most_rows: int) -> Iterator[list[pa.RecordBatch]]:
        """The visitors of a group, some at a time; each batch is in the order of the clusters that they visit."""
        held: list[pa.RecordBatch] = []
        for batch in self._shards.batches(self.borders.target, group):
            for low in range(0, batch.num_rows, most_rows):
                part = batch.slice(low, most_rows)
                if sum(other.num_rows for other in held) + part.num_rows > most_rows:
                    yield held
                    held = []
                held.append(part)
        if held:
            yield held

    def _compare(
        self, centroid: int, guests: pa.Table, own: pa.Table, probes: NDArray[np.int32], context: Context
    ) -> tuple[pa.Table | None, int, int, int]:
        """Pairs within eps of visitors of a cluster with rows of it; and how many products, bounds and pairs."""
        job = self.borders
        home = guests["_home"].to_numpy()
        plane = guests["_plane"].to_numpy()
        X, Y = matrix_of(guests["_vector"]), matrix_of(own[job.pairwise.embedding_field])
        axes = None
        if len(X) * len(Y) >= _MANY_PAIRS:
            sample = np.concatenate((_spread(X, _AXES_ROWS), _spread(Y, _AXES_ROWS)))
            axes = principal_axes(sample, max(1, min(_MOST_AXES, X.shape[1] // 4)))
        x, y = UnitRows(X, axes), UnitRows(Y, axes)
        visitors = _Side(guests.select([*job.keys, ROW]), home, x.first_copies())
        hosts = _Side(own.select([*job.keys, ROW]), np.full(len(own), centroid, np.int32), y.first_copies())
        x_at = np.flatnonzero(visitors.first == np.arange(len(X)))
        x_at = x_at[np.argsort(home[x_at], kind="stable")]
        y_at = np.flatnonzero(hosts.first == np.arange(len(Y)))
        origins, begin = np.unique(home[x_at], return_index=True)
        end = np.append(begin[1:], len(x_at))

        def across(planes: NDArray[np.float32], offset: int, index: int) -> tuple[Pairs, int, int]:
            origin = int(origins[index])
            some = x_at[begin[index] : end[index]]
            # rows that visit each other's clusters are compared once: by the cluster with the higher number
            chosen = slice(None) if origin < centroid else np.flatnonzero(~(probes[y_at] == origin).any(axis=1))
            return pairs_within(x, some, plane[some], y, y_at[chosen], planes[index - offset, y_at[chosen]], job.limit)

        found: list[tuple[Pairs, int, int]] = []
        width = max(1, _BLOCK_BYTES // (4 * len(Y) + 8 * Y.shape[1]))
        for low in range(0, len(origins), width):
            part = range(low, min(low + width, len(origins)))
            planes = all_plane_distances(Y, self._centroids[centroid], self._centroids[origins[part.start : part.stop]])
            found += context.map(partial(across, planes, low), part)
        pairs = Pairs(
            np.concatenate([pairs.left for pairs, _, _ in found]),
            np.concatenate([pairs.right for pairs, _, _ in found]),
            np.concatenate([pairs.score for pairs, _, _ in found]),
        )
        n_products, n_bounds = sum(count for _, count, _ in found), sum(count for _, _, count in found)
        return (self._oriented(pairs, visitors, hosts) if len(pairs) else None), n_products, n_bounds, len(pairs)

    def _oriented(self, pairs: Pairs, visitors: _Side, hosts: _Side) -> pa.Table:
        """Rows with a better-ranked row across the border, of all copies of a row only the best-ranked.

        Returns:
            `x_row`, `x_cluster`, `y_row`, `score`, and of the better-ranked row what ranks it.
        """
        job = self.borders
        left, right = visitors.copies_of(pairs.left), hosts.copies_of(pairs.right)
        table = pa.concat_tables([visitors.table.take(pa.array(left)), hosts.table.take(pa.array(right))])
        rank = _ranks(job, table)
        clusters = np.concatenate((visitors.clusters[left], hosts.clusters[right]))
        rows = table[ROW].to_numpy()
        first = np.concatenate((visitors.first[left], len(visitors.first) + hosts.first[right]))
        order = np.lexsort((rank, first))
        firsts, begin, counts = np.unique(first[order], return_index=True, return_counts=True)
        best = order[begin]
        parts = []
        for x_first, y_first in (
            (pairs.left, len(visitors.first) + pairs.right),
            (len(visitors.first) + pairs.right, pairs.left),
        ):
            group = np.searchsorted(firsts, x_first)
            y = best[np.searchsorted(firsts, y_first)]
            pair = np.repeat(np.arange(len(pairs)), counts[group])
            place = np.arange(len(pair)) - np.repeat(np.cumsum(counts[group]) - counts[group], counts[group])
            x = order[begin[group][pair] + place]
            better = rank[y[pair]] < rank[x]
            parts.append((x[better], y[pair][better], pairs.score[pair][better]))
        x, y, score = (np.concatenate(part) for part in zip(*parts, strict=True))
        columns = {"x_row": rows[x], "x_cluster": clusters[x], "y_row": rows[y], "score": score}
        return _pairs_table(columns, table.select(job.keys).take(pa.array(y)))


def _spread(X: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """About so many rows, evenly spread."""
    return X[:: max(1, len(X) // count)][:count]


def _guests(visitors: Sequence[pa.RecordBatch], centroid: int) -> pa.Table | None:
    """Those who visit a cluster."""
    parts = []
    for batch in visitors:
        low, high = np.searchsorted(batch.column("_centroid").to_numpy(), [centroid, centroid + 1])
        if low < high:
            parts.append(batch.slice(low, high - low))
    return pa.Table.from_batches(parts).combine_chunks() if parts else None


def _ranks(job: Borders, table: pa.Table) -> NDArray[np.int64]:
    """The rank of each row of a table among them."""
    order = job.pairwise.ranking.order(table, job.pairwise.id_field)
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return rank


def _pairs_table(columns: Mapping[str, NDArray[np.generic]], better: pa.Table) -> pa.Table:
    """Pairs: numbers, and what ranks the better-ranked row, its columns named `y_...`."""
    table = pa.table({name: pa.array(values) for name, values in columns.items()})
    for name in better.column_names:
        table = table.append_column(f"y_{name}", better[name])
    return table


class _CrossPairs:
    """Collects pairs across borders, and writes them by the group of the row that is not better ranked."""

    def __init__(self, job: Borders, task: HostsTask, group_of: dict[int, int], n_groups: int) -> None:
        self._job, self._task, self._group_of, self._n_groups = job, task, group_of, n_groups
        self._held: list[pa.Table] = []
        self._n_held = 0
        self._shards: list[str] = []
        self._n_products = self._n_bounds = self._n_pairs = 0

    def add(self, table: pa.Table | None, n_products: int, n_bounds: int, n_pairs: int) -> None:
        self._n_products += n_products
        self._n_bounds += n_bounds
        self._n_pairs += n_pairs
        if table is not None:
            self._held.append(table)
            self._n_held += len(table)
            if self._n_held >= _MOST_PAIRS:
                self._flush()

    def _flush(self) -> None:
        if not self._n_held:
            return
        table = pa.concat_tables(self._held).combine_chunks()
        self._held, self._n_held = [], 0
        clusters = table["x_cluster"].to_numpy()
        values, where = np.unique(clusters, return_inverse=True)
        groups = np.array([self._group_of[value] for value in values.tolist()])[where]
        order = np.argsort(groups, kind="stable")
        table = table.take(pa.array(order))
        bounds = np.searchsorted(groups[order], np.arange(self._n_groups + 1))
        batches = (_one_batch(table.slice(low, high - low)) for low, high in itertools.pairwise(bounds))
        path = self._job.work_file("across", f"{self._task.unit:06d}-{len(self._shards):04d}.arrow")
        write_slices(self._job.target, path, batches)
        self._shards.append(path)

    def finish(self) -> CrossedTask:
        self._flush()
        counts = (self._n_products, self._n_bounds, self._n_pairs)
        return CrossedTask(self._task.unit, self._task.n_rows, tuple(self._shards), *counts)


def _one_batch(table: pa.Table) -> pa.RecordBatch:
    batches = table.combine_chunks().to_batches()
    return batches[0] if batches else pa.RecordBatch.from_pylist([], schema=table.schema)


class ReopenStage(_BordersStage):
    """Finds out, in each cluster, which answers hold and which depend on rows of other clusters."""

    name = "reopen"
    barrier = True

    def __init__(self, borders: Borders) -> None:
        super().__init__(borders)
        self._shards = Slices((), 0, "")
        self._group_of: dict[int, int] = {}
        self._inside: dict[int, PairsTask] = {}

    def units(self, upstream: Upstream) -> Sequence[ClustersTask]:
        """The groups of clusters."""
        groups = self.borders.groups(upstream)
        paths = tuple(shard for task in upstream.of(CrossedTask) for shard in task.shards)
        self._shards = Slices(paths, len(groups), self.borders.work_file("across", "_index.starts"))
        self._shards.collect(self.borders.target)
        self._group_of = {group.unit: at for at, group in enumerate(groups)}
        self._inside = {task.unit: task for task in upstream.of(PairsTask)}
        return groups

    def scratch(self) -> tuple[str, ...]:
        """The pairs across borders, which are part of all pairs now."""
        return (self.borders.work_file("across"),)

    def finish(self) -> None:
        """Remove them."""
        self.borders.target.remove(self.borders.work_file("across"))

    def memory(self, task: ClustersTask) -> int:
        """As for comparing the rows inside, and the unit's pairs."""
        return self.borders.pairwise.memory(task) + _PAIR_BYTES * max(cluster.n_rows for cluster in task.clusters)

    def minimum_memory(self, task: ClustersTask) -> int:
        """As for comparing the rows inside."""
        return self.borders.pairwise.minimum_memory(task) + _PAIR_BYTES * max(
            cluster.n_rows for cluster in task.clusters
        )

    def process(self, task: ClustersTask, context: Context) -> ReopenedTask:
        """Look at the clusters of a group that pairs across borders touch."""
        job = self.borders
        batches = list(self._shards.batches(job.target, self._group_of[task.unit]))
        across = pa.Table.from_batches(batches) if batches else None
        rows = np.asarray(read_array(job.target, self._inside[task.unit].rows_path), np.int64)
        kept: list[NDArray[np.int64]] = []
        opened: list[NDArray[np.int64]] = []
        pairs: list[pa.Table] = []
        low = 0
        paths = [result_path(job.pairwise.output_path, cluster.centroid) for cluster in task.clusters]
        for cluster, inside in zip(task.clusters, read_many(partial(read_table, job.target), paths), strict=True):
            numbers = rows[low : low + cluster.n_rows]
            low += cluster.n_rows
            mine = across.filter(pc.equal(across["x_cluster"], cluster.centroid)) if across is not None else None
            stays, open_rows, found = self._reopen(cluster, inside, numbers, mine, task, context)
            kept.append(stays)
            opened.append(open_rows)
            pairs += found
        return self._write(task, np.concatenate(kept), np.concatenate(opened), pairs)

    def _reopen(
        self,
        cluster: Cluster,
        inside: pa.Table,
        numbers: NDArray[np.int64],
        across: pa.Table | None,
        task: ClustersTask,
        context: Context,
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], list[pa.Table]]:
        """Row numbers that stay for sure, those that are open, and pairs."""
        job, pairwise = self.borders, self.borders.pairwise
        assert pairwise.eps is not None
        removed = removed_rows(inside, pairwise.eps, pairwise.compare_to)
        if across is None or not across.num_rows:
            return numbers[~removed], numbers[:0], []
        ids = inside["id"].combine_chunks()
        match = pc.index_in(inside["max_id"].combine_chunks(), value_set=ids).to_numpy(zero_copy_only=False)
        witness = inside["kept_id"].combine_chunks()
        kept_match = pc.fill_null(pc.index_in(witness, value_set=ids, skip_nulls=True), -1)
        outside = np.zeros(len(numbers), np.bool_)
        outside[_positions(numbers, across["x_row"].to_numpy())] = True
        with ExitStack() as stack:
            table, order, vectors = pairwise.load(cluster, task, context, stack)
            result = reopen(
                vectors,
                match.astype(np.int64),
                kept_match.to_numpy(zero_copy_only=False).astype(np.int64),
                removed,
                outside,
                limit=job.limit,
                compare_to=pairwise.compare_to,  # type: ignore[arg-type]
            )
        pairs = result.pairs
        columns = {"x_row": numbers[pairs.left], "y_row": numbers[pairs.right], "score": pairs.score}
        better = table.select(job.keys).take(pa.array(order[pairs.right]))
        found = [across.drop_columns(["x_cluster"]), _pairs_table(columns, better)]
        return numbers[result.kept], numbers[result.open], found

    def _write(
        self, task: ClustersTask, kept: NDArray[np.int64], opened: NDArray[np.int64], pairs: list[pa.Table]
    ) -> ReopenedTask:
        job = self.borders
        paths = {
            name: job.work_file(name, f"{task.unit:06d}.{ending}")
            for name, ending in (("pairs", "parquet"), ("kept", "npy"), ("open", "npy"), ("open-pairs", "npy"))
        }
        write_array(job.target, paths["kept"], kept)
        if not pairs:
            return ReopenedTask(task.unit, task.n_rows, "", paths["kept"], "", "", 0)
        table = pa.concat_tables(pairs)
        with job.target.writing(paths["pairs"]) as sink:
            pq.write_table(table, sink, compression="zstd")
        write_array(job.target, paths["open"], opened)
        x, y, score = (table[name].to_numpy() for name in ("x_row", "y_row", "score"))
        near = np.isin(x, opened) & (score.astype(np.float32) >= job.limit)
        write_array(job.target, paths["open-pairs"], np.stack((x[near], y[near])))
        return ReopenedTask(
            task.unit, task.n_rows, paths["pairs"], paths["kept"], paths["open"], paths["open-pairs"], len(opened)
        )


def _positions(numbers: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where some numbers are; each is there."""
    order = np.argsort(numbers)
    return np.asarray(order[np.searchsorted(numbers, wanted, sorter=order)])


class ResolveStage(_BordersStage):
    """Decides the open rows of all clusters together.

    A row is removed once a better-ranked row within eps is known to stay, and stays once all of these are known to
    be removed. The best-ranked of the open rows can always be decided, so this ends; and it gives the rows that
    going through all rows in rank order would give.
    """

    name = "resolve"
    barrier = True

    def __init__(self, borders: Borders) -> None:
        super().__init__(borders)
        self._parts: tuple[ReopenedTask, ...] = ()

    def units(self, upstream: Upstream) -> Sequence[Task]:
        """One unit."""
        self._parts = tuple(upstream.of(ReopenedTask))
        return [Task(0, sum(part.n_rows for part in self._parts))]

    def memory(self, task: Task) -> int:
        """Two bits for each row of the input, and the rows and pairs of a group of clusters."""
        largest = max((part.n_open for part in self._parts), default=0)
        return self.borders.n_input_rows // 4 + 200 * largest + _SCRATCH

    def process(self, task: Task, context: Context) -> ResolvedTask:
        """Decide."""
        job = self.borders
        kept, undecided = empty_bitmap(job.n_input_rows), empty_bitmap(job.n_input_rows)
        read = partial(read_array, job.target)
        for rows in read_many(read, [part.kept_path for part in self._parts]):
            set_bits(kept, np.asarray(rows, np.int64))
        for rows in read_many(read, [part.open_path for part in self._parts if part.n_open]):
            set_bits(undecided, np.asarray(rows, np.int64))
        waiting = [part for part in self._parts if part.n_open]
        while waiting:
            waiting = [part for part in waiting if self._decide(part, kept, undecided)]
        path = job.work_file("_kept.bits")
        job.target.write_bytes(path, kept.tobytes())
        return ResolvedTask(0, task.n_rows, path)

    def _decide(self, part: ReopenedTask, kept: NDArray[np.uint8], undecided: NDArray[np.uint8]) -> bool:
        """Decide what can be decided of a group of clusters; whether something is left."""
        target = self.borders.target
        rows = np.asarray(read_array(target, part.open_path), np.int64)
        x, y = np.asarray(read_array(target, part.open_pairs_path), np.int64)
        order = np.argsort(rows)
        rows, at = rows[order], np.searchsorted(rows[order], x)
        before = len(rows) + 1
        left = bits_of(undecided, rows)
        while 0 < (count := int(left.sum())) < before:
            before = count
            removed, blocked = np.zeros(len(rows), np.bool_), np.zeros(len(rows), np.bool_)
            removed[at[bits_of(kept, y)]] = True
            blocked[at[bits_of(undecided, y)]] = True
            set_bits(kept, rows[left & ~removed & ~blocked])
            clear_bits(undecided, rows[left & (removed | ~blocked)])
            left &= ~removed & blocked
        return bool(left.any())


class AnswerStage(_BordersStage):
    """Writes the results of some clusters, with what pairs across borders change in them."""

    name = "answer"
    barrier = True

    def __init__(self, borders: Borders) -> None:
        super().__init__(borders)
        self._inside: dict[int, PairsTask] = {}
        self._kept_bitmap = ""

    def units(self, upstream: Upstream) -> Sequence[ReopenedTask]:
        """The groups of clusters."""
        self._inside = {task.unit: task for task in upstream.of(PairsTask)}
        (resolved,) = upstream.of(ResolvedTask)
        self._kept_bitmap = resolved.kept_bitmap
        return upstream.of(ReopenedTask)

    def scratch(self) -> tuple[str, ...]:
        """Everything that only these stages read."""
        return (self.borders.work_file(), self.borders.pairwise.output_path)

    def finish(self) -> None:
        """Remove it."""
        for path in self.scratch():
            self.borders.target.remove(path)

    def memory(self, task: ReopenedTask) -> int:
        """The results and pairs of a cluster, and the bits of the rows that stay."""
        inside = self._inside.get(task.unit)
        largest = max(n_rows for _, n_rows in inside.clusters) if inside else 0
        return self.borders.n_input_rows // 8 + (_PAIR_BYTES + _SIDE_BYTES) * largest + 16 * task.n_rows + _SCRATCH

    def process(self, task: ReopenedTask, context: Context) -> PairsTask:
        """Write the results of a group of clusters."""
        job, inside = self.borders, self._inside[task.unit]
        rows = np.asarray(read_array(job.target, inside.rows_path), np.int64)
        changes = self._changes(task) if task.pairs_path else None
        counts = np.zeros(len(EPS_GRID), np.int64)
        examples = Examples()
        low = 0
        paths = [result_path(job.pairwise.output_path, centroid) for centroid, _ in inside.clusters]
        with Writes(job.output_path) as writes:
            tables = read_many(partial(read_table, job.target), paths)
            for (centroid, n_rows), table in zip(inside.clusters, tables, strict=True):
                answer = table
                if changes is not None:
                    answer = changes.applied(table, rows[low : low + n_rows])
                low += n_rows
                writes.add(answer.nbytes, job.pairwise.write_result, job.output_path, centroid, answer)
                score = answer["cosine_sim_score"].to_numpy()
                counts += score_counts(score)
                examples.add(answer["id"].combine_chunks(), answer["max_id"], score)
        rows_path = join(job.output_path, "_rows", f"unit-{task.unit:06d}.npy")
        write_array(job.target, rows_path, rows)
        return dataclasses.replace(
            inside,
            folder=job.output_path,
            rows_path=rows_path,
            counts=tuple(counts.tolist()),
            examples=examples.chosen(),
        )

    def _changes(self, task: ReopenedTask) -> _Changes:
        job = self.borders
        pairs = read_table(job.target, task.pairs_path)
        kept = np.frombuffer(job.target.read_bytes(self._kept_bitmap), np.uint8)
        better = pa.table({name: pairs[f"y_{name}"] for name in job.keys})
        x, score = pairs["x_row"].to_numpy(), pairs["score"].to_numpy()
        order = np.lexsort((_ranks(job, better), -score, x))
        x, score = x[order], score[order]
        stays = bits_of(kept, pairs["y_row"].to_numpy()[order]) & (score.astype(np.float32) >= job.limit)
        rows, best = np.unique(x, return_index=True)
        with_witness, witness = np.unique(x[stays], return_index=True)
        witness_of = np.full(len(rows), -1)
        witness_of[np.searchsorted(rows, with_witness)] = np.flatnonzero(stays)[witness]
        ids = better[job.pairwise.id_field].combine_chunks().take(pa.array(order))
        return _Changes(rows, best, witness_of, ids, score.astype(np.float32))


@dataclass(frozen=True)
class _Changes:
    """New answers: row numbers (n,), ascending; the places of the most similar row and of the witness, or -1."""

    rows: NDArray[np.int64]
    best: NDArray[np.int64]
    witness: NDArray[np.int64]
    ids: pa.Array
    score: NDArray[np.float32]

    def applied(self, table: pa.Table, numbers: NDArray[np.int64]) -> pa.Table:
        """The results of a cluster with the new answers."""
        at = np.minimum(np.searchsorted(self.rows, numbers), len(self.rows) - 1)
        changed = np.flatnonzero(self.rows[at] == numbers)
        if not len(changed):
            return table
        at = at[changed]
        best, witness = self.best[at], self.witness[at]
        score = table["cosine_sim_score"].to_numpy().copy()
        score[changed] = self.score[best]
        kept_score = np.asarray(table["kept_sim_score"].to_numpy(zero_copy_only=False), np.float32).copy()
        kept_score[changed] = np.where(witness < 0, np.nan, self.score[np.maximum(witness, 0)])
        return pa.table(
            {
                "id": table["id"],
                "max_id": self._ids(table["max_id"], changed, best),
                "cosine_sim_score": pa.array(score),
                "kept_id": self._ids(table["kept_id"], changed, witness),
                "kept_sim_score": pa.array(kept_score, mask=np.isnan(kept_score)),
            }
        )

    def _ids(self, column: pa.ChunkedArray, changed: NDArray[np.int64], where: NDArray[np.int64]) -> pa.Array:
        known = pa.concat_arrays([*column.chunks, self.ids.cast(column.type)])
        take = np.arange(len(column))
        take[changed] = len(column) + np.maximum(where, 0)
        none = np.zeros(len(column), np.bool_)
        none[changed] = where < 0
        return known.take(pa.array(take, mask=none))

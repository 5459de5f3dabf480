"""Euclidean k-means on unit vectors: exact nearest centroids, and a fit over blocks of rows.

Chance follows the rows' hashes, sums over rows are fixed-point integers, and close decisions are taken in
fixed-order float64: the same set of (row, hash) gives the same bits however it is ordered, split into blocks
or spread over threads.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from untwin.core.hashing import hash_integers, hash_rows, mix_seed, uniform
from untwin.core.vectors import DENSE, float32_below, pair_dot_and_squares, pair_squared_distance, rowwise_dot
from untwin.core.vectors import blocks as slices_of
from untwin.errors import ParameterError

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]
Neighbours = npt.NDArray[np.intp]
"""(K, M) places among the distinct centroids: of each centroid itself (or what it is a copy of), then of others."""
Init = Literal["k-means||", "random"] | Float32
T = TypeVar("T")
BlockMap = Callable[[Callable[[Any], T], Iterable[Any]], Iterable[T]]
"""Like `map` or `ThreadPoolExecutor.map`."""

_ASSIGN_ROWS = 1024
_ASSIGN_COLUMNS = 1024
_SMALL_PRODUCT = 250_000
"""Multiplications that take as long as it takes to begin a product."""
_SCALABLE_ROUNDS = 5
_OVERSHOOT = np.float32(0.7)
"""How much farther than to its mean a centroid moves, as a part of the way there."""
_SMALL_CLUSTER = 4
"""Rows of a cluster that is not worth a centroid where eight times as many are the average."""
_EXACT_ROWS = 1 << 12
"""Most rows of fixed-point values, elements of at most 1 with 40 bits of fraction, that float64 adds up exactly."""
_PROPOSALS = 128
_STEP_VALUES = 1 << 16
"""Numbers of rows that are gone through at a time, so that memory holds few temporary ones."""
_BATCH_BYTES = 4 << 20
"""Rows of several blocks that are worked on together."""
_CALL_BYTES = 16 << 20
_MOST_CALLS = 1024
"""Of a pass that is spread over processes: least bytes of rows to read in a call, and most calls."""
_FIRST, _SAMPLE, _PLUS_PLUS, _RANDOM, _FILL, _VECTOR = range(6)
"""Purposes of random numbers: one seed each."""


class RowBlocks(Protocol):
    """Unit rows and the hashes of their ids, a block at a time; read from many threads.

    With `fit(spread=...)` it is sent to other processes, so it must be picklable and small.
    """

    @property
    def n_rows(self) -> int:
        """Number of rows in all blocks."""

    @property
    def dim(self) -> int:
        """Elements per row."""

    def __len__(self) -> int:
        """Count the blocks."""

    def block(self, index: int, start: int = 0, stop: int | None = None) -> tuple[Float32, UInt64]:
        """Rows `start:stop` of a block: (b, D) float32 unit vectors, C-contiguous, and (b,) uint64 hashes of ids."""


class ArrayBlocks:
    """`RowBlocks` in memory: (n, D) float32 unit rows and (n,) uint64 hashes of their ids."""

    def __init__(self, X: Float32, hashes: UInt64, block_rows: int = 8192) -> None:
        self._X, self._hashes = np.ascontiguousarray(X, dtype=np.float32), hashes
        self._slices = list(slices_of(len(X), block_rows))

    @property
    def n_rows(self) -> int:
        """Number of rows in all blocks."""
        return len(self._X)

    @property
    def dim(self) -> int:
        """Elements per row."""
        return int(self._X.shape[1])

    def __len__(self) -> int:
        """Count the blocks."""
        return len(self._slices)

    def block(self, index: int, start: int = 0, stop: int | None = None) -> tuple[Float32, UInt64]:
        """Rows `start:stop` of a block, and their hashes."""
        rows = self._slices[index]
        return self._X[rows][start:stop], self._hashes[rows][start:stop]

    def take(self, positions: Int64) -> Float32:
        """Copy rows at any positions, counted over all blocks; (m, D) float32."""
        return self._X.take(positions, axis=0)


@dataclass(frozen=True)
class KMeansResult:
    """A fitted k-means.

    Attributes:
    ----------
    centroids
        (K, D) float32, not normalised. A cluster that is empty at the end (always so for the surplus if there
        are more clusters than distinct rows) keeps the row that it was last started from.
    counts
        (K,) int64, rows nearest to each centroid (fitted with `n_neighbours`: nearest of the neighbours).
    inertia
        Sum of squared distances of the rows to that centroid.
    n_iter
        Iterations run.
    mean_cosine
        Mean cosine similarity of the rows to their centroid.
    n_rows
        Rows fitted on.

    """

    centroids: Float32
    counts: Int64
    inertia: float
    n_iter: int
    mean_cosine: float
    n_rows: int


class NearestCentroid:
    """Finds the nearest of (K, D) float32 centroids; prepared once, used from many threads."""

    def __init__(self, centroids: Float32) -> None:
        centroids = np.ascontiguousarray(centroids, dtype=np.float32)
        # Identical centroids would tie for every row: only the first of them can win.
        _, first, group = np.unique(hash_rows(centroids, 0), return_index=True, return_inverse=True)
        copy = (first[group] != np.arange(len(centroids))) & (centroids == centroids[first[group]]).all(axis=1)
        self._index = np.flatnonzero(~copy).astype(np.int32)
        self._place = np.searchsorted(self._index, np.where(copy, first[group], np.arange(len(centroids))))
        self._centroids = centroids if not copy.any() else centroids[self._index]
        self._squares = rowwise_dot(self._centroids, self._centroids)
        self._half_squares = (self._squares / 2).astype(np.float32)
        largest = float(np.sqrt(self._squares.max(initial=0.0)))
        dim = centroids.shape[1]
        # As `product_error`, for centroids of any norm, and with the rounding of |c|^2 / 2 and of its
        # subtraction; and with room for a centroid in the place of the row.
        self._error = 1.01 * 2.0**-24 * ((dim + 8) * largest + 2 * (largest + largest**2)) * max(1.0, largest)
        # Of squared distances, by float64 products and in fixed order, of which one counts up to 4 times.
        self._fine_error = 64 * 2.0**-53 * (dim + 16) * (1 + largest) ** 2

    def labels(self, X: Float32) -> Int32:
        """Find the centroid nearest to each (n, D) float32 unit row (ties: the lowest); (n,) int32."""
        out = np.empty(len(X), np.int32)
        for rows in slices_of(len(X), _ASSIGN_ROWS):
            out[rows] = self._nearest(X[rows])
        return self._index[out]

    def assign(self, X: Float32) -> tuple[Int32, Float64]:
        """`labels`, and the squared Euclidean distances, (n,) float64, in fixed order."""
        labels = self.labels(X)
        at = np.searchsorted(self._index, labels)
        return labels, pair_squared_distance(X, np.arange(len(X)), self._centroids, at)

    def distances(self, X: Float32, labels: Int32) -> tuple[Float64, Float64]:
        """Squared Euclidean distance of each row to its centroid, and its cosine similarity to that.

        Both come from one dot product, |x - c|^2 = |x|^2 - 2 x.c + |c|^2, in float64 and in fixed order. The distance
        is off by up to 2^-50; `assign`, which sums squares of differences, gives 0 for a row that equals its centroid.

        Args:
            X: (n, D) float32 unit rows, C-contiguous.
            labels: (n,) int32, as `labels` gives them.

        Returns:
            Two arrays (n,) float64; the cosine to a centroid at the origin is 0.
        """
        at = np.searchsorted(self._index, labels)
        dots, squares, own = *pair_dot_and_squares(X, self._centroids, at), self._squares[at]
        scale = np.sqrt(own * squares)
        cosine = np.divide(dots, scale, out=np.zeros_like(dots), where=scale > 0)
        return np.maximum(squares - 2 * dots + own, 0), cosine

    def order(self, X: Float32, count: int) -> Int32:
        """The centroids nearest to each row, nearest first.

        Args:
            X: (n, D) float32 unit rows, C-contiguous.
            count: How many.

        Returns:
            (n, count) int32; ties go to the lower index, as in `labels`, which the first column equals. A centroid
            that is a copy of another never appears; -1 where there are no more.
        """
        out = np.full((len(X), count), -1, np.int32)
        count = min(count, len(self._centroids))
        for rows in slices_of(len(X), _ASSIGN_ROWS):
            out[rows, :count] = self._index[self._nearest_few(X[rows], count)]
        return out

    def neighbours(self, count: int, each: BlockMap[Any] = map) -> Neighbours:
        """Those nearest to each of the (K, D) centroids that this was made from: itself, then others in any order.

        Args:
            count: How many, itself included.
            each: Map-like callable for the centroids, some hundred at a time; it may send them to other processes.
        """
        n_distinct = len(self._centroids)
        near = functools.partial(self._neighbours_of, min(count, n_distinct))
        table = np.concatenate(list(each(near, slices_of(n_distinct, _ASSIGN_ROWS // 4))))
        return table[self._place]

    def _neighbours_of(self, count: int, rows: slice) -> Neighbours:
        """`neighbours` of some of the distinct centroids."""
        scores = self._centroids[rows] @ self._centroids.T
        scores -= self._half_squares
        kth = np.partition(scores, -count, axis=1)[:, -count]
        close = scores >= float32_below(kth - 2 * self._error)[:, None]
        unsure = np.flatnonzero(close.sum(axis=1) > count)
        close[unsure] = False
        close[unsure[:, None], self._nearest_few(self._centroids[rows][unsure], count)] = True
        table: Neighbours = np.flatnonzero(close).reshape(-1, count) % close.shape[1]
        every = np.arange(rows.start, rows.stop)
        own = (table == every[:, None]).argmax(axis=1)
        table[np.arange(len(table)), own] = table[:, 0]
        table[:, 0] = every
        return table

    def labels_near(self, X: Float32, old: Int32, neighbours: Neighbours, counts: Int64) -> Int32:
        """Find the nearest centroid among the neighbours of the one that a row had, as if that did not hold the row.

        Args:
            X: (n, D) float32 unit rows.
            old: (n,) int32, the centroid that each row is part of.
            neighbours: As the method of this name gives them.
            counts: (K,) int64, rows that each centroid is the mean of. Without the row x, the mean c of n rows would
                be n / (n - 1) times as far from x.

        Returns:
            (n,) int32; ties go to the lowest.
        """
        times = np.where(counts > 1, counts / np.maximum(counts - 1, 1), 1.0) ** 2
        order = np.argsort(old, kind="stable")
        rows = X if (old[1:] >= old[:-1]).all() else X.take(order, axis=0)
        old = old[order]
        starts = np.flatnonzero(np.diff(old, prepend=-1))
        scores = np.empty((len(rows), neighbours.shape[1]), np.float32)
        if self._centroids.size * len(rows) < _SMALL_PRODUCT * len(starts):
            for part in slices_of(len(rows), _ASSIGN_ROWS):
                products = rows[part] @ self._centroids.T
                products -= self._half_squares
                scores[part] = np.take_along_axis(products, neighbours[old[part]], axis=1)
        else:
            for lo, hi in pairwise([*starts.tolist(), len(rows)]):
                near, some = neighbours[old[lo]], scores[lo:hi]
                np.matmul(rows[lo:hi], self._centroids.take(near, axis=0).T, out=some)
                some -= self._half_squares[near]
        # |x|^2 is 1 up to 2^-22, and |x - c|^2 = 1 - 2 score.
        scores[:, 0] = 0.5 - times[old] * (0.5 - scores[:, 0])
        error = (1 + times[old]) * (self._error + 2.0**-22)
        near = scores >= float32_below(scores.max(axis=1) - error)[:, None]
        if np.count_nonzero(near) > 2 * len(rows):  # neighbours are few: their products cost as much as two distances
            for lo, hi in pairwise([*starts.tolist(), len(rows)]):
                near[lo:hi] &= self._closest(rows[lo:hi], neighbours[old[lo]], own=times[old[lo]])
        i, place = np.divmod(np.flatnonzero(near), scores.shape[1])
        found = self._settle(rows, i, neighbours[old[i], place], neighbours[old, 0], times[old])
        labels = np.empty(len(rows), np.int32)
        labels[order] = self._index[found]
        return labels

    def _nearest_few(self, X: Float32, count: int) -> npt.NDArray[np.intp]:
        """The (n, count) largest x.c - |c|^2 / 2 among the distinct centroids, in exact order."""
        n, tiles = len(X), []
        top = np.full((n, count), -np.inf, np.float32)
        for columns in slices_of(len(self._centroids), _ASSIGN_COLUMNS):
            products = X @ self._centroids[columns].T
            np.subtract(products, self._half_squares[columns], out=products)
            best = products if products.shape[1] <= count else np.partition(products, -count, axis=1)[:, -count:]
            top = np.partition(np.concatenate((top, best), axis=1), -count, axis=1)[:, -count:]
            near = products >= float32_below(top.min(axis=1) - 2 * self._error)[:, None]
            n_near = np.count_nonzero(near)
            if n_near > 2 * count * n and n_near * DENSE > near.size:
                near &= self._closest(X, columns, count)
            flat = np.flatnonzero(near)
            i, j = np.divmod(flat, products.shape[1])
            tiles.append((i, j + columns.start, products.reshape(-1)[flat]))
        i, j, score = (np.concatenate(parts) for parts in zip(*tiles, strict=True))
        close = score >= float32_below(top.min(axis=1) - 2 * self._error)[i]
        i, j = i[close], j[close]
        order = np.lexsort((j, pair_squared_distance(X, i, self._centroids, j), i))
        i, j = i[order], j[order]
        place = np.arange(len(i)) - np.searchsorted(i, np.arange(n))[i]
        return j[place < count].reshape(n, count)

    def _closest(self, X: Float32, centroids: slice | Int32, count: int = 1, own: float = 1.0) -> npt.NDArray[np.bool_]:
        """Which of some centroids may be among the `count` nearest to each row, as float64 products tell.

        Where rows and centroids are almost alike, float32 products leave almost all of them.

        Args:
            X: (n, D) rows.
            centroids: m of the distinct centroids.
            count: How many are wanted.
            own: How often the squared distance to the first of them counts, at most 4.

        Returns:
            (n, m).
        """
        rows, some = X.astype(np.float64), self._centroids[centroids].astype(np.float64)
        distance = rows @ some.T
        distance *= -2
        distance += self._squares[centroids]
        distance += np.einsum("ij,ij->i", rows, rows)[:, None]
        distance[:, 0] *= own
        last = min(count, len(some)) - 1
        least = distance.min(axis=1) if last == 0 else np.partition(distance, last, axis=1)[:, last]
        close: npt.NDArray[np.bool_] = distance <= (least + self._fine_error)[:, None]
        return close

    def _nearest(self, X: Float32) -> npt.NDArray[np.intp]:
        """Find the largest x.c - |c|^2 / 2 among the distinct centroids, exactly where it is close."""
        top = np.full(len(X), -np.inf, np.float32)
        found = []
        scratch = np.empty(len(X) * min(_ASSIGN_COLUMNS, len(self._centroids)), np.float32)
        for columns in slices_of(len(self._centroids), _ASSIGN_COLUMNS):
            width = columns.stop - columns.start
            products = scratch[: len(X) * width].reshape(len(X), width)
            np.matmul(X, self._centroids[columns].T, out=products)
            np.subtract(products, self._half_squares[columns], out=products)
            at = products.argmax(axis=1)
            own = at + np.arange(0, products.size, width)
            largest = products.reshape(-1).take(own)
            np.maximum(top, largest, out=top)
            bar = float32_below(top - 2 * self._error)
            # where no second product comes near, the largest is all there is
            products.reshape(-1)[own] = -np.inf
            several = np.flatnonzero(products.max(axis=1) >= bar)
            one = np.flatnonzero(largest >= bar)
            found.append((one, at[one] + columns.start, largest[one]))
            near = products.take(several, axis=0) >= bar[several, None]
            if np.count_nonzero(near) * DENSE > near.size:
                near &= self._closest(X[several], columns)
            i, j = np.divmod(np.flatnonzero(near), width)
            i = several[i]
            found.append((i, j + columns.start, products[i, j]))
        i, j, score = (np.concatenate(parts) for parts in zip(*found, strict=True))
        close = score >= float32_below(top - 2 * self._error)[i]
        i, j = i[close], j[close]
        return self._settle(X, i, j)

    def _settle(
        self,
        X: Float32,
        i: npt.NDArray[np.intp],
        j: npt.NDArray[np.intp],
        own: npt.NDArray[np.intp] | None = None,
        factor: Float64 | None = None,
    ) -> npt.NDArray[np.intp]:
        """The nearest j of each row i of X, where the squared distance to `own` counts `factor` times."""
        best = np.empty(len(X), np.intp)
        best[i] = j
        if len(i) > len(X):
            unsure = np.bincount(i, minlength=len(X))[i] > 1
            i, j = i[unsure], j[unsure]
            distance = pair_squared_distance(X, i, self._centroids, j)
            if own is not None and factor is not None:
                distance = np.where(j == own[i], factor[i] * distance, distance)
            order = np.lexsort((j, distance, i))
            lead = order[np.diff(i[order], prepend=-1) > 0]
            best[i[lead]] = j[lead]
        return best


class _Sums:
    """Fixed-point sums and counts of each cluster's rows: integers, so that the order of additions does not matter."""

    def __init__(self, n_clusters: int, dim: int) -> None:
        self.sums = np.zeros((n_clusters, dim), np.int64)
        self.counts = np.zeros(n_clusters, np.int64)
        self.n_moved = 0
        """Rows that were moved from one cluster to another."""
        self._touched = np.zeros(n_clusters, np.bool_)
        self._lock = threading.Lock()

    def move(self, values: Float64, old: Int32, new: Int32) -> None:
        """Move rows of fixed-point values, whole numbers, from their old clusters (-1: none) to their new ones."""
        self._add(values, new, 1)
        settled = np.flatnonzero(old >= 0)
        if len(settled) < len(old):
            values, old = values.take(settled, axis=0), old[settled]
        self._add(values, old, -1)
        with self._lock:
            self.n_moved += len(new)

    def _add(self, values: Float64, label: Int32, sign: int) -> None:
        if not len(label):
            return
        if (label[1:] < label[:-1]).any():
            order = np.argsort(label, kind="stable")
            values, label = values.take(order, axis=0), label[order]
        starts = np.flatnonzero(np.diff(label, prepend=-1))
        ends = np.append(starts[1:], len(label))
        part = np.empty((len(starts), values.shape[1]), np.int64)
        for at, (lo, hi) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
            some = values[lo:hi] if hi - lo <= _EXACT_ROWS else values[lo:hi].astype(np.int64)
            part[at] = np.add.reduce(some, axis=0)
        if sign < 0:
            np.negative(part, out=part)
        self.apply((label[starts], part, sign * (ends - starts), 0))

    def change(self) -> _Change:
        """What was added: the clusters that it is about, their sums, their counts, rows moved."""
        clusters = np.flatnonzero(self._touched)
        return clusters, self.sums[clusters], self.counts[clusters], self.n_moved

    def apply(self, change: _Change) -> None:
        """Add what another one's `change` says."""
        clusters, sums, counts, n_moved = change
        with self._lock:
            self._touched[clusters] = True
            self.sums[clusters] += sums
            self.counts[clusters] += counts
            self.n_moved += n_moved


@dataclass(frozen=True)
class _Find:
    """Finds new labels from rows and their old labels."""

    finder: NearestCentroid
    neighbours: Neighbours | None
    counts: Int64

    def __call__(self, X: Float32, old: Int32) -> Int32:
        if self.neighbours is None:
            return self.finder.labels(X)
        return self.finder.labels_near(X, old, self.neighbours, self.counts)


# What a pass does with some rows, their labels and the sums: gives arrays with an entry for each row. It travels to
# other processes, with the centroids that it holds.


def _rows(X: Float32, old: Int32, sums: _Sums) -> tuple[Float32]:
    """The rows themselves."""
    return (X,)


@dataclass(frozen=True)
class _Assign:
    """Label and squared distance."""

    finder: NearestCentroid

    def __call__(self, X: Float32, old: Int32, sums: _Sums) -> tuple[Int32, Float64]:
        return self.finder.assign(X)


@dataclass(frozen=True)
class _Relabel:
    """New labels; rows that change theirs are moved between the sums."""

    find: _Find
    bits: int

    def __call__(self, X: Float32, old: Int32, sums: _Sums) -> tuple[Int32]:
        new = self.find(X, old)
        moved = np.flatnonzero(new != old)
        if len(moved):
            values = np.multiply(X[moved], 2.0**self.bits, dtype=np.float64)
            sums.move(np.rint(values, out=values), old[moved], new[moved])
        return (new,)


@dataclass(frozen=True)
class _Measure:
    """Squared distance to the centroid that a row is part of, and a hash of the row."""

    centroids: Float32

    def __call__(self, X: Float32, old: Int32, sums: _Sums) -> tuple[Float64, UInt64]:
        return pair_squared_distance(X, np.arange(len(X)), self.centroids, old.astype(np.intp)), hash_rows(X, _VECTOR)


@dataclass(frozen=True)
class _Conclude:
    """Final label, squared distance, and cosine similarity to the centroid."""

    find: _Find
    centroids: Float32
    norms: Float64

    def __call__(self, X: Float32, old: Int32, sums: _Sums) -> tuple[Int32, Float64, Float64]:
        label = self.find(X, old)
        cosine = np.empty(len(X), np.float64)
        # x.c from |x - c|^2 would cancel; x.x is 1 up to float32 rounding, so ask for the product itself.
        for part in slices_of(len(X), 1024):
            cosine[part] = rowwise_dot(X[part], self.centroids[label[part]]) / self.norms[label[part]]
        return label, pair_squared_distance(X, np.arange(len(X)), self.centroids, label.astype(np.intp)), cosine


_Work = Callable[[Float32, Int32, _Sums], tuple[npt.NDArray[Any], ...]]
_Change = tuple[npt.NDArray[Any], Int64, Int64, int]
_Wanted = tuple[int, Int64 | None]
"""A block's number, and the rows of it that are wanted, ascending; None: all."""


def _read(blocks: RowBlocks, wanted: Sequence[_Wanted]) -> Float32:
    """The wanted rows of some blocks."""
    found = []
    for index, rows in wanted:
        if rows is None:
            found.append(blocks.block(index)[0])
        else:
            start, stop = int(rows[0]), int(rows[-1]) + 1
            X = blocks.block(index, start, stop)[0]
            found.append(X if len(X) == len(rows) else X[rows - start])
    return found[0] if len(found) == 1 else np.concatenate(found)


def _runs(sizes: Sequence[int], most: int) -> list[slice]:
    """Cut a sequence into runs whose sizes add up to `most` at most, or that have one item."""
    cuts, filled = [0], 0
    for at, size in enumerate(sizes):
        if filled and filled + size > most:
            cuts.append(at)
            filled = 0
        filled += size
    return [slice(lo, hi) for lo, hi in pairwise([*cuts, len(sizes)]) if hi > lo]


@dataclass(frozen=True)
class _Apart:
    """Does the work of a pass in another process: the same object for all calls of a pass."""

    work: _Work
    blocks: RowBlocks
    n_clusters: int

    def __call__(self, call: tuple[list[list[_Wanted]], Int32]) -> tuple[list[npt.NDArray[Any]], _Change]:
        """From the rows wanted, some at a time, and their labels to what `work` gives and the change of the sums."""
        wanted, old = call
        sums = _Sums(self.n_clusters, self.blocks.dim)
        found = []
        done = 0
        for some in wanted:
            X = _read(self.blocks, some)
            found.append(self.work(X, old[done : done + len(X)], sums))
            done += len(X)
        return [np.concatenate(arrays) for arrays in zip(*found, strict=True)], sums.change()


@dataclass(frozen=True)
class _Survey:
    """Reads hashes and squared norms of the rows of some blocks."""

    blocks: RowBlocks

    def __call__(self, run: range) -> list[tuple[UInt64, Float64]]:
        found = []
        for index in run:
            X, hashes = self.blocks.block(index)
            square = rowwise_dot(X, X)
            if not (np.abs(square - 1) < 1e-5).all():
                raise ParameterError("rows must be of unit length: use untwin.core.normalize")
            found.append((hashes, square))
        return found


def nearest(X: Float32, centroids: Float32) -> tuple[Int32, Float64]:
    """Find the centroid nearest to each row, by Euclidean distance.

    Parameters
    ----------
    X
        (n, D) float32 unit rows, C-contiguous.
    centroids
        (K, D) float32, of any norm.

    Returns:
    -------
    labels
        (n,) int32; ties go to the lowest index.
    sq_dist
        (n,) float64, squared distances in fixed order.

    """
    return NearestCentroid(centroids).assign(X)


def fit(
    blocks: RowBlocks,
    n_clusters: int,
    *,
    init: Init = "k-means||",
    max_iter: int = 300,
    tol: float = 1e-4,
    n_init: int = 1,
    oversampling_factor: float = 2.0,
    n_neighbours: int | None = None,
    growth: Sequence[tuple[int, int]] = (),
    seed: int = 42,
    executor_map: BlockMap[Any] = map,
    spread: BlockMap[Any] | None = None,
) -> KMeansResult:
    """Fit `n_clusters` centroids by Lloyd's algorithm.

    An iteration that leaves clusters empty moves them to the distinct rows that are farthest from their
    centroids; with `n_neighbours`, where small clusters get empty more often, it splits the largest ones. It
    stops when no label changes, when the centroids' squared shifts sum up to at most `tol` times the mean
    variance of a feature (as scikit-learn does), or after `max_iter` iterations. With `n_neighbours`, all but
    the first and the last iteration move centroids beyond the means, because few iterations then come farther.

    Parameters
    ----------
    blocks
        The rows. Memory holds a few numbers per row and (K, D) arrays, besides the blocks at work.
    n_clusters
        K, at most the number of rows.
    init
        "k-means||": Bahmani et al., "Scalable k-means++", PVLDB 5(7), 2012, algorithm 2, with 5 rounds; the
        candidates are reduced by weighted k-means++. "random": the rows with the smallest seeded hash. Or a
        (K, D) array.
    max_iter, tol
        See above.
    n_init
        Runs with derived seeds, of which the one with the least inertia counts; 1 is enough for an array.
    oversampling_factor
        Candidates per round of k-means||, as a multiple of K.
    n_neighbours
        From the second iteration on, compare a row only with so many centroids: those nearest to the one that the
        row is part of, itself counted as if it did not hold the row (which a small cluster would not let go of
        otherwise). The products then grow with the rows and not with the rows times K. None: all centroids, as
        in Lloyd's algorithm.
    growth
        (rows, iterations) of steps before the one on all rows, with `n_neighbours` only: so many iterations at most
        on so many rows, those with the smallest hashes. The first iteration of each step compares with all centroids.
        At the end of a step, centroids of four rows or fewer (and of an eighth of the average) go to where they split
        the largest clusters: those of rows far from all others would stay there for good.
    seed
        Any integer.
    executor_map
        Map-like callable for the blocks, for instance `ThreadPoolExecutor.map`.
    spread
        Instead of it: map-like callable that sends functions, items and results to other processes and back, the
        results in order. Blocks are then read, and rows compared and summed up, where the functions run, many blocks
        at a time; a result takes at most a (K, D) int64 array and a few numbers per row. Only what memory holds of
        each row stays here. The answer is the same.

    Raises:
    ------
    ParameterError
        If a parameter makes no sense, or there are fewer rows than clusters.

    """
    n_rows, dim = blocks.n_rows, blocks.dim
    if n_clusters < 1:
        raise ParameterError(f"n_clusters must be at least 1, not {n_clusters}")
    if n_clusters > n_rows:
        raise ParameterError(f"n_clusters is {n_clusters}, but there are only {n_rows} rows to fit on")
    if max_iter < 1:
        raise ParameterError(f"max_iter must be at least 1, not {max_iter}")
    if not tol >= 0:
        raise ParameterError(f"tol must not be negative, and is {tol}")
    if n_init < 1:
        raise ParameterError(f"n_init must be at least 1, not {n_init}")
    if not oversampling_factor > 0:
        raise ParameterError(f"oversampling_factor must be greater than 0, not {oversampling_factor}")
    if n_neighbours is not None and n_neighbours < 1:
        raise ParameterError(f"n_neighbours must be at least 1, not {n_neighbours}")
    if growth and (n_neighbours is None or min(min(step) for step in growth) < 1):
        raise ParameterError(f"growth must have rows and iterations of at least 1, and needs n_neighbours: {growth}")
    if isinstance(init, str):
        if init not in ("k-means||", "random"):
            raise ParameterError(f"init must be 'k-means||', 'random' or an array, not {init!r}")
    elif np.shape(init) != (n_clusters, dim):
        raise ParameterError(f"init must have shape {(n_clusters, dim)}, not {np.shape(init)}")
    elif not np.isfinite(init).all():
        raise ParameterError("init must be finite")

    run = _Fit(blocks, n_clusters, executor_map, spread)
    best: KMeansResult | None = None
    for attempt in range(n_init if isinstance(init, str) else 1):
        run_seed = mix_seed(seed, attempt)
        if not isinstance(init, str):
            start = np.array(init, dtype=np.float32, order="C")
        elif init == "random":
            start = run.random_rows(n_clusters, mix_seed(run_seed, _RANDOM))
        else:
            start = run.scalable_init(oversampling_factor, run_seed)
        result = run.lloyd(start, [*growth, (n_rows, max_iter)], tol, n_neighbours)
        if best is None or result.inertia < best.inertia:
            best = result
    assert best is not None
    return best


class _Fit:
    """The rows with what is held of each (hash, label, squared distance), and passes over them."""

    def __init__(
        self, blocks: RowBlocks, n_clusters: int, executor_map: BlockMap[Any], spread: BlockMap[Any] | None
    ) -> None:
        self.blocks, self.n_clusters, self.executor_map, self.spread = blocks, n_clusters, executor_map, spread
        self.each = spread or executor_map
        self.n, self.dim = blocks.n_rows, blocks.dim
        self.bits = min(40, 62 - self.n.bit_length())
        """Fraction bits of the fixed-point sums: n elements of at most 1 stay below 2**62."""
        self.hashes, squares = np.empty(self.n, np.uint64), np.empty(self.n, np.float64)
        n_blocks = len(blocks)
        size = 1 if spread is None else max(1, self._call_rows(self.n) * n_blocks // self.n)
        ends = [0]
        for found in self.each(_Survey(blocks), [range(n_blocks)[some] for some in slices_of(n_blocks, size)]):
            for hashes, square in found:
                lo, hi = ends[-1], ends[-1] + len(hashes)
                if hi <= self.n:
                    self.hashes[lo:hi], squares[lo:hi] = hashes, square
                ends.append(hi)
        if ends[-1] != self.n:
            raise ParameterError(f"the blocks hold {ends[-1]} rows, not {self.n} as they say")
        self.offsets = np.array(ends)
        self.mean_square = _order_free_sum(squares) / self.n

    def _call_rows(self, n_rows: int) -> int:
        """Rows to read in a call in another process, of a pass that reads `n_rows`.

        A call gives back up to (K, D) int64 sums, the bytes of 2 K rows: so these are no more than what it reads.
        """
        return max(_CALL_BYTES // (4 * self.dim), 2 * self.n_clusters, -(-n_rows // _MOST_CALLS))

    def _pass(
        self,
        work: _Work,
        take: Callable[..., None],
        *,
        chosen: Int64 | None = None,
        label: Int32 | None = None,
        sums: _Sums | None = None,
    ) -> None:
        """Do `work` on rows, some at a time, wherever they are.

        Args:
            work: What to do.
            take: Is given a slice of the rows and what `work` gave for these. From several threads.
            chosen: Positions of the rows, ascending (in memory: in any order); None: all.
            label: The labels of all rows, where `work` wants them.
            sums: Where the rows' moves are added.
        """
        added = _Sums(0, self.dim) if sums is None else sums

        def old(places: slice) -> Int32:
            if label is None:
                return np.empty(0, np.int32)
            return label[places if chosen is None else chosen[places]]

        blocks = self.blocks
        if self.spread is None and isinstance(blocks, ArrayBlocks) and chosen is not None:

            def work_here(places: slice) -> None:
                take(places, *work(blocks.take(chosen[places]), old(places), added))

            self._each(work_here, slices_of(len(chosen), 2 * _ASSIGN_ROWS))
            return

        bounds = self.offsets if chosen is None else np.searchsorted(chosen, self.offsets)
        pieces = [(index, lo, hi) for index, (lo, hi) in enumerate(pairwise(bounds.tolist())) if hi > lo]

        def wanted(index: int, lo: int, hi: int) -> _Wanted:
            first, end = self.offsets[index : index + 2]
            return index, None if chosen is None or hi - lo == end - first else chosen[lo:hi] - first

        # few rows of each of many blocks are worked on together
        batches = [pieces[some] for some in _runs([hi - lo for _, lo, hi in pieces], _BATCH_BYTES // (4 * self.dim))]

        if self.spread is None:

            def work_on(batch: list[tuple[int, int, int]]) -> None:
                places = slice(batch[0][1], batch[-1][2])
                take(places, *work(_read(blocks, [wanted(*piece) for piece in batch]), old(places), added))

            self._each(work_on, batches)
            return

        def n_read(batch: list[tuple[int, int, int]]) -> int:
            return sum(hi - lo if chosen is None else int(chosen[hi - 1] - chosen[lo]) + 1 for _, lo, hi in batch)

        sizes = list(map(n_read, batches))
        calls = [batches[some] for some in _runs(sizes, self._call_rows(sum(sizes)))]
        whole = [slice(call[0][0][1], call[-1][-1][2]) for call in calls]
        sent = (
            ([[wanted(*piece) for piece in batch] for batch in call], old(places))
            for call, places in zip(calls, whole, strict=True)
        )
        for places, (found, change) in zip(
            whole, self.spread(_Apart(work, blocks, self.n_clusters), sent), strict=True
        ):
            take(places, *found)
            added.apply(change)

    def _each(self, work: Callable[[Any], None], items: Iterable[Any]) -> None:
        for _ in self.executor_map(work, items):
            pass

    def gather(self, positions: Int64) -> Float32:
        """Rows at ascending positions, (m, D) float32."""
        out = np.empty((len(positions), self.dim), np.float32)
        self._pass(_rows, out.__setitem__, chosen=positions)
        return out

    def _in_hash_order(self, positions: Int64, keys: UInt64) -> Float32:
        """Gather rows at ascending positions, and sort them by key, then by their bytes."""
        rows = self.gather(positions)
        order = np.argsort(keys, kind="stable")
        if (keys[order[1:]] == keys[order[:-1]]).any():
            order = np.array(sorted(range(len(keys)), key=lambda at: (keys[at], rows[at].tobytes())))
        return rows[order]

    def random_rows(self, count: int, seed: int) -> Float32:
        """Rows of the `count` smallest re-seeded hashes, in the order of those."""
        keys = hash_integers(self.hashes, seed)
        largest = np.partition(keys, count - 1)[count - 1]
        positions = np.flatnonzero(keys <= largest)
        return self._in_hash_order(positions, keys[positions])[:count]

    def scalable_init(self, oversampling_factor: float, seed: int) -> Float32:
        """k-means||: sample candidates in rounds, weigh each by the rows nearest to it, choose."""
        candidates = self.random_rows(1, mix_seed(seed, _FIRST))
        label, square = self._assign(candidates)
        for number in range(_SCALABLE_ROUNDS):
            cost = _order_free_sum(square)
            if cost <= 0:
                break
            round_seed, wanted = mix_seed(seed, _SAMPLE, number), oversampling_factor * self.n_clusters
            chosen = np.concatenate(
                [
                    some.start
                    + np.flatnonzero(
                        uniform(hash_integers(self.hashes[some], round_seed)) < wanted * (square[some] / cost)
                    )
                    for some in slices_of(self.n, _STEP_VALUES)
                ]
            )
            if not len(chosen):
                continue
            new = self._in_hash_order(chosen, hash_integers(self.hashes[chosen], round_seed))
            new_label, new_square = self._assign(new)
            nearer = new_square < square
            label[nearer] = new_label[nearer] + len(candidates)
            square[nearer] = new_square[nearer]
            candidates = np.concatenate([candidates, new])
        weight = np.bincount(label, minlength=len(candidates))
        start = plus_plus(candidates, weight, self.n_clusters, mix_seed(seed, _PLUS_PLUS))
        missing = self.n_clusters - len(start)
        if missing:
            start = np.concatenate([start, self.random_rows(missing, mix_seed(seed, _FILL))])
        return start

    def _assign(self, centroids: Float32) -> tuple[Int32, Float64]:
        """Label and squared distance of every row."""
        label, square = np.empty(self.n, np.int32), np.empty(self.n, np.float64)

        def take(rows: slice, *found: npt.NDArray[Any]) -> None:
            label[rows], square[rows] = found

        self._pass(_Assign(NearestCentroid(centroids)), take)
        return label, square

    def lloyd(
        self, centroids: Float32, steps: Sequence[tuple[int, int]], tol: float, n_neighbours: int | None
    ) -> KMeansResult:
        """Lloyd's iterations from given centroids; sums change only by the rows that move, exactly."""
        label = np.full(self.n, -1, np.int32)
        total = _Sums(self.n_clusters, self.dim)
        sums, counts = total.sums, total.counts
        n_iter = 0
        for step, (n_rows, max_iter) in enumerate(steps, 1):
            last_row = min(self.n, n_rows) - 1
            bound = np.partition(self.hashes, last_row)[last_row]
            for iteration in range(1, max_iter + 1):
                n_iter += 1
                few = n_neighbours if iteration > 1 else None
                changed = self._relabel(centroids, label, total, bound, few)
                full = counts > 0
                means = centroids.copy()
                means[full] = sums[full] / (counts[full, None] * 2.0**self.bits)
                empty = np.flatnonzero(~full)
                if not len(empty):
                    reseeds = centroids[:0]
                elif n_neighbours is None:
                    reseeds = self._farthest(centroids, label, len(empty))
                else:
                    reseeds = self._halves(means, counts, label, len(empty), n_iter)
                means[empty[: len(reseeds)]] = reseeds
                shift = means.astype(np.float64) - centroids
                centroids = means
                mean = sums.sum(axis=0) / (counts.sum() * 2.0**self.bits)
                variance = max(0.0, self.mean_square - float(np.add.reduce(mean * mean))) / self.dim
                near = np.add.reduce((shift * shift).ravel()) <= tol * variance
                if not len(reseeds) and (near or not changed):
                    break
                last = step == len(steps) and iteration == max_iter
                if n_neighbours is not None and n_iter > 1 and not last:
                    centroids[full] += _OVERSHOOT * shift[full].astype(np.float32)
            if step < len(steps):
                small = counts <= min(_SMALL_CLUSTER, counts.sum() // (8 * self.n_clusters))
                moved = self._halves(centroids, np.where(small, 0, counts), label, int(small.sum()), ~n_iter)
                centroids[np.flatnonzero(small)[: len(moved)]] = moved
        return self._result(centroids, n_iter, label, n_neighbours)

    def _finder(self, centroids: Float32, n_neighbours: int | None, counts: Int64) -> _Find:
        finder = NearestCentroid(centroids)
        return _Find(finder, None if n_neighbours is None else finder.neighbours(n_neighbours, self.each), counts)

    def _in_reading_order(self, chosen: Int64 | None, label: Int32) -> Int64 | None:
        """Rows by cluster where that costs nothing: neighbours are then looked up for many rows at once."""
        if self.spread is not None or not isinstance(self.blocks, ArrayBlocks):
            return chosen
        if chosen is None:
            return np.argsort(label, kind="stable")
        return chosen[np.argsort(label[chosen], kind="stable")]

    def _relabel(
        self, centroids: Float32, label: Int32, sums: _Sums, bound: np.uint64, n_neighbours: int | None
    ) -> int:
        """Give the rows with a hash up to `bound` their nearest centroids, move them between the sums, count them."""
        find = self._finder(centroids, n_neighbours, sums.counts.copy())
        below = self.hashes <= bound
        chosen = None if below.all() else np.flatnonzero(below)
        if n_neighbours is not None:
            chosen = self._in_reading_order(chosen, label)

        def take(places: slice, new: Int32) -> None:
            label[places if chosen is None else chosen[places]] = new

        n_moved = sums.n_moved
        self._pass(_Relabel(find, self.bits), take, chosen=chosen, label=label, sums=sums)
        return sums.n_moved - n_moved

    def _halves(self, centroids: Float32, counts: Int64, label: Int32, count: int, seed: int) -> Float32:
        """Up to `count` centroids that split the largest clusters: a bit nearer to a row of it than its own one."""
        largest = np.argsort(-counts, kind="stable")[:count]
        largest = largest[counts[largest] > 1]
        if not len(largest):
            return centroids[:0]
        place = np.full(self.n_clusters + 1, -1, np.int32)  # the last: of rows that have no label yet, which is -1
        place[largest] = np.arange(len(largest))
        positions = np.flatnonzero(place[label] >= 0)
        rank, keys = place[label[positions]], hash_integers(self.hashes[positions], seed)
        least = np.full(len(largest), ~np.uint64(0))
        np.minimum.at(least, rank, keys)
        first = keys == least[rank]
        positions, rank = positions[first], rank[first]
        rows = self._in_hash_order(positions, rank.astype(np.uint64))
        rows = rows[np.searchsorted(np.sort(rank), np.arange(len(largest)))]
        own = centroids[largest].astype(np.float64)
        return (own + (rows - own) / 8).astype(np.float32)

    def _farthest(self, centroids: Float32, label: Int32, count: int) -> Float32:
        """Up to `count` distinct rows that are farthest from, and not just rounded to, their centroids."""
        square, vector = np.empty(self.n, np.float64), np.empty(self.n, np.uint64)

        def take(rows: slice, *found: npt.NDArray[Any]) -> None:
            square[rows], vector[rows] = found

        self._pass(_Measure(centroids), take, label=label)
        tiny, n_looked_at = self.dim * 4.0**-self.bits, 2 * count
        while True:
            # all rows that are as far as the last one looked at, so that these come first in the order of all rows
            least = np.partition(square, -n_looked_at)[-n_looked_at] if n_looked_at < self.n else 0.0
            order = np.flatnonzero((square >= least) & (square > tiny))
            order = order[np.lexsort((vector[order], self.hashes[order], -square[order]))]
            _, first = np.unique(vector[order], return_index=True)
            if len(first) >= count or n_looked_at >= self.n:
                break
            n_looked_at *= 4
        chosen = order[np.sort(first)[:count]]
        ascending = np.argsort(chosen)
        out = np.empty((len(chosen), self.dim), np.float32)
        out[ascending] = self.gather(chosen[ascending])
        return out

    def _result(self, centroids: Float32, n_iter: int, label: Int32, n_neighbours: int | None) -> KMeansResult:
        """Assign every row to the final centroids, and sum up."""
        find = self._finder(centroids, n_neighbours, np.zeros(self.n_clusters, np.int64))
        norms = np.sqrt(rowwise_dot(centroids, centroids))
        norms[norms == 0] = 1
        square, cosine = np.empty(self.n, np.float64), np.empty(self.n, np.float64)
        chosen = None if n_neighbours is None else self._in_reading_order(None, label)

        def take(places: slice, *found: npt.NDArray[Any]) -> None:
            rows = places if chosen is None else chosen[places]
            label[rows], square[rows], cosine[rows] = found

        self._pass(_Conclude(find, centroids, norms), take, chosen=chosen, label=label)
        return KMeansResult(
            centroids=centroids,
            counts=np.bincount(label, minlength=self.n_clusters),
            inertia=_order_free_sum(square),
            n_iter=n_iter,
            mean_cosine=_order_free_sum(cosine) / self.n,
            n_rows=self.n,
        )


def plus_plus(candidates: Float32, weight: Int64, count: int, seed: int) -> Float32:
    """Choose up to `count` distinct rows of `candidates` by weighted k-means++ sampling.

    Arthur & Vassilvitskii, "k-means++: the advantages of careful seeding", SODA 2007: each next centre is
    drawn with probability proportional to weight times squared distance to the nearest centre so far. Drawn
    in batches: a row is proposed by the distances at the batch's start, and accepted with probability
    (distance now) / (distance then). That is the same distribution, and the distances can be updated by
    matrix products.

    Parameters
    ----------
    candidates
        (m, D) float32, in an order that depends on the rows only.
    weight
        (m,) int64, not negative.
    count
        Rows wanted; fewer are returned if fewer are distinct and have a weight.
    seed
        Any integer.

    Returns:
    -------
    (k, D) float32, k <= count.

    """
    draws = 0

    def draw(shape: int) -> Float64:
        nonlocal draws
        draws += shape
        return uniform(hash_integers(np.arange(draws - shape, draws, dtype=np.int64), seed))

    chosen: list[int] = []
    square = np.ones(len(candidates))
    while len(chosen) < count:
        cumulated = np.cumsum(weight * square)
        if not cumulated[-1] > 0:
            break
        size = int(np.clip(len(chosen) // 2, 1, _PROPOSALS))
        proposed = np.searchsorted(cumulated, draw(size) * cumulated[-1], side="right")
        proposed = np.minimum(proposed, len(candidates) - 1)
        accept = draw(size) * square[proposed]
        i, j = np.indices((size, size)).reshape(2, -1)
        between = pair_squared_distance(candidates, proposed[i], candidates, proposed[j]).reshape(size, size)
        now = square[proposed].copy()
        new: list[int] = []
        for at in range(size):
            if accept[at] < now[at] and len(chosen) + len(new) < count:
                new.append(int(proposed[at]))
                now = np.minimum(now, between[at])
        if not new:
            continue
        square_to_new = NearestCentroid(candidates[new]).assign(candidates)[1]
        square = np.minimum(square, square_to_new) if chosen else square_to_new
        chosen += new
    return candidates[chosen]


def _order_free_sum(values: Float64) -> float:
    """Sum (n,) values in fixed point, relative to the largest: the same bits in any order."""
    largest = max(float(values.max(initial=0.0)), -float(values.min(initial=0.0)))
    if largest == 0:
        return 0.0
    shift = 62 - len(values).bit_length() - int(np.frexp(largest)[1])
    total = 0
    for some in slices_of(len(values), _STEP_VALUES):
        total += int(np.rint(np.ldexp(values[some], shift)).astype(np.int64).sum())
    return float(np.ldexp(float(total), -shift))

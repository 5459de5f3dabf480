"""For a cluster's ranked rows: the most similar better-ranked row of each, and which are duplicates.

Matrix products in float32 find the few pairs that can matter; every value and every decision comes from the
fixed-order float64 product of `untwin.core.vectors`, so the answer has the same bits for any batch size,
thread count or BLAS.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from untwin.core.hashing import hash_rows
from untwin.core.vectors import blocks, float32_below, pair_dot, product_error, rowwise_dot
from untwin.errors import ParameterError

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]
CompareTo = Literal["kept", "ranked"]

EPS_GRID: tuple[float, ...] = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1),
    *(0.13, 0.16, 0.2, 0.25, 0.3),
)
"""The values of eps for which counts are reported."""

_SLICE_ROWS = 256
"""Rows of one matrix product, and the side of the diagonal squares that are resolved in rank order."""
_TILE_COLUMNS = 1024
"""Columns of one matrix product: 256 x 1024 float32 results are 1 MB, about a core's L2 cache."""
_READ_BYTES = 16 << 20
"""Bytes of rows that are asked from a store at a time, about."""
_NOTHING = -2.0
"""Less than any cosine: no match yet."""
_MASKED = np.float32(-4.0)
"""Less than `_NOTHING` by more than any error bound: an entry that must not match."""


class RankedRows(Protocol):
    """The unit rows of one cluster in rank order, best first; may be larger than memory."""

    @property
    def n(self) -> int:
        """Number of rows."""

    @property
    def dim(self) -> int:
        """Elements per row."""

    def take(self, lo: int, hi: int) -> Float32:
        """Rows of rank `lo` to `hi - 1`: (hi - lo, D) float32, C-contiguous."""


class RankedArray:
    """`RankedRows` in memory: (n, D) float32 unit rows, and optionally the order that ranks them."""

    def __init__(self, X: Float32, order: npt.NDArray[np.integer[Any]] | None = None) -> None:
        self._X = np.ascontiguousarray(X, dtype=np.float32)
        self._order = order

    @property
    def n(self) -> int:
        """Number of rows."""
        return len(self._X) if self._order is None else len(self._order)

    @property
    def dim(self) -> int:
        """Elements per row."""
        return int(self._X.shape[1])

    def take(self, lo: int, hi: int) -> Float32:
        """Rows of rank `lo` to `hi - 1`: (hi - lo, D) float32, C-contiguous."""
        return self._X[lo:hi] if self._order is None else self._X.take(self._order[lo:hi], axis=0)


class RowStore(Protocol):
    """Rows that are judged already; append-only. Used from one thread at a time."""

    def append(self, X: Float32, positions: Int64) -> None:
        """Add (m, D) rows and their (m,) positions, which ascend over all calls."""

    def tiles(self, max_rows: int) -> Iterator[tuple[Float32, Int64]]:
        """All rows so far, C-contiguous, with positions; at most `max_rows` at a time.

        Positions of a store of kept rows must ascend; for removed rows the order does not matter.
        """


StoreFactory = Callable[[int, int], tuple[RowStore, RowStore]]
"""(n, dim) -> (store of kept rows, store of removed rows); together they receive at most n rows."""
ExecutorMap = Callable[[Callable[[Any], Any], Sequence[Any]], Any]
"""Like `map` or `ThreadPoolExecutor.map`."""


class _MemoryStore:
    """One end of a shared (n, D) buffer: kept rows fill it from the front, removed rows from the back."""

    def __init__(self, buffer: Float32, positions: Int64, *, from_back: bool) -> None:
        self._buffer, self._positions, self._from_back = buffer, positions, from_back
        self._count = 0

    def append(self, X: Float32, positions: Int64) -> None:
        start = len(self._buffer) - self._count - len(X) if self._from_back else self._count
        self._buffer[start : start + len(X)] = X
        self._positions[start : start + len(X)] = positions
        self._count += len(X)

    def tiles(self, max_rows: int) -> Iterator[tuple[Float32, Int64]]:
        start = len(self._buffer) - self._count if self._from_back else 0
        for rows in blocks(self._count, max_rows):
            part = slice(start + rows.start, start + rows.stop)
            yield self._buffer[part], self._positions[part]


def memory_stores(n: int, dim: int) -> tuple[RowStore, RowStore]:
    """Make stores for kept and removed rows that share one (n, dim) float32 buffer in memory."""
    buffer, positions = np.empty((n, dim), np.float32), np.empty(n, np.int64)
    return _MemoryStore(buffer, positions, from_back=False), _MemoryStore(buffer, positions, from_back=True)


@dataclass(frozen=True)
class Matches:
    """What `match_ranked` found; all arrays are (n,) in rank order, and positions are ranks.

    Attributes:
    ----------
    score
        float32, similarity to the most similar better-ranked row, at most 1; 0 for the first row.
    match
        int64, position of that row (ties: the better-ranked); its own position, 0, for the first row.
    kept_score
        float32, similarity to the witness, NaN where there is none; None without eps.
    kept_match
        int64, position of the witness, -1 where there is none; None without eps.
    duplicate
        bool, whether the row is removed; None without eps.

    """

    score: Float32
    match: Int64
    kept_score: Float32 | None
    kept_match: Int64 | None
    duplicate: Bool | None


def threshold(eps: float) -> np.float32:
    """Return the least score of a duplicate, `float32(1 - eps)`; eps in (0, 1), else `ParameterError`."""
    if isinstance(eps, bool) or not isinstance(eps, numbers.Real) or not 0 < eps < 1:
        raise ParameterError(f"eps is {eps!r}; it must be a number greater than 0 and less than 1")
    return np.float32(1 - eps)


def is_duplicate(score: npt.ArrayLike, eps: float) -> Bool:
    """Whether `float32(score) >= float32(1 - eps)`: the one comparison used everywhere; NaN: no."""
    return np.asarray(np.asarray(score).astype(np.float32) >= threshold(eps))


def score_counts(score: Float32, grid: Sequence[float] = EPS_GRID) -> Int64:
    """Count the (n,) scores that are duplicates at each eps of `grid`; int64. First rows never are."""
    return np.array([np.count_nonzero(is_duplicate(score, eps)) for eps in grid], dtype=np.int64)


def match_ranked(
    rows: RankedRows,
    *,
    eps: float | None,
    compare_to: CompareTo = "kept",
    batch_size: int = 1024,
    executor_map: ExecutorMap | None = None,
    store_factory: StoreFactory | None = None,
) -> Matches:
    """Find each row's most similar better-ranked row and, given eps, the duplicates and their witnesses.

    The similarity of two rows is d(x, y) / sqrt(d(x, x) d(y, y)), at most 1, with the fixed-order float64 dot
    product d.

    - `compare_to="ranked"`: a row is a duplicate if any better-ranked row is within eps, be that row removed
      or not.
    - `compare_to="kept"`: rows are resolved in rank order; a row is a duplicate if a *kept* better-ranked row
      is within eps.

    The witness of a duplicate is its most similar kept better-ranked row (ties: the better-ranked), if within
    eps.

    Bit-identical rows are collapsed before the products. Let y be a later copy of x, the first. All
    similarities of y are those of x, and d(x, y) gives exactly 1, the largest score there is. So

    - match(y): if x itself scores exactly 1 (a different row can, when it differs by less than float64
      resolves), its match is the best-ranked of all rows that score 1 with y; else no row better than x does,
      and it is x.
    - y is always a duplicate. If x is kept, no kept row better than x is within eps of it, hence none scores
      1 with y, and the witness is x.
    - If x is removed, every kept row that x was compared to counts for y in the same way; in addition the
      kept rows between x and y. Under "ranked" such a row v is not within eps of x (v would be removed),
      hence not of y: same witness. Under "kept" it can be, and can be more similar than x's witness: these
      are looked up at the end.

    Parameters
    ----------
    rows
        Unit rows, as `normalize` makes them, in rank order.
    eps
        In (0, 1); None if only score and match are wanted.
    compare_to
        See above.
    batch_size
        Rows that are judged against the stores at a time: a larger batch reads the stores less often. Not a
        bit of the result depends on it.
    executor_map
        Map-like callable. If given, the products of a batch run in it, 256 rows each; for giant clusters.
    store_factory
        Makes the stores of judged rows; in memory (a copy of all rows) if None.

    Raises:
    ------
    ParameterError
        If a parameter makes no sense, or rows are not of unit length.

    """
    if compare_to not in ("kept", "ranked"):
        raise ParameterError(f"compare_to must be 'kept' or 'ranked', not {compare_to!r}")
    if batch_size < 1:
        raise ParameterError(f"pairwise_batch_size must be at least 1, not {batch_size}")
    return _Resolver(
        rows,
        eps=eps,
        compare_to=compare_to,
        batch_size=batch_size,
        executor_map=executor_map or map,
        store_factory=store_factory or memory_stores,
    ).run()


class _Best:
    """The best match so far of each of some rows, in exact similarity (ties: the smaller position)."""

    def __init__(self, value: Float64, position: Int64) -> None:
        self.value, self.position = value, position

    @classmethod
    def empty(cls, n: int) -> _Best:
        return cls(np.full(n, _NOTHING), np.full(n, np.iinfo(np.int64).max))

    def part(self, rows: slice) -> _Best:
        """View some rows."""
        return _Best(self.value[rows], self.position[rows])

    def joined(self, other: _Best) -> _Best:
        """Take the better of two for every row."""
        use = (other.value > self.value) | ((other.value == self.value) & (other.position < self.position))
        return _Best(np.where(use, other.value, self.value), np.where(use, other.position, self.position))

    def offer(self, products: Float32, left: _Rows, right: _Rows, floor: Float64 | None = None) -> None:
        """Take approximate products (left x right) into account; those below `floor` do not matter."""
        if not products.size:
            return
        error = product_error(left.X.shape[1])
        top = products.max(axis=1)
        bar = (self.value if floor is None else np.maximum(self.value, floor)) - error
        open_rows = np.flatnonzero(top >= bar)
        if not len(open_rows):
            return
        least = float32_below(np.maximum(bar, top - 2 * error)[open_rows])
        open_products = products if len(open_rows) == len(products) else products.take(open_rows, axis=0)
        i, j = np.divmod(np.flatnonzero(open_products >= least[:, None]), products.shape[1])
        self.offer_pairs(open_rows[i], j, left, right)

    def offer_pairs(self, i: npt.NDArray[np.intp], j: npt.NDArray[np.intp], left: _Rows, right: _Rows) -> None:
        """Take pairs of rows into account; they come row by row."""
        i, j = _thin_out(i, j, left, right)
        value = _pair_cosine(left, i, right, j)
        position = right.position[j]
        order = np.lexsort((position, -value, i))
        lead = order[np.flatnonzero(np.diff(i[order], prepend=-1))]
        i, value, position = i[lead], value[lead], position[lead]
        better = (value > self.value[i]) | ((value == self.value[i]) & (position < self.position[i]))
        i = i[better]
        self.value[i], self.position[i] = value[better], position[better]


@dataclass(frozen=True)
class _Rows:
    """Rows with what belongs to them: (m, D) vectors, d(x, x) and positions."""

    X: Float32
    square: Float64
    position: Int64

    def __getitem__(self, rows: slice | npt.NDArray[Any]) -> _Rows:
        return _Rows(self.X[rows], self.square[rows], self.position[rows])

    def __len__(self) -> int:
        return len(self.position)


class _Resolver:
    """One call of `match_ranked`: the arrays of the answer, and the steps that fill them."""

    def __init__(
        self,
        rows: RankedRows,
        *,
        eps: float | None,
        compare_to: CompareTo,
        batch_size: int,
        executor_map: ExecutorMap,
        store_factory: StoreFactory,
    ) -> None:
        self.rows, self.n, self.dim = rows, rows.n, rows.dim
        self.limit = None if eps is None else threshold(eps)
        self.compare_to, self.batch_size, self.executor_map = compare_to, batch_size, executor_map
        self.store_factory = store_factory
        self.best = _Best.empty(self.n)
        self.witness = _Best.empty(self.n)
        self.removed = np.zeros(self.n, np.bool_)

    def run(self) -> Matches:
        self.square = _squares(self.rows, self.batch_size)
        if not (np.abs(self.square - 1) < 1e-5).all():
            raise ParameterError("rows must be of unit length: use untwin.core.normalize")
        first = _first_copies(self.rows, self.square, self.batch_size)
        copies = np.flatnonzero(first != np.arange(self.n))
        recheck = len(copies) > 0 and self.limit is not None and self.compare_to == "kept"

        stores: tuple[RowStore, RowStore] | None = None
        for part in blocks(self.n, self.batch_size):
            batch = self._load(part, first)
            if not len(batch):
                continue
            duplicate = self._judge(batch, stores)
            if part.stop < self.n or recheck:
                if stores is None:
                    stores = self.store_factory(self.n, self.dim)
                for store, chosen in zip(stores, (~duplicate, duplicate), strict=True):
                    some = batch if chosen.all() else batch[chosen]
                    if len(some):
                        store.append(some.X, some.position)
        self._copy_answers(first, copies)
        if recheck and stores is not None:
            self._recheck_copies(stores[0], first, copies)
        return self._answer()

    def _load(self, part: slice, first: Int64) -> _Rows:
        """Take the distinct rows among some positions."""
        X = self.rows.take(part.start, part.stop)
        position = np.arange(part.start, part.stop)
        batch = _Rows(X, self.square[part], position)
        distinct = first[part] == position
        return batch if distinct.all() else batch[distinct]

    def _judge(self, batch: _Rows, stores: tuple[RowStore, RowStore] | None) -> Bool:
        """Resolve a batch against the judged rows and within itself; returns which rows are duplicates."""
        over_kept, over_removed = _Best.empty(len(batch)), _Best.empty(len(batch))
        slices = list(blocks(len(batch), _SLICE_ROWS))

        def compare(best: _Best, rows: slice, tile: _Rows, floor: Float64 | None) -> None:
            part, left = best.part(rows), batch[rows]
            for columns in blocks(len(tile), _TILE_COLUMNS):
                right = tile[columns]
                part.offer(left.X @ right.X.T, left, right, None if floor is None else floor[rows])

        def compare_all(best: _Best, store: RowStore, floor: Float64 | None) -> None:
            for X, position in store.tiles(max(_TILE_COLUMNS, _READ_BYTES // (4 * self.dim))):
                tile = _Rows(X, self.square[position], position)
                list(self.executor_map(partial(compare, best, tile=tile, floor=floor), slices))

        if stores is not None:
            compare_all(over_kept, stores[0], None)
            compare_all(over_removed, stores[1], over_kept.value)
        duplicate = np.zeros(len(batch), np.bool_)
        for rows in slices:
            judged = duplicate[: rows.start]
            compare(over_kept, rows, _chosen(batch[: rows.start], ~judged), None)
            if judged.any():
                compare(over_removed, rows, _chosen(batch[: rows.start], judged), over_kept.value)
            duplicate[rows] = self._resolve_square(batch[rows], over_kept.part(rows), over_removed.part(rows))

        best = over_kept.joined(over_removed)
        self.best.value[batch.position], self.best.position[batch.position] = best.value, best.position
        if self.limit is not None:
            at = batch.position[duplicate]
            self.removed[at] = True
            self.witness.value[at] = over_kept.value[duplicate]
            self.witness.position[at] = over_kept.position[duplicate]
        return duplicate

    def _resolve_square(self, square: _Rows, over_kept: _Best, over_removed: _Best) -> Bool:
        """Compare up to 256 rows with each other and resolve them in rank order; updates the bests."""
        products = square.X @ square.X.T
        np.copyto(products, _MASKED, where=_not_before(len(square)))
        if self.limit is None:
            over_kept.offer(products, square, square)
            return np.zeros(len(square), np.bool_)
        near = self._neighbours(products, square)
        if self.compare_to == "ranked":
            found = np.maximum(over_kept.value, over_removed.value)
            duplicate = (found.astype(np.float32) >= self.limit) | (near.any(axis=1) if near is not None else False)
        else:
            duplicate = over_kept.value.astype(np.float32) >= self.limit
            if near is not None:
                duplicate = _resolve_in_order(near, duplicate)
        if not duplicate.any():
            over_kept.offer(products, square, square)
        else:
            kept, removed = np.flatnonzero(~duplicate), np.flatnonzero(duplicate)
            over_kept.offer(products.take(kept, axis=1), square, square[kept])
            over_removed.offer(products.take(removed, axis=1), square, square[removed], over_kept.value)
        return duplicate

    def _neighbours(self, products: Float32, square: _Rows) -> Bool | None:
        """Which entries of the masked products are within eps, decided exactly; None if no entry is."""
        assert self.limit is not None
        error = product_error(self.dim)
        low, high = float32_below(np.float64(self.limit) - error), np.float32(float(self.limit) + error)
        if products.max() < low:
            return None
        near: Bool = products >= low
        i, j = np.nonzero(near & (products <= high))
        near[i, j] = _pair_cosine(square, i, square, j).astype(np.float32) >= self.limit
        return near

    def _copy_answers(self, first: Int64, copies: Int64) -> None:
        """Answers of later copies from those of the first; see `match_ranked` for why."""
        origin = first[copies]
        exact = self.best.value[origin] == 1
        self.best.value[copies] = 1
        self.best.position[copies] = np.where(exact, self.best.position[origin], origin)
        if self.limit is not None:
            removed = self.removed[origin]
            self.removed[copies] = True
            self.witness.value[copies] = np.where(removed, self.witness.value[origin], 1)
            self.witness.position[copies] = np.where(removed, self.witness.position[origin], origin)

    def _recheck_copies(self, kept: RowStore, first: Int64, copies: Int64) -> None:
        """For copies of removed rows, look among the kept rows between the first copy and this one."""
        copies = copies[self.removed[first[copies]]]
        copies = copies[np.lexsort((copies, first[copies]))]
        if not len(copies):
            return
        origin = first[copies]
        origins, begin = np.unique(origin, return_index=True)
        last = copies[np.append(begin[1:], len(copies)) - 1]
        error = product_error(self.dim)
        for part in blocks(self.n, self.batch_size):
            lo, hi = np.searchsorted(origins, (part.start, part.stop))
            block = self._load(part, first) if lo < hi else None
            for some in blocks(hi - lo, _SLICE_ROWS):
                assert block is not None
                at, until = origins[lo:hi][some], last[lo:hi][some]
                left = block[np.searchsorted(block.position, at)]
                mine = slice(*np.searchsorted(origin, (at[0], at[-1] + 1)))
                for X, position in kept.tiles(_TILE_COLUMNS):
                    right = _Rows(X, self.square[position], position)
                    if position[-1] < at[0]:
                        continue
                    products = left.X @ right.X.T
                    least = float32_below(self.witness.value[at] - error)
                    between = (right.position > at[:, None]) & (right.position < until[:, None])
                    i, j = np.nonzero((products >= least[:, None]) & between)
                    value = _pair_cosine(left, i, right, j)
                    self._improve(copies[mine], np.searchsorted(at, origin[mine]), i, right.position[j], value)

    def _improve(
        self,
        copies: Int64,
        group: npt.NDArray[np.intp],
        i: npt.NDArray[np.intp],
        position: Int64,
        value: Float64,
    ) -> None:
        """Give each copy the most similar of its group's kept rows (i, position, value) that rank before it.

        Both lists are sorted by group, then position. Positions are larger than those seen before: ties
        change nothing.
        """
        if not len(i):
            return
        _, grade = np.unique(value, return_inverse=True)
        running = np.maximum.accumulate(i * (len(i) + 1) + grade)
        record = np.flatnonzero(np.diff(running, prepend=-1) > 0)
        where = np.searchsorted(i[record] * self.n + position[record], group * self.n + copies) - 1
        hit = record[np.maximum(where, 0)]
        use = (where >= 0) & (i[hit] == group) & (value[hit] > self.witness.value[copies])
        self.witness.value[copies[use]] = value[hit[use]]
        self.witness.position[copies[use]] = position[hit[use]]

    def _answer(self) -> Matches:
        score, match = self.best.value.astype(np.float32), self.best.position
        score[:1], match[:1] = 0, 0
        if self.limit is None:
            return Matches(score, match, None, None, None)
        kept_score = self.witness.value.astype(np.float32)
        none = ~(self.removed & (kept_score >= self.limit))
        kept_score[none] = np.nan
        kept_match = self.witness.position
        kept_match[none] = -1
        return Matches(score, match, kept_score, kept_match, self.removed)


def _chosen(rows: _Rows, chosen: Bool) -> _Rows:
    return rows if chosen.all() else rows[np.flatnonzero(chosen)]


def _not_before(n: int) -> Bool:
    """(n, n): whether column j is not better ranked than row i."""
    return np.arange(n) >= np.arange(n)[:, None]


def _pair_cosine(left: _Rows, i: npt.NDArray[np.intp], right: _Rows, j: npt.NDArray[np.intp]) -> Float64:
    """Exact similarities of pairs of rows: fixed-order float64, at most 1."""
    cosine: Float64 = pair_dot(left.X, i, right.X, j) / np.sqrt(left.square[i] * right.square[j])
    return np.minimum(cosine, 1.0, out=cosine)


def _thin_out(
    i: npt.NDArray[np.intp], j: npt.NDArray[np.intp], left: _Rows, right: _Rows
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Drop pairs that a float64 matrix product shows not to be their row's best, if there are many pairs.

    Groups of almost identical rows make thousands of candidates per row; a product of all is then cheaper
    than a fixed-order product of each.
    """
    if len(i) < 1024:
        return i, j
    row_used, column_used = np.zeros(len(left), np.bool_), np.zeros(len(right), np.bool_)
    row_used[i], column_used[j] = True, True
    rows, columns = np.flatnonzero(row_used), np.flatnonzero(column_used)
    if len(i) < 4 * len(rows) or len(i) * 16 < len(rows) * len(columns):
        return i, j
    products = left.X[rows].astype(np.float64) @ right.X[columns].astype(np.float64).T
    products *= (1 / np.sqrt(left.square[rows]))[:, None]
    products *= 1 / np.sqrt(right.square[columns])
    at_row, at_column = np.cumsum(row_used) - 1, np.cumsum(column_used) - 1
    value = np.minimum(products[at_row[i], at_column[j]], 1.0)
    starts = np.flatnonzero(np.diff(i, prepend=-1))  # pairs come row by row
    top = np.maximum.reduceat(value, starts)
    keep = value >= top[at_row[i]] - 8 * (left.X.shape[1] + 16) * 2.0**-53
    return i[keep], j[keep]


def _resolve_in_order(near: Bool, duplicate: Bool) -> Bool:
    """Resolve in rank order: duplicates are so already, or `near` (strictly lower triangle) a kept row."""
    out = duplicate.copy()
    packed = np.packbits(near, axis=1, bitorder="little")
    kept = int.from_bytes(np.packbits(~duplicate, bitorder="little").tobytes(), "little")
    for i in np.flatnonzero(near.any(axis=1) & ~duplicate).tolist():
        if int.from_bytes(packed[i].tobytes(), "little") & kept:
            out[i] = True
            kept &= ~(1 << i)
    return out


def _squares(rows: RankedRows, batch_size: int) -> Float64:
    """d(x, x) of each row, (n,)."""
    square = np.empty(rows.n, np.float64)
    for part in blocks(rows.n, batch_size):
        X = rows.take(part.start, part.stop)
        square[part] = rowwise_dot(X, X)
    return square


def _first_copies(rows: RankedRows, square: Float64, batch_size: int) -> Int64:
    """Position of the best-ranked bit-identical row (its own if none is better ranked); (n,) int64.

    Only rows that share d(x, x) with another can be copies: the others are not even hashed. A hash collision
    is found by comparing the rows, and only costs the shortcut.
    """
    first = np.arange(rows.n)
    order = np.argsort(square, kind="stable")
    same = square[order[1:]] == square[order[:-1]]
    suspects = np.sort(order[np.append(same, False) | np.insert(same, 0, False)]) if same.any() else order[:0]
    if not len(suspects):
        return first
    hashes = np.empty(len(suspects), np.uint64)
    for part in blocks(len(suspects), batch_size):
        hashes[part] = hash_rows(_gather(rows, suspects[part]), seed=0)
    _, begin, group = np.unique(hashes, return_index=True, return_inverse=True)
    origin = suspects[begin[group]]
    later = np.flatnonzero(origin != suspects)
    for part in blocks(len(later), batch_size):
        some = later[part]
        targets, at = np.unique(origin[some], return_inverse=True)
        equal = (_gather(rows, suspects[some]) == _gather(rows, targets)[at]).all(axis=1)
        first[suspects[some[equal]]] = origin[some[equal]]
    return first


def _gather(rows: RankedRows, positions: Int64) -> Float32:
    """Rows at ascending positions, by as few reads as there are runs."""
    cut = np.flatnonzero(np.diff(positions) != 1) + 1
    starts, ends = positions[np.insert(cut, 0, 0)], positions[np.append(cut, len(positions)) - 1] + 1
    parts = [rows.take(lo, hi) for lo, hi in zip(starts.tolist(), ends.tolist(), strict=True)]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
